"""The README of the benchmarks is made from the records, and from nothing else."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from benchmarks import record, report


def contender(median_ms: float, over_floor: float, **more: object) -> dict:
    return {
        "median_ms": median_ms, "low_ms": median_ms * 0.9, "high_ms": median_ms * 1.1, "peak_bytes": 2e6,
        "over_floor": over_floor, **more,
    }  # fmt: skip


SHAPE = {"tokens": 8, "width": 4, "features": 16, "k": 2}
ROW = {
    "op": "encode_topk", "what": "forward", "shape": SHAPE, "floor_ms": 1.5,
    "contenders": {"saelab": contender(3.21, 2.14), "linear + topk": contender(1.23, 0.82)},
    "not_timed": {"linear + topk bfloat16": "out of memory"},
}  # fmt: skip
EQUAL = {
    "seed": 0, "shape": SHAPE, "tokens_from": "a planted dictionary", "n_steps": 300,
    "contenders": {
        "saelab": {"held_out_error": 0.5, "explained_variance": 0.4, "seconds": 1.5},
        "sae-lens": {"held_out_error": 0.51, "explained_variance": 0.39, "seconds": 6.0, "version": "6.54"},
    },
    "our_error_over_theirs": {"sae-lens": 0.98}, "equal": {"sae-lens": True}, "not_timed": {},
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    record.publish("ops", "cpu", [ROW], out=tmp_path)
    record.publish("quality", "cpu", [EQUAL], out=tmp_path)
    return tmp_path


def test_every_row_is_in_the_table_also_those_that_we_lose(results):
    text = report.text(record.read(results))
    assert "| encode_topk forward | 8x4x16k2 | 1.5 | **saelab** | 3.21 | 2.89..3.53 | 2.14 | 2 |  |" in text
    assert "| linear + topk | 1.23 | 1.11..1.35 | 0.82 | 2 | 0.38x |" in text
    assert "encode_topk forward 8x4x16k2, linear + topk bfloat16: not timed, out of memory" in text
    assert "| 0 | 300 | 0.50000 | 0.4000 | sae-lens (6.54) | 0.51000 | 0.3900 | 0.9800 | yes | 4.0x |" in text


def test_the_plot_has_a_dot_for_every_contender(results):
    report.write(results, results / "README.md")
    svg = ElementTree.parse(results / "times_over_floor_cpu.svg").getroot()
    assert len(svg.findall(".//{*}circle")) == 2
    assert "times_over_floor_cpu.svg" in (results / "README.md").read_text()


def test_writing_twice_gives_the_same(results):
    report.write(results, results / "README.md")
    first = (results / "README.md").read_text()
    report.write(results, results / "README.md")
    assert (results / "README.md").read_text() == first == report.text(record.read(results))


def test_smoke_results_are_refused(results):
    path = results / "ops_cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"smoke": True}))
    with pytest.raises(ValueError, match="smoke run"):
        report.text(record.read(results))


def test_the_readme_is_that_of_the_results():
    assert report.README.read_text() == report.text(record.read()), "run python -m benchmarks report"
    for device in {entry["device"] for entry in record.read()}:
        plot = report.README.with_name(f"times_over_floor_{device}.svg")
        assert (plot.read_text() if plot.exists() else None) == report.plot(record.read(), device)
