"""The parts of the benchmarks: shapes, percentiles, memory, floors, data, gates."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import data, gates, memory, timing
from benchmarks.cases.inputs import Inputs, exact_sums, restricted
from benchmarks.floors import Ceilings, Floor, Floors
from benchmarks.problem import Problem, planted_problem
from benchmarks.shapes import CPU, GPU, SMOKE, Shape


@pytest.mark.parametrize("shape", [*CPU, *GPU, *SMOKE], ids=str)
def test_a_shape_is_read_as_it_is_written(shape: Shape):
    assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "2048x576x4608", "0x4x4k1", "4x4x4k5", "4x4x4k-1", "ax4x4k1"])
def test_what_is_no_shape_is_refused(text: str):
    with pytest.raises(ValueError, match=r"k is at most|TOKENSx"):
        Shape.parse(text)


def test_a_timing_is_the_median_and_the_outer_fifths():
    assert timing.summary([0.001 * ms for ms in (5, 1, 4, 2, 3, 6)]) == (3.5, 2.0, 5.0)
    assert timing.summary([0.002]) == (2.0, 2.0, 2.0)


def test_contenders_run_in_turn_and_warm_up_in_each():
    calls = []

    def contender(name: str):
        def run() -> float:
            calls.append(name)
            return 0.0

        return run

    timing.side_by_side({name: contender(name) for name in "ab"}, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "aabb" + "bbaa" + "aabb"


def test_peak_memory_sees_what_a_run_frees_again():
    n_bytes = 64 * 2**20
    peak = memory.peak_bytes(lambda: torch.ones(n_bytes // 4), "cpu")
    if peak is None:
        pytest.skip("this system does not tell")
    assert n_bytes * 0.95 < peak < n_bytes * 1.3
    small = memory.peak_bytes(lambda: torch.ones(4), "cpu")
    assert small is not None
    assert small < 2**20


def test_floors_are_those_of_the_published_ceilings_of_an_h200():
    """790 TFLOP/s and 4.3 TB/s at N = 8192, d = 2304, F = 65,536, k = 64, bfloat16 rows; by hand, in milliseconds."""
    floors = Floors(Shape(8192, 2304, 65536, 64), Ceilings(4.3e12, 790e12, 60e12), weight_bytes=2)
    step = floors.whole_step().terms
    assert step["encoder product"] == pytest.approx(3.13, abs=0.01)
    assert step["rows of W_dec"] == pytest.approx(0.56, abs=0.01)
    assert step["rows of tokens"] == pytest.approx(1.12, abs=0.01)
    assert step["Adam"] == pytest.approx(1.83, abs=0.01)
    assert floors.whole_step().ms == pytest.approx(sum(step.values()))


def test_terms_of_one_name_add_up():
    assert (Floor({"a": 1.0, "b": 2.0}) + Floor({"b": 3.0})).terms == {"a": 1.0, "b": 5.0}


def test_errors_that_are_no_numbers_are_infinite():
    ones = torch.ones(3)
    assert gates.rms_error(ones * 1.01, ones) == pytest.approx(0.01, rel=1e-3)
    assert gates.rms_error(ones[:2], ones) == math.inf
    assert gates.rms_error(torch.tensor([1.0, math.nan, 1.0]), ones) == math.inf
    assert gates.rms_error(ones, torch.zeros(3)) == math.inf
    assert gates.rms_error(torch.zeros(3), torch.zeros(3)) == 0


def test_bits_survive_the_way_to_another_process(tmp_path):
    acts = torch.randn(5, 3)
    data.save_bits(acts, tmp_path / "acts.npy")
    torch.testing.assert_close(data.read_bits(tmp_path / "acts.npy"), acts.bfloat16(), rtol=0, atol=0)


def test_planted_tokens_have_mean_square_one_and_depend_on_their_seeds():
    first = data.planted(200, 16, n_directions=32, active=4, seed=1)
    assert first.pow(2).mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(first, data.planted(200, 16, n_directions=32, active=4, seed=1))
    assert not torch.equal(first, data.planted(200, 16, n_directions=32, active=4, seed=1, draw=1))


def test_a_problem_is_the_same_in_another_process(tmp_path):
    problem = planted_problem(SMOKE[0], "cpu")
    again = Problem.load(**problem.save(tmp_path))
    for name in ("directions", "b_enc", "batches", "held_out", "dead"):
        assert torch.equal(getattr(problem, name), getattr(again, name)), name
    assert (again.shape, again.lr, again.device) == (problem.shape, problem.lr, problem.device)


def test_sums_over_sampled_features_are_those_over_all():
    shape = Shape(40, 8, 30, 4)
    inputs = Inputs(shape, "cpu")
    acts, indices = inputs.top
    dense = torch.zeros(40, 30, dtype=torch.float64).scatter(1, indices, acts.double())
    expected = dense.T @ inputs.grad.double()
    found = exact_sums(indices, acts, inputs.grad, inputs.features)
    torch.testing.assert_close(found, expected[inputs.features])
    pairs, _ = restricted(indices, acts, inputs.features)
    assert len(pairs.starts) == len(inputs.features) + 1
    assert (pairs.tokens.diff()[pairs.order.diff() < 0] <= 0).all()
