"""The launcher: on this machine only, every option on the command line, one sentence when it cannot start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest

from saelab.errors import ConfigError
from saelab_explorer import launch


def test_the_server_listens_on_this_machine_only_and_calls_nobody():
    flags = launch.arguments(8501)
    options = {name: value for name, value in pairwise(flags) if name.startswith("--")}
    assert options["--server.address"] == "127.0.0.1"
    assert options["--browser.gatherUsageStats"] == "false"
    assert options["--server.enableXsrfProtection"] == "true"
    assert options["--server.enableCORS"] == "true"
    assert options["--server.fileWatcherType"] == "none"
    assert options["--runner.postScriptGC"] == "false"
    assert flags.count("--server.allowedHosts") == 2


def test_streamlit_knows_every_option():
    from streamlit import config

    known = set(config.get_config_options())
    names = {flag.removeprefix("--") for flag in launch.arguments(8501) if flag.startswith("--")}
    assert names <= known


def test_a_taken_port_is_told_in_one_sentence_that_names_the_flag():
    with socket.socket() as taken:
        taken.bind((launch.HOST, 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot be used .*--port"):
            launch.choose_port(taken.getsockname()[1])


@pytest.mark.parametrize("port", [-1, 0, 65_536])
def test_a_number_that_is_no_port_is_refused(port: int):
    with pytest.raises(ConfigError, match="between 1 and 65535"):
        launch.choose_port(port)


def test_any_free_port_can_be_asked_for():
    assert 1 <= launch.choose_port(None) <= 65_535


def test_torch_leaves_a_core_to_the_browser_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch, root: Path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= int(launch.environment(root, None)["OMP_NUM_THREADS"]) <= max(1, (os.cpu_count() or 1) - 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.environment(root, None)["OMP_NUM_THREADS"] == "7"


def test_the_module_serves_until_it_is_interrupted(root: Path):
    with start(root, "--port", "0", "--no-open", "--run", "small") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line
        address = line.split()[1]
        assert address.endswith("?run=small")
        with urllib.request.urlopen(address.split("?")[0] + "_stcore/health", timeout=10) as reply:
            assert reply.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(("--run", "none"), "no run 'none'"), (("--port", "70000"), "--port")]
)
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(root: Path, arguments: tuple[str, ...], sentence: str):
    with start(root, "--no-open", *arguments) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert sentence in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "saelab_explorer", str(root), *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
