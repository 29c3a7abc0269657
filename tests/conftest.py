"""Models that the tests share: a tiny random one, and the demo model where it is in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub client is imported: no test may reach for the network


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 3-layer Llama with a byte-level tokenizer, in the Hugging Face layout."""
    from saelab.models.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path):
    """The tiny model, loaded once for all tests; edits undo themselves, so sharing it is safe."""
    from saelab.models.load import load_model

    return load_model(tiny_model_dir, device="cpu")


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct; skipped where it is not cached, unless SAELAB_FETCH_DEMO=1 asks to fetch it."""
    from saelab.models.demo import is_cached
    from saelab.models.load import load_model

    if not is_cached() and os.environ.get("SAELAB_FETCH_DEMO") != "1":
        pytest.skip("the demo model is not in the cache; SAELAB_FETCH_DEMO=1 fetches it (93 MB)")
    return load_model("demo", device="cpu")
