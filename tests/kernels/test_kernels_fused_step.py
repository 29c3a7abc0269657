"""The Triton kernel of feature_step against its definition in float64, and Adam against torch's in float32."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from saelab_kernels import AdamSettings, Layer, RowGrads, SparseGrads, compiled, feature_step, pairs_by_feature
from saelab_kernels.step import reference

pytestmark = pytest.mark.fused

SHAPES = [(1, 1, 1, 1), (7, 33, 29, 5), (9, 70, 12, 12), (4, 5, 17, 2)]


@pytest.fixture
def fused(monkeypatch):
    """The module, with segments so short that busy features are cut."""
    monkeypatch.setattr(importlib.import_module("saelab_kernels.grads.fused"), "SEGMENT", 4)
    return importlib.import_module("saelab_kernels.step.fused")


class Problem:
    """A layer in the middle of training, its gradient in factors, and both in float64."""

    def __init__(self, n_tokens, width, n_features, k, device, *, dtype=torch.float32, extra=True, draw=torch.randn):
        def layer() -> Layer:
            shapes = ((n_features, width), (n_features, width), (n_features,), (width,))
            return Layer(*(torch.randn(*shape, device=device) for shape in shapes))

        weights = layer()
        self.layer = weights._replace(W_dec=F.normalize(weights.W_dec, dim=1))
        self.means = Layer(*(0.1 * part for part in layer()))
        self.squares = Layer(*(part.abs() for part in layer()))
        indices = torch.stack([torch.randperm(n_features)[:k] for _ in range(n_tokens)])
        rows = torch.randperm(n_features)[:3].to(device)
        self.sparse = SparseGrads(
            pairs_by_feature(indices.to(device), n_features),
            *(draw(n_tokens, k).to(device) for _ in range(2)),
            *(draw(n_tokens, width).to(dtype).to(device) for _ in range(2)),
            draw(n_features).to(device),
            draw(width).to(device),
            RowGrads(rows, *(draw(len(rows), width).to(device) for _ in range(2))) if extra else None,
        )

    def state(self, dtype=torch.float32) -> tuple[Layer, Layer, Layer]:
        return tuple(
            Layer(*(tensor.to(dtype, copy=True) for tensor in part)) for part in (self.layer, self.means, self.squares)
        )

    def wide_grads(self) -> SparseGrads:
        extra = self.sparse.extra
        if extra is not None:
            extra = RowGrads(extra.rows, extra.W_enc.double(), extra.W_dec.double())
        return SparseGrads(self.sparse.pairs, *(tensor.double() for tensor in self.sparse[1:7]), extra)


def flat(state: tuple[Layer, Layer, Layer]) -> list[torch.Tensor]:
    return [tensor for part in state for tensor in part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_agrees_with_float64(shape, unit_norm, clip_norm, dtype, device, fused, relative_rms, tolerance):
    check_step(shape, unit_norm, clip_norm, dtype, device, fused, relative_rms, tolerance[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(
    "shape", [(1024, 768, 16_384, 32), (1024, 2304, 8192, 64), (256, 4096, 4096, 20), (99, 1000, 999, 9)]
)
def test_a_step_agrees_with_float64_at_real_size(shape, clip_norm, dtype, device, fused, relative_rms):
    check_step(shape, True, clip_norm, dtype, device, fused, relative_rms, 3e-6)


def check_step(shape, unit_norm, clip_norm, dtype, device, fused, relative_rms, tolerance):
    problem = Problem(*shape, device, dtype=dtype, extra=unit_norm)
    adam = AdamSettings(lr=1e-2, step=7, clip_norm=clip_norm, unit_norm=unit_norm)
    right, ours, again = problem.state(torch.float64), problem.state(), problem.state()
    right_norm = reference.feature_step(*right, problem.wide_grads(), adam)
    norm = fused.feature_step(*ours, problem.sparse, adam)
    assert relative_rms(norm, right_norm) < tolerance
    for tensor, expected in zip(flat(ours), flat(right), strict=True):
        assert relative_rms(tensor, expected) < tolerance
    fused.feature_step(*again, problem.sparse, adam)
    assert all(map(torch.equal, flat(ours), flat(again)))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95)])
def test_adam_is_torchs_within_two_units_in_the_last_place(betas, device, fused):
    """Of the larger of old and new value, with gradients that need no rounding, so that both compute from the same.

    Weights stay away from 0: there the last place of a weight is far below that of the step that led to it.
    """
    problem = Problem(7, 33, 29, 5, device, draw=lambda *shape: torch.randint(-8, 9, shape).float())
    problem.layer = Layer(*(weight + 0.5 * weight.sign() for weight in problem.layer))
    adam = AdamSettings(lr=1e-3, step=3, betas=betas, unit_norm=False)
    ours, theirs = problem.state(), problem.state()
    fused.feature_step(*ours, problem.sparse, adam)
    optimizer = torch.optim.Adam(theirs[0], lr=adam.lr, betas=betas, eps=adam.eps, foreach=False)
    for weight, mean, square, grad in zip(*theirs, reference.written_out(problem.sparse), strict=True):
        weight.grad = grad
        optimizer.state[weight] = {"step": torch.tensor(2.0), "exp_avg": mean, "exp_avg_sq": square}
    optimizer.step()
    for tensor, expected, before in zip(flat(ours), flat(theirs), flat(problem.state()), strict=True):
        size = torch.maximum(expected.abs(), before.abs())
        unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
        assert ((tensor - expected).abs() <= 2 * unit).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of 0 / 0 in masked lanes
def test_rows_of_the_decoder_keep_norm_1_and_without_eps_padding_is_no_trouble(device, fused):
    problem = Problem(7, 33, 29, 5, device)
    state = problem.state()
    fused.feature_step(*state, problem.sparse, AdamSettings(lr=0.5, step=1, eps=0.0))
    torch.testing.assert_close(state[0].W_dec.norm(dim=1), torch.ones(29, device=device), rtol=1e-6, atol=0)
    assert not torch.equal(state[0].W_dec, problem.layer.W_dec)


def test_features_that_did_not_fire_follow_their_momentum(device, fused):
    problem = Problem(2, 6, 40, 3, device, extra=False)
    idle = problem.sparse.pairs.starts.diff() == 0
    state = problem.state()
    fused.feature_step(*state, problem.sparse, AdamSettings(lr=1e-2, step=7))
    torch.testing.assert_close(state[1].W_dec[idle], 0.9 * problem.means.W_dec[idle])
    torch.testing.assert_close(state[2].W_enc[idle], 0.999 * problem.squares.W_enc[idle])
    assert (state[0].W_enc[idle] != problem.layer.W_enc[idle]).all()


def test_a_row_of_zeros_stays_one(device, fused):
    problem = Problem(2, 6, 40, 3, device, extra=False)
    idle = int((problem.sparse.pairs.starts.diff() == 0).nonzero()[0])
    state = problem.state()
    for part in state:
        part.W_dec[idle] = 0.0
    fused.feature_step(*state, problem.sparse, AdamSettings(lr=1e-2, step=7))
    assert not state[0].W_dec[idle].any()


def test_copies_hold_the_new_weights_rounded(device, fused):
    problem = Problem(7, 33, 29, 5, device)
    copies = tuple(torch.empty(29, 33, dtype=torch.bfloat16, device=device) for _ in range(2))
    state = problem.state()
    fused.feature_step(*state, problem.sparse, AdamSettings(lr=1e-2, step=7), copies=copies)
    for copy, weight in zip(copies, state[0], strict=False):
        if compiled.INTERPRETED:  # the interpreter cuts bits off instead of rounding
            assert (copy - weight).abs().le(2**-7 * weight.abs()).all()
        else:
            assert torch.equal(copy, weight.bfloat16())


def test_not_a_number_spoils_the_features_of_its_token_only(device, fused):
    problem = Problem(3, 6, 40, 2, device, extra=False)
    problem.sparse.recon_grad[1] = float("nan")
    pairs, state = problem.sparse.pairs, problem.state()
    norm = fused.feature_step(*state, problem.sparse, AdamSettings(lr=1e-2, step=7))
    spoilt = torch.zeros(40, dtype=torch.bool, device=device)
    for feature in range(40):
        spoilt[feature] = bool((pairs.tokens[pairs.starts[feature] : pairs.starts[feature + 1]] == 1).any())
    assert norm.isnan()
    assert spoilt.any()
    assert torch.equal(state[0].W_dec.isnan().any(1), spoilt)
    assert not state[0].W_enc.isnan().any()


def test_the_public_step_takes_this_path(device, relative_rms, tolerance):
    problem = Problem(7, 33, 29, 5, device)
    adam = AdamSettings(lr=1e-2, step=7)
    right, ours = problem.state(torch.float64), problem.state()
    reference.feature_step(*right, problem.wide_grads(), adam)
    feature_step(*ours, problem.sparse, adam)
    for tensor, expected in zip(flat(ours), flat(right), strict=True):
        assert relative_rms(tensor, expected) < tolerance[torch.float32]


def test_float64_takes_the_reference(device, fused):
    problem = Problem(7, 33, 29, 5, device)
    adam = AdamSettings(lr=1e-2, step=7)
    right, ours = problem.state(torch.float64), problem.state(torch.float64)
    reference.feature_step(*right, problem.wide_grads(), adam)
    fused.feature_step(*ours, problem.wide_grads(), adam)
    assert all(map(torch.equal, flat(ours), flat(right)))


def test_weights_that_are_not_feature_major_in_memory_are_refused(device, fused):
    problem = Problem(7, 33, 29, 5, device)
    layer, means, squares = problem.state()
    turned = layer._replace(W_enc=layer.W_enc.T.contiguous().T)
    with pytest.raises(ValueError, match="contiguous"):
        fused.feature_step(turned, means, squares, problem.sparse, AdamSettings(lr=1e-2, step=7))
