"""encode_topk: the tuned path finds exactly the top k of float32 dot products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import saelab_kernels
from saelab_kernels import encode_topk
from saelab_kernels.dots.cpu import sampled_dot
from saelab_kernels.encode import cpu

SHAPES = [
    (1, 1, 1, 1),
    (1, 33, 129, 5),
    (7, 33, 300, 5),
    (64, 48, 1000, 32),
    (3, 8, 40, 40),
    (5, 16, 41, 40),
    (9, 4, 65, 32),
]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")


@pytest.fixture(params=DTYPES, ids=str)
def candidates_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Candidates found in either precision, whatever this CPU is faster in."""
    name = str(request.param).removeprefix("torch.")
    monkeypatch.setattr(cpu.dispatch, "candidate_gemm", lambda: saelab_kernels.Choice(name, "for the test"))
    return request.param


def layer(n_tokens: int, width: int, n_features: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, width, generator=generator, dtype=dtype)
    W = F.normalize(torch.randn(n_features, width, generator=generator, dtype=dtype), dim=1)
    return x, W, 0.1 * torch.randn(n_features, generator=generator, dtype=dtype)


def exact_order(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor):
    """All float32 pre-activations as the tuned path defines them, each row sorted; equal values by ascending index."""
    every = torch.arange(len(W)).expand(len(x), -1)
    pre_acts = sampled_dot(x, W, every.contiguous()) + b
    return pre_acts.sort(dim=1, descending=True, stable=True)


@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_the_k_largest_are_found_exactly_in_either_precision(n_tokens, width, n_features, k, candidates_in):
    x, W, b = layer(n_tokens, width, n_features)
    top = encode_topk(x, W, b, k, relu=False)
    values, indices = exact_order(x, W, b)
    assert torch.equal(top.top_indices, indices[:, :k])
    assert torch.equal(top.top_acts, values[:, :k])


@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_the_tuned_path_agrees_with_float64(n_tokens, width, n_features, k, candidates_in, monkeypatch):
    x, W, b = layer(n_tokens, width, n_features)
    top = encode_topk(x, W, b, k)
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    expected = encode_topk(x.double(), W.double(), b.double(), k)
    torch.testing.assert_close(top.top_acts.double(), expected.top_acts, rtol=1e-5, atol=1e-6)
    assert (top.top_indices == expected.top_indices).double().mean() > 0.99  # the rest are swaps within rounding


def test_a_bias_that_bfloat16_cannot_resolve_is_still_decided_exactly(candidates_in):
    x, W, _ = layer(16, 24, 512)
    b = 1000 + torch.linspace(0, 1, 512)  # spacing of bfloat16 near 1000: 4
    top = encode_topk(x, W, b, 8)
    _values, indices = exact_order(x, W, b)
    assert torch.equal(top.top_indices, indices[:, :8])


def test_negative_pre_activations_are_ranked_and_then_cut_by_the_relu(candidates_in):
    x, W, b = layer(20, 16, 600)
    _values, indices = exact_order(x, W, b - 50)
    signed = encode_topk(x, W, b - 50, 12, relu=False)
    assert (signed.top_acts < 0).all()
    assert torch.equal(signed.top_indices, indices[:, :12])
    assert not encode_topk(x, W, b - 50, 12).top_acts.any()


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("n_features", [40, 700])
def test_ties_go_to_the_lower_index(path, n_features, candidates_in, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    x, W, b = torch.zeros(3, 8), torch.randn(n_features, 8), torch.zeros(n_features)
    b[[5, 17]] = 1.0
    top = encode_topk(x, W, b, 6)
    assert top.top_indices.tolist() == [[5, 17, 0, 1, 2, 3]] * 3
    W[20:] = W[19]  # most features are one and the same
    top = encode_topk(torch.randn(4, 8), W, torch.zeros(n_features), n_features // 2, relu=False)
    for indices, acts in zip(top.top_indices.tolist(), top.top_acts.tolist(), strict=True):
        assert indices == [i for _, i in sorted(zip((-a for a in acts), indices, strict=True))]


def test_a_token_does_not_depend_on_its_batch_and_two_runs_are_bitwise_equal(candidates_in):
    x, W, b = layer(40, 48, 1000)
    whole, again = encode_topk(x, W, b, 16), encode_topk(x, W, b, 16)
    alone = [encode_topk(row[None], W, b, 16) for row in x]
    for i in range(2):
        assert torch.equal(whole[i], again[i])
        assert torch.equal(whole[i], torch.cat([top[i] for top in alone]))


def test_blocks_and_chunks_change_nothing(candidates_in, monkeypatch):
    x, W, b = layer(50, 20, 400)
    whole = encode_topk(x, W, b, 8)
    for name in ("_BLOCK_BYTES", "_CHUNK_BYTES", "_MAX_PAIRS"):
        monkeypatch.setattr(cpu, name, 6000)
    split = encode_topk(x, W, b, 8)
    assert torch.equal(whole.top_acts, split.top_acts)
    assert torch.equal(whole.top_indices, split.top_indices)


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(path, bad, candidates_in, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    x, W, b = layer(6, 16, 500)
    good = encode_topk(x, W, b, 7)
    x[2, 3] = bad
    top = encode_topk(x, W, b, 7)
    assert not top.top_acts[2].isfinite().any()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(top.top_acts[rest], good.top_acts[rest])


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_is_not_a_number_reaches_every_token(path, sign, candidates_in, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    x, W, b = layer(6, 16, 500)
    W[123, 4] = sign * torch.tensor(float("nan"))
    assert encode_topk(x, W, b, 7).top_acts.isnan().any(1).all()


def test_half_precision_inputs_are_computed_in_float32():
    x, W, b = layer(5, 16, 300)
    top = encode_topk(x.bfloat16(), W, b, 4)
    assert top.top_acts.dtype == torch.float32
    assert torch.equal(top.top_acts, encode_topk(x.bfloat16().float(), W, b, 4).top_acts)


def test_an_empty_batch_gives_an_empty_result():
    _, W, b = layer(1, 16, 300)
    top = encode_topk(torch.empty(0, 16), W, b, 4)
    assert top.top_acts.shape == top.top_indices.shape == (0, 4)


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_pass_gradcheck(relu):
    x, W, b = (t.requires_grad_() for t in layer(4, 6, 30, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *args: encode_topk(*args, 5, relu=relu).top_acts, (x, W, b))


def test_gradients_agree_with_dense_autograd_in_float64(monkeypatch):
    x, W, b = layer(30, 33, 400)
    weights = torch.randn(30, 16)
    grads = []
    for path, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, W, b)]
        (encode_topk(*leaves, 16).top_acts * weights).sum().backward()
        grads.append([leaf.grad.double() for leaf in leaves])
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_integers_sort_as_the_floats_they_come_from():
    for dtype in DTYPES:
        special = torch.tensor([0.0, float("inf"), -float("inf"), 1e-30, -1e-30])
        floats = torch.cat([torch.randn(500), special]).to(dtype)
        codes = cpu._sortable(cpu._bits(floats))
        assert torch.equal(floats[torch.from_numpy(codes).long().argsort()], floats.sort().values)
        assert torch.equal(torch.from_numpy(cpu._sortable(codes)).view(dtype), floats)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"k": 0}, ValueError, "k must be between 1"),
        ({"k": 301}, ValueError, "k must be between 1 and the number of features 300, got 301"),
        ({"x": torch.ones(2, 15)}, ValueError, r"x must have shape \[any, 16\], got \[2, 15\]"),
        ({"x": torch.ones(2, 16, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"b": torch.ones(3)}, ValueError, r"b must have shape \[300\]"),
    ],
)
def test_bad_arguments_are_named(arguments, error, sentence):
    x, W, b = layer(2, 16, 300)
    with pytest.raises(error, match=sentence):
        encode_topk(**({"x": x, "W": W, "b": b, "k": 4} | arguments))


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_nan_pre_activations_tie_to_the_lower_index_too(path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    x, W, b = layer(2, 4, 1300)
    b[::3] = torch.nan
    top = encode_topk(x, W, b, 30, relu=False)
    assert top.top_indices[0].tolist() == list(range(0, 90, 3))
    assert top.top_acts.isnan().all()
