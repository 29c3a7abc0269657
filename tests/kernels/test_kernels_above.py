"""encode_above, encode_batchtopk, encode_jumprelu: the tuned search finds exactly what the definitions say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import saelab_kernels
from saelab_kernels import encode_above, encode_batchtopk, encode_jumprelu, ragged_decode
from saelab_kernels.above import cpu
from saelab_kernels.dots.cpu import sampled_dot
from saelab_kernels.jumprelu import reference as jumprelu_reference

SHAPES = [(1, 1, 1), (1, 33, 129), (7, 33, 300), (64, 48, 1000), (5, 16, 41), (33, 7, 65)]


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")


@pytest.fixture(params=["bfloat16", "float32"])
def candidates_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Candidates found in either precision, whatever this CPU is faster in."""
    monkeypatch.setattr(cpu.dispatch, "candidate_gemm", lambda: saelab_kernels.Choice(request.param, "for the test"))
    return request.param


def layer(n_tokens: int, width: int, n_features: int, *, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, width, generator=generator, dtype=dtype)
    W = F.normalize(torch.randn(n_features, width, generator=generator, dtype=dtype), dim=1)
    return x, W, 0.1 * torch.randn(n_features, generator=generator, dtype=dtype)


def every_pre_act(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The float32 dot products that the tuned path is defined by, [N, F]."""
    return sampled_dot(x, W, torch.arange(len(W)).expand(len(x), -1).contiguous()) + b


def assert_is_above(found, pre_acts: torch.Tensor, floor: torch.Tensor) -> None:
    tokens, features = (~(pre_acts <= floor)).nonzero(as_tuple=True)
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.features, features)
    torch.testing.assert_close(found.acts, pre_acts[tokens, features], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n_tokens", "width", "n_features"), SHAPES)
@pytest.mark.parametrize("height", [-0.5, 0.0, 1.0, 100.0])
def test_every_pair_above_its_floor_is_found_exactly(n_tokens, width, n_features, height, candidates_in):
    x, W, b = layer(n_tokens, width, n_features)
    floor = height + 0.3 * torch.randn(n_features)
    assert_is_above(encode_above(x, W, b, floor), every_pre_act(x, W, b), floor)


def test_a_pre_activation_equal_to_its_floor_is_not_above_it(candidates_in):
    x, W, b = torch.eye(4), torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4)
    found = encode_above(x, W, b, torch.tensor([1.0, 1.0, 3.0, 3.0]))
    assert found.features.tolist() == [1, 3]
    assert found.acts.tolist() == [2.0, 4.0]


def test_floors_finer_than_bfloat16_are_decided_in_float32(candidates_in):
    x, W, b = layer(40, 24, 512)
    pre_acts = every_pre_act(x, W, b)
    for shift in (0, 1, 2):
        # each feature's floor is the pre-activation of one of the tokens, or one float above or below it
        floor = pre_acts[torch.arange(512) % 40, torch.arange(512)]
        floor = torch.nextafter(floor, floor + (shift - 1)) if shift != 1 else floor
        assert_is_above(encode_above(x, W, b, floor), pre_acts, floor)


def test_a_token_finds_the_same_pairs_alone_and_in_any_batch(candidates_in, monkeypatch):
    x, W, b = layer(50, 32, 400)
    floor = torch.full((400,), 1.5)
    together = encode_above(x, W, b, floor)
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 4 * 400 * 3)
    in_blocks = encode_above(x, W, b, floor)
    alone = [encode_above(row[None], W, b, floor) for row in x]
    for field in ("acts", "features"):
        assert torch.equal(getattr(together, field), getattr(in_blocks, field))
        assert torch.equal(getattr(together, field), torch.cat([getattr(part, field) for part in alone]))


def test_a_slack_that_proves_too_narrow_is_widened_until_nothing_is_missed(monkeypatch):
    monkeypatch.setattr(cpu.dispatch, "candidate_gemm", lambda: saelab_kernels.Choice("bfloat16", "for the test"))
    monkeypatch.setattr(cpu, "_sampled_unit", lambda *_: 1e-9)
    x, W, b = layer(64, 48, 1000)
    floor = torch.full((1000,), 0.7)
    assert_is_above(encode_above(x, W, b, floor), every_pre_act(x, W, b), floor)
    monkeypatch.setattr(cpu, "_ATTEMPTS", 1)  # now every pair is rescored
    assert_is_above(encode_above(x, W, b, floor), every_pre_act(x, W, b), floor)


def test_a_nan_is_above_every_floor_and_spoils_only_its_token(candidates_in):
    x, W, b = layer(9, 16, 60)
    floor = torch.ones(60)
    clean = encode_above(x, W, b, floor)
    x[4, 3] = torch.nan
    found = encode_above(x, W, b, floor)
    assert (found.tokens == 4).sum() == 60
    assert found.acts[found.tokens == 4].isnan().all()
    assert torch.equal(found.acts[found.tokens != 4], clean.acts[clean.tokens != 4])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_and_floors_that_are_not_finite_follow_the_definition(value, candidates_in):
    x, W, b = layer(6, 8, 30)
    floor = torch.zeros(30)
    W[3, 2], floor[5] = value, value
    assert_is_above(encode_above(x, W, b, floor), every_pre_act(x, W, b), floor)


def test_no_token_and_no_pair_are_fine():
    x, W, b = layer(5, 8, 30)
    nothing = encode_above(x[:0], W, b, torch.zeros(30))
    assert nothing.offsets.tolist() == [0]
    nowhere = encode_above(x, W, b, torch.full((30,), 1e6))
    assert nowhere.offsets.tolist() == [0] * 6
    assert not len(nowhere.acts)
    assert torch.equal(ragged_decode(nowhere, W), torch.zeros(5, 8))


def test_shapes_that_do_not_fit_are_refused():
    x, W, b = layer(5, 8, 30)
    with pytest.raises(ValueError, match=r"floor must have shape \[30\], got \[29\]"):
        encode_above(x, W, b, torch.zeros(29))
    with pytest.raises(ValueError, match="x must have shape"):
        encode_above(x[:, 1:], W, b, torch.zeros(30))
    with pytest.raises(ValueError, match="bandwidth must not be negative"):
        encode_jumprelu(x, W, b, torch.zeros(30), bandwidth=-1.0)
    with pytest.raises(ValueError, match="k must be between 1"):
        encode_batchtopk(x, W, b, 31)


# ---- BatchTopK


@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), [(1, 5, 9, 2), (7, 33, 300, 5), (64, 48, 1000, 16)])
def test_batchtopk_keeps_the_largest_of_the_batch(n_tokens, width, n_features, k, candidates_in):
    x, W, b = layer(n_tokens, width, n_features)
    pre_acts = every_pre_act(x, W, b)
    smallest = pre_acts.flatten().topk(k * n_tokens).values[-1]
    found = encode_batchtopk(x, W, b, k)
    assert len(found.acts) == k * n_tokens
    assert_is_above(found, pre_acts, torch.nextafter(smallest, -torch.ones(())).expand(n_features))


def test_batchtopk_finds_them_where_its_sample_of_tokens_misleads(candidates_in):
    x, W, b = layer(640, 24, 200)
    x[::10] *= 30  # every tenth token, which is all that the sample sees
    pre_acts = every_pre_act(x, W, b)
    smallest = pre_acts.flatten().topk(8 * 640).values[-1]
    found = encode_batchtopk(x, W, b, 8)
    assert_is_above(found, pre_acts, torch.nextafter(smallest, -torch.ones(())).expand(200))


def test_batchtopk_keeps_no_negative_value_and_all_that_tie_for_the_last_place():
    few = encode_batchtopk(torch.ones(3, 2), torch.tensor([[1.0, 0], [-1, 0], [0, -1]]), torch.zeros(3), 2)
    assert few.features.tolist() == [0, 0, 0]
    tied = encode_batchtopk(torch.ones(4, 1), torch.tensor([[1.0], [1.0], [0.5]]), torch.zeros(3), 1)
    assert tied.features.tolist() == [0, 1] * 4


# ---- JumpReLU


def test_jumprelu_passes_what_exceeds_its_threshold_whole(candidates_in):
    x, W, b = layer(30, 24, 200)
    threshold = torch.rand(200) * 2 - 0.2  # a negative one works as 0
    found = encode_jumprelu(x, W, b, threshold)
    pre_acts = every_pre_act(x, W, b)
    assert_is_above(found.active, pre_acts, threshold.clamp_min(0))
    assert (found.step == 1).all()


def test_the_threshold_gets_the_straight_through_gradient_of_all_pairs_near_it(candidates_in):
    x, W, b = layer(30, 24, 200)
    threshold = (torch.rand(200) + 0.5).requires_grad_()
    found = encode_jumprelu(x, W, b, threshold, bandwidth=0.3)
    acts_weight, step_weight = torch.randn(30, 200), torch.randn(30, 200)
    at = found.active.tokens, found.active.features
    (found.active.acts * acts_weight[at] + found.step * step_weight[at]).sum().backward()
    expected = jumprelu_reference.threshold_grad(x, W, b, threshold.detach(), acts_weight, step_weight, bandwidth=0.3)
    torch.testing.assert_close(threshold.grad, expected, rtol=1e-4, atol=1e-4)
    assert (found.step == 0).any()
    assert (found.active.acts[found.step == 0] == 0).all()


@pytest.mark.parametrize("encode", ["above", "batchtopk", "jumprelu"])
def test_gradients_agree_with_the_definition(encode, monkeypatch):
    def gradients(path: str, dtype: torch.dtype) -> list[torch.Tensor]:
        monkeypatch.setenv("SAELAB_KERNELS", path)
        x, W, b = (tensor.to(dtype).requires_grad_() for tensor in layer(20, 24, 200))
        active = {
            "above": lambda: encode_above(x, W, b, torch.full((200,), 0.5, dtype=dtype)),
            "batchtopk": lambda: encode_batchtopk(x, W, b, 6),
            "jumprelu": lambda: encode_jumprelu(x, W, b, torch.full((200,), 0.5, dtype=dtype)).active,
        }[encode]()
        recon = ragged_decode(active, W, torch.arange(24, dtype=dtype))
        (recon - x).pow(2).sum().backward()
        return [recon.detach(), x.grad, W.grad, b.grad]

    tuned, defined = gradients("cpu", torch.float32), gradients("reference", torch.float64)
    for ours, theirs in zip(tuned, defined, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
