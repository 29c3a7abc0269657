"""Runs for the explorer to show: a small whole one, one that holds an index only, and one whose tokens are hostile."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

#: What a token of some vocabulary might be, and must stay: text.
HOSTILE = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "</span></div><b>bold",
    "](javascript:window.pwned=1)",
    "\u202eright to left",
    "\ufffd",
    "line\nbreak\ttab",
    "&lt;not a tag&gt; \\ ` ~ $x$",
)


def verb(*arguments: object) -> None:
    """A command of saelab, run in this process."""
    from saelab.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["saelab", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                pytest.fail(said.getvalue())


@pytest.fixture(scope="session")
def root(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the runs ``small``, ``twin`` (another seed), ``indexed`` and ``hostile``."""
    from saelab.features.planted import plant_index

    root = tmp_path_factory.mktemp("explorer") / "runs"
    text = root.parent / "stories.jsonl"
    text.write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in range(40)), "utf-8")
    small = root / "small"
    shape = ("--set", "context=64", "--set", "held_out=0.25", "--set", "rows_per_shard=64")
    source = ("--model", tiny_model_dir, "--text", text, "--hook", "blocks.1.hook_resid_post")
    steps = ("--tokens", 30_000, "--set", "batch_size=500", "--set", "log_every=5")
    verb("cache", *source, "--out", small / "activations", "--tokens", 16_384, *shape)
    verb("train", small, "--k", 4, "--expansion", 3, *steps)
    verb("eval", small, "--set", "draws=50")
    verb("index", small)
    verb("train", small, "--k", 4, "--expansion", 3, *steps, "--seed", 1, "--out", root / "twin" / "sae")
    verb("index", root / "twin")
    plant_index(root / "indexed", n_features=120, n_rows=160)
    shutil.copytree(root / "indexed", root / "hostile")
    make_hostile(root / "hostile" / "index")
    return root


@pytest.fixture
def shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root, announced to the pages as the launcher does."""
    monkeypatch.setenv("SAELAB_EXPLORER_ROOT", str(root))
    monkeypatch.setenv("SAELAB_EXPLORER_RUN", "small")
    return root


def story(n: int) -> str:
    who = ("The lighthouse keeper", "A green frog", "My neighbour", "The old clock", "Every sailor")
    does = ("watches", "forgets", "measures", "paints", "counts")
    what = ("seven feet of rope", "the winter sea", "a letter from Paris", "two inches of snow", "the red door")
    return " ".join(f"{who[(n + i) % 5]} {does[(2 * n + i * i) % 5]} {what[(n + 3 * i) % 5]}." for i in range(60))


def make_hostile(index: Path) -> None:
    """Replace the first words of an index's vocabulary by hostile ones, as if a tokenizer had them."""
    from saelab import atomic

    file = index / "vocabulary.json"
    words = json.loads(file.read_text("utf-8"))
    words[1 : 1 + len(HOSTILE)] = HOSTILE
    atomic.write_json(file, words)
    manifest = json.loads((index / "index.json").read_text("utf-8"))
    for entry in manifest["files"]:
        if entry["name"] == file.name:
            entry |= {"bytes": file.stat().st_size, "sha256": atomic.sha256(file)}
    atomic.write_json(index / "index.json", manifest)
