from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import saelab

from saelab.cli.app import VERBS


def test_importing_saelab_costs_neither_torch_nor_transformer_lens():
    program = (
        "import sys, saelab; print(sorted({'torch', 'transformer_lens', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_imports_nothing_heavy():
    program = """
import sys
sys.argv = ["saelab", "--help"]
try:
    from saelab.cli import main
    main()
except SystemExit:
    print(sorted({"torch", "transformer_lens", "numpy", "streamlit", "pyarrow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_help_is_quick():
    """0.3 s on an idle machine; here the best of ten, because tests share it with other work."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "saelab", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    print(f"median {statistics.median(seconds):.3f} s, best {min(seconds):.3f} s")
    assert min(seconds) < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str):
    result = saelab(verb, "--help")
    assert result.code == 0
    assert "Usage: saelab " + verb in result.out
    options = re.findall(r"^  (--[\w-]+)", result.out, flags=re.MULTILINE)
    assert options


def test_an_unknown_verb_and_an_unknown_option_are_refused_in_a_line():
    for arguments in (("trian",), ("train", "--kk", "3")):
        result = saelab(*arguments)
        assert result.code == 2
        assert "Traceback" not in result.err


def test_the_readme_lists_every_verb():
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    for verb in VERBS:
        assert re.search(rf"`saelab {verb}\b", readme), f"README.md does not mention saelab {verb}"
