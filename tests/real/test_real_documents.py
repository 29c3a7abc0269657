"""Every Python block of the README and the tutorial runs, in order, on the demo workspace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (ROOT / "runs/demo/index/DONE").exists(), reason="runs/demo is not built; make demo SERVE=0"
    ),
]


@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md"])
def test_its_code_runs(document: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
