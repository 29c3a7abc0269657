"""token_logps: log-probabilities of given tokens from tiles of the vocabulary, as good as from all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saelab_kernels import Choice
from saelab_kernels.logps import cpu, reference, token_logps

SHAPES = [(1, 1, 1), (1, 33, 129), (7, 5, 1), (7, 33, 1000), (129, 48, 33), (33, 7, 130)]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in both directions, the last ones smaller than the others."""
    monkeypatch.setattr(cpu, "MAX_ROWS", 5)
    monkeypatch.setattr(cpu, "TILE_BYTES", 5 * 17 * 4)


def problem(n_tokens: int, width: int, n_vocabulary: int, dtype: torch.dtype = torch.float32):
    hidden, W_U = torch.randn(n_tokens, width), torch.randn(n_vocabulary, width)
    return hidden.to(dtype), W_U.to(dtype), torch.randint(n_vocabulary, (n_tokens,))


def both(hidden: torch.Tensor, W_U: torch.Tensor, targets: torch.Tensor):
    """For the function and for the definition in float64: log-probabilities and both gradients, of a random loss."""
    weights = torch.randn(len(hidden), dtype=torch.float64)
    results = []
    for function, dtype in ((token_logps, hidden.dtype), (reference.token_logps, torch.float64)):
        x, W = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, W_U))
        logps = function(x, W, targets)
        logps.backward(weights.to(logps.dtype))
        results.append((logps.detach(), x.grad, W.grad))
    return results


def test_uniform_and_certain_predictions_by_hand():
    targets = torch.tensor([3, 0])
    uniform = token_logps(torch.zeros(2, 4), torch.randn(10, 4), targets)
    torch.testing.assert_close(uniform, torch.full((2,), -torch.log(torch.tensor(10.0)).item()))
    certain = token_logps(1000 * torch.eye(10)[targets], torch.eye(10), targets)
    assert certain.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tiles", ["one", "many"])
@pytest.mark.parametrize(("n_tokens", "width", "n_vocabulary"), SHAPES)
def test_values_and_gradients_agree_with_the_definition_in_float64(
    n_tokens, width, n_vocabulary, tiles, request, relative_rms
):
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    actual, expected = both(*problem(n_tokens, width, n_vocabulary))
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=1e-5)
    for found, wanted in zip(actual[1:], expected[1:], strict=True):
        assert relative_rms(found, wanted) < 2e-6 or wanted.abs().max() < 1e-12


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.parametrize("tiles", ["one", "many"])
def test_bfloat16_weights_give_float32_values(tiles, products, request, relative_rms, monkeypatch):
    monkeypatch.setattr(cpu.dispatch, "candidate_gemm", lambda: Choice(products, "for the test"))
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    hidden, W_U, targets = problem(64, 48, 300, torch.bfloat16)
    hidden[::2] = 2 * W_U[targets[::2]]  # sure of half of them, with logits of about 100
    actual, expected = both(hidden, W_U, targets)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=5e-5)  # the bound for bfloat16: 2e-2
    for found, wanted in zip(actual[1:], expected[1:], strict=True):
        assert relative_rms(found, wanted) < 4e-3


def test_the_gradient_agrees_with_finite_differences(small_tiles):
    hidden, W_U, targets = problem(7, 4, 40, torch.float64)

    def logps(hidden, W_U):
        return token_logps(hidden, W_U, targets)

    assert torch.autograd.gradcheck(logps, (hidden.requires_grad_(), W_U.requires_grad_()))
    assert torch.autograd.gradcheck(logps, (hidden.detach(), W_U))
    assert torch.autograd.gradcheck(logps, (hidden, W_U.detach()))


def test_probabilities_of_all_tokens_sum_to_one(small_tiles):
    hidden, W_U, _ = problem(1, 33, 130)
    logps = token_logps(hidden.expand(130, -1), W_U, torch.arange(130))
    assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_huge_logits_do_not_overflow(small_tiles, relative_rms):
    hidden, W_U, targets = problem(33, 16, 100)
    actual, expected = both(1e4 * hidden, 1e3 * W_U, targets)
    assert actual[0].isfinite().all()
    assert actual[1].isfinite().all()
    assert relative_rms(actual[0], expected[0]) < 1e-6


@pytest.mark.parametrize("tiles", ["one", "many"])
@pytest.mark.parametrize("where", [0, 99])
def test_infinities_and_nan_come_out_as_from_log_softmax(where, tiles, request):
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    W_U = torch.ones(100, 1)
    hidden = torch.tensor([[1.0], [-1.0], [NAN], [2.0], [INF], [-INF]])
    targets = torch.tensor([where, where, 3, 3, 3, 3])
    for value in (INF, -INF, NAN):
        W_U[where] = value
        expected = reference.token_logps(hidden, W_U, targets)
        torch.testing.assert_close(token_logps(hidden, W_U, targets), expected, equal_nan=True)
    every = torch.full((100, 1), -INF)
    assert token_logps(torch.ones(1, 1), every, torch.tensor([3])).isnan().all()


def test_tiles_of_impossible_tokens_before_the_first_possible_one_change_nothing(small_tiles):
    hidden, W_U, targets = torch.rand(7, 4), torch.rand(60, 4), torch.randint(50, 60, (7,))
    W_U[:50] = -INF
    expected = reference.token_logps(hidden, W_U[50:], targets - 50)
    torch.testing.assert_close(token_logps(hidden, W_U, targets), expected)


def test_nan_in_one_token_spoils_that_token_and_the_weights_alone():
    hidden, W_U, targets = problem(7, 5, 30)
    hidden[2, 1] = NAN
    (logps, hidden_grad, W_grad), _ = both(hidden, W_U, targets)
    assert logps.isnan().nonzero().flatten().tolist() == [2]
    assert hidden_grad.isnan().all(1).nonzero().flatten().tolist() == [2]
    assert W_grad.isnan().all()


def test_an_empty_batch_gives_no_values_and_zero_gradients():
    hidden, W_U, targets = torch.empty(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True), torch.empty(0)
    logps = token_logps(hidden, W_U, targets.long())
    assert logps.shape == (0,)
    logps.sum().backward()
    assert not W_U.grad.any()


def test_gradients_of_many_parts_of_tokens_add_up_in_float32(small_tiles, relative_rms):
    actual, expected = both(*problem(700, 8, 20, torch.bfloat16))
    assert relative_rms(actual[2], expected[2]) < 4e-3


@pytest.mark.parametrize("asked", ["auto", "cpu", "reference"])
def test_every_path_gives_the_same(asked, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", asked)
    actual, expected = both(*problem(7, 33, 130))
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_two_runs_are_bitwise_equal(small_tiles):
    hidden, W_U, targets = problem(33, 16, 100)
    for _ in range(2):
        torch.manual_seed(1)
        first, _ = both(hidden, W_U, targets)
        torch.manual_seed(1)
        second, _ = both(hidden, W_U, targets)
        for left, right in zip(first, second, strict=True):
            assert torch.equal(left, right)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor but those of as many entries as W_U: its views and its gradient."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self.bytes, self.allowed = 0, allowed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() != self.allowed:
                self.bytes = max(self.bytes, tensor.numel() * tensor.itemsize)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_size_of_a_real_vocabulary_no_tensor_is_as_large_as_the_logits(dtype, relative_rms):
    n_tokens, width, n_vocabulary = 256, 576, 49152
    hidden, targets = torch.randn(n_tokens, width).to(dtype), torch.randint(n_vocabulary, (n_tokens,))
    W_U = (0.1 * torch.randn(n_vocabulary, width)).to(dtype)
    hidden[::2] += 3 * W_U[targets[::2]]
    x, W = hidden.clone().requires_grad_(), W_U.clone().requires_grad_()
    with Largest(W_U.numel()) as largest:
        logps = token_logps(x, W, targets)
        logps.sum().backward()
    assert largest.bytes < 4 * n_tokens * n_vocabulary / 4
    y, V = hidden.float().requires_grad_(), W_U.float().requires_grad_()
    with Largest(W_U.numel()) as whole:
        expected = -F.cross_entropy(y @ V.T, targets, reduction="none")
        expected.sum().backward()
    assert whole.bytes == 4 * n_tokens * n_vocabulary  # the measure sees what it is to see
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    assert relative_rms(x.grad, y.grad) < bound
    assert relative_rms(W.grad, V.grad) < bound


@pytest.mark.parametrize(
    ("replaced", "error", "sentence"),
    [
        ({2: torch.tensor([0, 30])}, ValueError, r"targets must lie in 0..29, got 0..30"),
        ({2: torch.tensor([-100, 3])}, ValueError, r"got -100..3; there is no index to ignore"),
        ({2: torch.tensor([1, 2, 3])}, ValueError, r"targets must have shape \[2\], got \[3\]"),
        ({2: torch.tensor([1, 2], dtype=torch.int32)}, TypeError, "targets must be int64"),
        ({1: torch.ones(30, 6)}, ValueError, r"hidden must have shape \[any, 6\], got \[2, 5\]"),
        ({1: torch.ones(0, 5)}, ValueError, "at least one row"),
        ({0: torch.ones(2, 5, dtype=torch.int64)}, TypeError, "hidden must be a floating-point tensor"),
    ],
)
def test_bad_arguments_are_named(replaced, error, sentence):
    inputs = [torch.ones(2, 5), torch.ones(30, 5), torch.tensor([0, 1])]
    for place, value in replaced.items():
        inputs[place] = value
    with pytest.raises(error, match=sentence):
        token_logps(*inputs)
