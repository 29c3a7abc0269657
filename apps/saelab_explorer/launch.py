"""Start the explorer: a free port, and Streamlit with every option that matters, until Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlencode

from saelab.errors import ConfigError
from saelab_explorer import theme
from saelab_explorer.runs import root_and_name

HOST = "127.0.0.1"

#: Environment variables by which the launcher tells the page what to show.
ROOT_VARIABLE, RUN_VARIABLE = "SAELAB_EXPLORER_ROOT", "SAELAB_EXPLORER_RUN"

_OPTIONS: Mapping[str, str | int | bool | tuple[str, ...]] = {
    # only this machine, and only under these names: a page elsewhere cannot rebind its own name to us
    "server.address": HOST,
    "server.allowedHosts": ("localhost", HOST),
    "server.enableCORS": True,
    "server.enableXsrfProtection": True,
    "server.xsrfCookieSameSite": "strict",
    "server.maxUploadSize": 1,
    "server.enableStaticServing": False,
    "server.enableAgentApi": False,
    "server.headless": True,
    "server.showEmailPrompt": False,
    "server.fileWatcherType": "none",
    "server.runOnSave": False,
    "browser.serverAddress": HOST,
    "browser.gatherUsageStats": False,
    "client.toolbarMode": "minimal",
    "client.showErrorLinks": False,
    "client.showErrorDetails": "type",
    "runner.magicEnabled": False,
    # collecting garbage after each click costs 0.3 s once torch is loaded, and the page waits for it
    "runner.postScriptGC": False,
    "logger.level": "error",
    "logger.hideWelcomeMessage": True,
}


def arguments(port: int) -> list[str]:
    """Arguments of the ``streamlit`` command; they win over a configuration file that lies in the working directory."""
    flags: list[str] = []
    for name, value in {
        **_OPTIONS,
        **theme.streamlit_options(),
        "server.port": port,
        "browser.serverPort": port,
    }.items():
        for one in value if isinstance(value, tuple) else (value,):
            flags += [f"--{name}", str(one).lower() if isinstance(one, bool) else str(one)]
    return ["run", str(Path(__file__).with_name("app.py")), *flags]


def environment(root: Path, run: str | None) -> dict[str, str]:
    """Environment variables that tell the pages what to show, and torch to leave a core to the browser.

    Torch's threads spin while they wait for each other; with a browser on the same cores that made writing ten times
    slower (two cores, two threads: 1 token/s, one thread: 10). What the user has set already stays.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, _cores() - 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    shown = {ROOT_VARIABLE: str(root), RUN_VARIABLE: run or ""}
    return threads | {name: os.environ[name] for name in threads if name in os.environ} | shown


def choose_port(port: int | None) -> int:
    """``port`` if nothing listens there; for None, one that the system finds free.

    Raises:
        ConfigError: the port is taken, or is not a port at all.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"--port must be between 1 and 65535, got {port}")
    with socket.socket() as probe:
        # as servers do: a port whose last connections still linger is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port or 0))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {HOST} cannot be used ({error.strerror}); choose another one with --port"
            ) from error
        return int(probe.getsockname()[1])


def serve(
    root: Path,
    *,
    port: int | None = 8501,
    run: str | None = None,
    open_browser: bool = True,
    started: Callable[[str], None] | None = None,
) -> str:
    """Serve the runs under ``root`` (or the one run ``root``) in this process until Ctrl-C or SIGTERM.

    ``port=None`` takes any free port. ``started`` is called with the address once the server answers. Returns the
    address. The server is this very process, so nothing is left behind when it is killed. Call it from the main thread.

    Raises:
        ArtifactError: there is no directory ``root``.
        ConfigError: the port is taken, the run is unknown, or the server did not start.
    """
    from streamlit.web import cli

    root, run = root_and_name(root, run)
    port = choose_port(port)
    address = f"http://{HOST}:{port}/" + (f"?{urlencode({'run': run})}" if run else "")
    os.environ.update(environment(root, run))

    def announce() -> None:
        if _answers(port):
            if started:
                started(address)
            if open_browser:
                webbrowser.open(address)
        # what the first page needs, while the browser is still starting
        for module in ("pandas", "pyarrow.dataset", "saelab.features.index"):
            importlib.import_module(module)

    threading.Thread(target=announce, daemon=True).start()
    try:
        cli.main(args=arguments(port), prog_name="streamlit", standalone_mode=False)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(
                f"the explorer's server did not start on port {port}; choose another one with --port"
            ) from stop
    return address


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _answers(port: int, *, timeout_s: float = 60.0) -> bool:
    """Wait until the server says that it is healthy."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://{HOST}:{port}/_stcore/health", timeout=2) as reply,
        ):
            if reply.status == 200:
                return True
        time.sleep(0.05)
    return False
