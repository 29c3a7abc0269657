"""A small workspace, built once by the verbs themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import saelab

SUBJECTS = [
    "The lighthouse keeper",
    "A small green frog",
    "My neighbour's daughter",
    "The old clock",
    "Every second sailor",
    "This recipe",
]
VERBS = ["watches", "forgets", "measures", "paints", "counts", "admires"]
OBJECTS = [
    "seven feet of rope",
    "the winter sea",
    "a letter from Paris",
    "two inches of snow",
    "the red door",
    "an honest answer",
]


def sentences(doc: int, n: int = 60) -> str:
    """Repeatable plain English of a kind, different for each document."""
    words = (
        f"{SUBJECTS[(doc + i * 5) % 6]} {VERBS[(doc * 7 + i) % 6]} {OBJECTS[(doc + i * i) % 6]}." for i in range(n)
    )
    return f"Story {doc}. " + " ".join(words)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": sentences(doc)}) + "\n" for doc in range(40)), "utf-8")
    return path


@pytest.fixture(scope="session")
def workspace(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache, train, eval and index of the tiny model, each by its verb."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    for arguments in (
        (
            "cache",
            "--model",
            tiny_model_dir,
            "--text",
            text_file,
            "--hook",
            "blocks.1.hook_resid_post",
            "--tokens",
            20_480,
            "--set",
            "context=64",
            "--set",
            "held_out=0.25",
            "--set",
            "rows_per_shard=40",
            "--out",
            path / "activations",
        ),
        (
            "train",
            path,
            "--k",
            4,
            "--expansion",
            4,
            "--tokens",
            40_000,
            "--set",
            "batch_size=500",
            "--set",
            "checkpoint_every=20",
        ),
        ("eval", path, "--set", "draws=100"),
        ("index", path),
    ):
        result = saelab(*arguments)
        assert result.code == 0, result.err
    return path
