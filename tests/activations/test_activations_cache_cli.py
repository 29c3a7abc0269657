"""The verbs cache and show, on the tiny model: several processes, a second model, small dtypes, damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from saelab import atomic
from saelab.activations.store import ActivationStore

Saelab = Callable[..., tuple[int, str, str]]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def saelab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Saelab:
    """Runs a command in this process; gives its exit code and what it printed."""
    from saelab.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["saelab", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    lines = ({"text": " ".join(f"{doc} times {i} is {doc * i}." for i in range(1, 40))} for doc in range(2, 40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def command(model: Path, text: Path, *more: object) -> list[object]:
    settings = ["context=32", "rows_per_shard=8", "held_out=0.2", "batch_rows=4"]
    start: list[object] = ["cache", "--model", model, "--text", text, "--hook", HOOK, "--tokens", 4096]
    return [*start, *(part for setting in settings for part in ("--set", setting)), *more]


def artefact(path: Path) -> dict[str, str]:
    names = ["manifest.json", "documents.jsonl", *(file.name for file in sorted(path.glob("shard_*")))]
    return {name: atomic.sha256(path / name) for name in names}


@pytest.fixture(scope="module")
def one(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store made by one process."""
    from saelab.activations.capture import CacheConfig, capture
    from saelab.activations.text import TextConfig

    config = CacheConfig(
        model=str(tiny_model_dir),
        text=TextConfig(source=str(text_file)),
        hook_names=(HOOK,),
        tokens=4096,
        context=32,
        rows_per_shard=8,
        held_out=0.2,
        batch_rows=4,
    )
    return capture(config, tmp_path_factory.mktemp("one") / "activations").path


def test_two_workers_make_the_bytes_of_one(
    saelab: Saelab, one: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
):
    code, _, err = saelab(*command(tiny_model_dir, text_file, "--workers", 2, "--out", tmp_path / "two"))
    assert code == 0
    assert "2 will share it" in err
    assert "helper ended early" not in err
    assert artefact(tmp_path / "two") == artefact(one)
    assert not list(tmp_path.glob("*.part-*"))


def test_a_second_model_is_captured_by_one_command(saelab: Saelab, one: Path, tmp_path: Path):
    from saelab.models.tiny import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1)
    code, out, err = saelab("cache", "--like", one, "--model", other, "--out", tmp_path / "second", "--json")
    assert code == 0, err
    assert json.loads(out)["hook_names"] == [HOOK]
    first, second = ActivationStore.open(one), ActivationStore.open(tmp_path / "second")
    assert (second.tokens(second.rows("all")) == first.tokens(first.rows("all"))).all()
    assert second.manifest.model.sha256 != first.manifest.model.sha256
    code, out, _ = saelab("show", tmp_path / "second", "--verify")
    assert code == 0
    assert "like = " in out
    assert "verified: every file that has a checksum fits it" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--like", "ONE", "--out", "OUT"], "needs the other model; give --model"),
        (["--like", "ONE", "--model", "MODEL", "--tokens", 99, "--out", "OUT"], "--like takes tokens from"),
        (["--like", "ONE", "--model", "MODEL", "--set", "context=16", "--out", "OUT"], "leave context out"),
        (["--like", "OUT", "--model", "MODEL", "--out", "OUT"], "there is no directory"),
        (["--workers", 0, "--out", "OUT"], "--workers must be at least 1, got 0"),
        (["--join", "OUT"], "is no saelab run"),
        (["--join", "ONE", "--tokens", 99], "--join takes its settings from"),
        (["--join", "ONE", "--resume", "ONE"], "takes its settings from"),
        (["--set", "dtype=float8", "--out", "OUT"], "dtype must be one of"),
    ],
)
def test_mistakes_are_one_sentence(
    saelab: Saelab, one: Path, tiny_model_dir: Path, tmp_path: Path, arguments: list[object], words: str
):
    places = {"ONE": one, "OUT": tmp_path / "out", "MODEL": tiny_model_dir}
    code, _, err = saelab("cache", *(places.get(str(argument), argument) for argument in arguments))
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_joining_or_resuming_a_finished_capture_opens_it(saelab: Saelab, one: Path):
    before = artefact(one)
    for flag in ("--join", "--resume"):
        assert saelab("cache", flag, one)[0] == 0
    assert artefact(one) == before


def test_show_verify_names_the_damaged_file_and_ends_with_2(
    saelab: Saelab, tiny_model_dir: Path, text_file: Path, tmp_path: Path
):
    out = tmp_path / "run" / "activations"
    assert saelab(*command(tiny_model_dir, text_file, "--set", "dtype=int8", "--out", out))[0] == 0
    assert saelab("show", tmp_path / "run", "--verify")[0] == 0
    shard = out / "shard_00002.safetensors"
    spoiled = bytearray(shard.read_bytes())
    spoiled[len(spoiled) // 2] ^= 16
    shard.write_bytes(spoiled)
    assert saelab("show", tmp_path / "run")[0] == 0
    code, printed, err = saelab("show", tmp_path / "run", "--verify", "--json")
    assert code == 2
    assert "shard_00002.safetensors is damaged" in json.loads(printed)[0]["damage"]
    assert err == f"error: {shard} is damaged (its checksum has changed); capture again\n"
