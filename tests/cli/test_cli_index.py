"""saelab index: interrupted, resumed, refused; and an older index that stays until the new one is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from commandline import saelab

import saelab as sl

ARGUMENTS = ("--set", "n_examples=3")


@pytest.fixture
def listening():
    """Ctrl-C as in a terminal; a shell that starts tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def own(workspace: Path, tmp_path: Path) -> Path:
    """A workspace to leave an unfinished index in."""
    shutil.copytree(workspace, tmp_path / "own")
    return tmp_path / "own"


def interrupted(*arguments: object, at: str) -> str:
    """The last line of an indexing during which the user presses Ctrl-C when ``at`` is reported."""

    @contextlib.contextmanager
    def bar(title: str):
        def progress(done: int, total: int, detail: str) -> None:
            if detail == at:
                os.kill(os.getpid(), signal.SIGINT)

        yield progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelab.cli.index.progress_bar", bar)
        result = saelab("index", *arguments)
    assert result.code == 130
    return result.err.strip().splitlines()[-1]


def content(index: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in index.iterdir() if file.name != "env.json"}


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("at", ["rows encoded", "features described", "neighbours and logits"])
def test_ctrl_c_names_the_command_that_goes_on_and_the_older_index_stays(own: Path, at: str):
    index = own / "index"
    older = content(index)
    assert interrupted(own, *ARGUMENTS, at=at) == f"stopped; continue with: saelab index --resume {index}"
    assert content(index) == older
    refusal = saelab("index", own)
    assert refusal.code == 2
    assert f"saelab index --resume {index}" in refusal.err
    assert saelab("show", own).code == saelab("features", own, 0).code == 0

    resumed = saelab("index", "--resume", index)
    assert resumed.code == 0, resumed.err
    assert sl.load_index(own).config.n_examples == 3
    whole = saelab("index", own, *ARGUMENTS, "--out", own / "whole")
    assert whole.code == 0, whole.err
    assert content(index) == content(own / "whole")
    assert not list(own.glob("*.part-*"))


@pytest.mark.usefixtures("listening")
def test_an_index_killed_before_it_took_its_place_is_put_there(own: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(new: Path, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("saelab.atomic.put_directory", killed)
        assert saelab("index", own, *ARGUMENTS).code == 130
    assert sl.load_index(own).config.n_examples == 20
    assert saelab("index", "--resume", own / "index").code == 0
    assert sl.load_index(own).config.n_examples == 3


def test_what_cannot_be_resumed_is_refused(own: Path):
    assert "is finished, there is nothing to resume" in saelab("index", "--resume", own / "index").err
    assert "was never begun" in saelab("index", "--resume", own / "other").err
    assert "leave out the others" in saelab("index", own, "--resume", own / "index").err
    assert "leave out the others" in saelab("index", "--resume", own / "index", "--tokens", 500).err
    assert "index needs an SAE" in saelab("index").err


@pytest.mark.usefixtures("listening")
def test_an_index_is_not_resumed_over_another_sae(own: Path):
    interrupted(own, *ARGUMENTS, at="rows encoded")
    cfg = own / "sae" / "cfg.json"
    cfg.write_text(cfg.read_text() + "\n")
    result = saelab("index", "--resume", own / "index")
    assert result.code == 2
    assert "has changed" in result.err
