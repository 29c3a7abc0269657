"""The package works as a built wheel in another directory, and drags in no CUDA where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("saelab-*.whl"))


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"saelab", "saelab_kernels", "saelab_explorer"}
    assert "saelab/py.typed" in names


def test_the_wheel_runs_in_another_directory(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    program = (
        "import saelab, saelab_kernels as k, saelab_explorer as e; print(saelab.__file__, k.__file__, e.__path__[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = {"capture_output": True, "text": True, "check": True, "env": environment, "cwd": tmp_path}
    places = subprocess.run([sys.executable, "-c", program], **run).stdout.split()
    assert all(place.startswith(str(site)) for place in places)
    assert "steer" in subprocess.run([sys.executable, "-m", "saelab", "--help"], **run).stdout


def test_constraints_pin_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=;\[ ]", requirement)[0].lower() for requirement in wanted}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert names <= pinned


def test_constraints_hold_no_cuda_package():
    assert not re.search(r"^(nvidia|cuda)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
