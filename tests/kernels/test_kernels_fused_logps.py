"""token_logps in Triton: against the definition in float64, in tiny shapes interpreted and in real ones on a GPU."""

from __future__ import annotations

import pytest
import torch

from saelab_kernels.logps import reference, token_logps

pytestmark = pytest.mark.fused

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: beyond one tile in both directions, and narrower than one
SHAPES = [(1, 1, 1), (7, 33, 129), (33, 129, 7), (130, 48, 300), (129, 7, 33)]
INF, NAN = float("inf"), float("nan")


def problem(n_tokens: int, width: int, n_vocabulary: int, dtype: torch.dtype, device: str):
    hidden, W_U = torch.randn(n_tokens, width), torch.randn(n_vocabulary, width) / width**0.25
    targets = torch.randint(n_vocabulary, (n_tokens,))
    return hidden.to(device, dtype), W_U.to(device, dtype), targets.to(device)


def both(hidden: torch.Tensor, W_U: torch.Tensor, targets: torch.Tensor):
    """For the function and for the definition in float64: log-probabilities and both gradients, of a fixed loss."""
    weights = torch.linspace(-1, 2, len(hidden), dtype=torch.float64, device=hidden.device)
    results = []
    for function, dtype in ((token_logps, hidden.dtype), (reference.token_logps, torch.float64)):
        x, W = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, W_U))
        logps = function(x, W, targets)
        logps.backward(weights.to(logps.dtype))
        results.append((logps.detach(), x.grad, W.grad))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_tokens", "width", "n_vocabulary"), SHAPES)
def test_values_and_gradients_agree_with_the_definition(
    n_tokens, width, n_vocabulary, dtype, device, relative_rms, tolerance
):
    actual, expected = both(*problem(n_tokens, width, n_vocabulary, dtype, device))
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=2e-5)
    assert actual[0].dtype == torch.float32
    for found, wanted in zip(actual[1:], expected[1:], strict=True):
        assert found.dtype == dtype
        assert relative_rms(found, wanted) < 2 * tolerance[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_tokens", "width", "n_vocabulary"),
    [(4096, 576, 49152), (1000, 2304, 32001), (333, 1001, 5003), (20000, 64, 999)],
)
def test_values_and_gradients_agree_with_the_definition_at_real_sizes(
    n_tokens, width, n_vocabulary, dtype, device, relative_rms, tolerance
):
    actual, expected = both(*problem(n_tokens, width, n_vocabulary, dtype, device))
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=bound)
    for found, wanted in zip(actual[1:], expected[1:], strict=True):
        assert relative_rms(found, wanted) < max(1e-5, tolerance[dtype])


def test_two_runs_are_bitwise_equal(device):
    inputs = problem(130, 48, 300, torch.bfloat16, device)
    for first, second in zip(both(*inputs)[0], both(*inputs)[0], strict=True):
        assert torch.equal(first, second)


def test_several_slabs_and_stretches_give_the_same(device, monkeypatch, relative_rms):
    from saelab_kernels.logps import fused

    inputs = problem(150, 20, 300, torch.float32, device)
    monkeypatch.setattr(fused, "PROGRAMS", 6)  # two stretches, of three tiles and of two
    monkeypatch.setattr(fused, "MAX_ROWS", 70)
    monkeypatch.setattr(fused, "SLAB_BYTES", 70 * 4 * 100)
    actual, expected = both(*inputs)
    for found, wanted in zip(actual, expected, strict=True):
        assert relative_rms(found, wanted) < 2e-6


def test_huge_logits_do_not_overflow(device, relative_rms):
    hidden, W_U, targets = problem(7, 16, 100, torch.float32, device)
    actual, expected = both(1e4 * hidden, 1e3 * W_U, targets)
    assert relative_rms(actual[0], expected[0]) < 1e-6
    assert actual[1].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter, remarks on what is tested here
@pytest.mark.parametrize("where", [0, 99])
def test_infinities_and_nan_come_out_as_from_log_softmax(where, device):
    W_U = torch.ones(100, 1, device=device)
    hidden = torch.tensor([[1.0], [-1.0], [NAN], [2.0], [INF], [-INF]], device=device)
    targets = torch.tensor([where, where, 3, 3, 3, 3], device=device)
    for value in (INF, -INF, NAN):
        W_U[where] = value
        expected = reference.token_logps(hidden, W_U, targets)
        torch.testing.assert_close(token_logps(hidden, W_U, targets), expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("programs", [1, 6])  # the impossible ones within the one stretch, and a stretch of their own
def test_tiles_of_impossible_tokens_before_the_first_possible_one_change_nothing(programs, device, monkeypatch):
    from saelab_kernels.logps import fused

    monkeypatch.setattr(fused, "PROGRAMS", programs)
    hidden, W_U = torch.rand(7, 4, device=device), torch.rand(300, 4, device=device)
    targets = torch.randint(250, 300, (7,), device=device)
    W_U[:250] = -INF
    expected = reference.token_logps(hidden, W_U[250:], targets - 250)
    torch.testing.assert_close(token_logps(hidden, W_U, targets), expected)


def test_an_empty_batch_gives_no_values_and_zero_gradients(device):
    hidden, W_U, targets = problem(0, 4, 9, torch.float32, device)
    logps = token_logps(hidden, W_U.requires_grad_(), targets)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert not W_U.grad.any()


def test_a_target_outside_of_the_vocabulary_gives_nan_where_it_is_not_looked_at(device):
    from saelab_kernels.logps import fused

    hidden, W_U, _ = problem(3, 4, 9, torch.float32, device)
    found = fused.token_logps(hidden, W_U, torch.tensor([8, 9, -100], device=device))
    assert found.logps.isnan().tolist() == [False, True, True]
