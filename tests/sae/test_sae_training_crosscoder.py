"""Crosscoders: loss and gradient by hand, their likeness to an SAE on the slots side by side, exclusive features."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.sae import crosscoder
from saelab.sae.architectures import new_sae
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.crosscoder import CrosscoderConfig, relative_decoder_norms
from saelab.sae.relu import ReLUConfig
from saelab.train.optim import OptimConfig, adam, set_lr_
from saelab_kernels.revive import packed

D_IN, D_SAE = 12, 200
DEAD = torch.arange(D_SAE) % 5 == 0
CONFIGS = [
    CrosscoderConfig(d_sae=D_SAE, k=6),
    CrosscoderConfig(d_sae=D_SAE, k=6, n_slots=3, n_exclusive=20),
    CrosscoderConfig(d_sae=D_SAE, sparsity="l1", l1_coefficient=0.3),
    CrosscoderConfig(d_sae=D_SAE, sparsity="l1", l1_coefficient=0.3, n_slots=3, n_exclusive=20),
]


def named(config: CrosscoderConfig) -> str:
    return config.sparsity + ("_exclusive" if config.n_exclusive else "")


@pytest.fixture(autouse=True)
def _float32_revival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.dispatch, "bfloat16_units", lambda _: False)


def make(config, *, d_in: int = D_IN):
    """With decoder norms of 0.5 to 1.5 that differ between slots."""
    sae = new_sae(config, d_in=d_in, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, sae.b_dec.numel()).view_as(sae.b_dec))
        sae.b_enc.copy_(torch.linspace(-0.1, 0.1, len(sae.b_enc)))
        if isinstance(config, CrosscoderConfig):
            sae.W_dec.mul_(0.5 + torch.rand(sae.W_dec.shape[:2], generator=torch.Generator().manual_seed(5))[..., None])
    return sae


def by_hand(sparsity: str):
    """Two features for two slots of width 1: the first reads and writes both, the second the second alone."""
    config = CrosscoderConfig(
        d_sae=2, k=1, sparsity=sparsity, l1_coefficient=0.5, l1_warmup_share=0.1, aux_coefficient=0.0
    )
    sae = new_sae(config, d_in=1).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[[1.0], [1.0]], [[0.0], [1.0]]]))
        sae.W_dec.copy_(torch.tensor([[[1.0], [0.5]], [[0.0], [-4.0]]]))
        sae.b_dec.copy_(torch.tensor([[1.0], [0.0]]))
    return sae, torch.tensor([[[3.0], [1.0]]], dtype=torch.float64)  # less b_dec (2, 1): pre-activations 3 and 1


def test_the_l1_loss_and_its_gradient_by_hand():
    sae, acts = by_hand("l1")
    losses = sae.training_loss(acts)
    # recon (3 + 1, 1.5 - 4) = (4, -2.5), error (1, -3.5); norms 1.5 and 4
    assert losses.reconstruction.item() == pytest.approx((1 + 3.5**2) / 2)
    assert losses.sparsity.item() == pytest.approx(0.5 * (3 * 1.5 + 1 * 4) / 2)
    assert sae.training_loss(acts, progress=0.05).sparsity.item() == pytest.approx(0.25 * (3 * 1.5 + 1 * 4) / 2)
    assert losses.l0.item() == 2.0
    losses.total.backward()
    # d total / d error = error (2 / 2 entries); of the penalty 0.25 n_j for f_j and 0.25 f_j along each slot's row
    f_grad = [1 * 1.0 - 3.5 * 0.5 + 0.25 * 1.5, -3.5 * -4 + 0.25 * 4]
    torch.testing.assert_close(sae.b_enc.grad, torch.tensor(f_grad).double())
    torch.testing.assert_close(
        sae.W_dec.grad[..., 0], torch.tensor([[3 * 1.0 + 0.75, 3 * -3.5 + 0.75], [1.0 + 0.0, -3.5 - 0.25]]).double()
    )
    torch.testing.assert_close(
        sae.encoder.grad[..., 0], torch.tensor([[2 * f_grad[0], f_grad[0]], [2 * f_grad[1], f_grad[1]]]).double()
    )
    through_encoder = torch.tensor([f_grad[0], f_grad[0] + f_grad[1]]).double()
    torch.testing.assert_close(sae.b_dec.grad[:, 0], torch.tensor([1.0, -3.5]).double() - through_encoder)


def test_batchtopk_keeps_what_is_largest_times_its_decoder_norms():
    sae, acts = by_hand("batchtopk")
    losses = sae.training_loss(acts)
    # 3 * 1.5 = 4.5 against 1 * 4: the first feature stays, recon (4, 1.5), error (1, 0.5)
    assert losses.fired.tolist() == [True, False]
    assert losses.total.item() == pytest.approx((1 + 0.25) / 2)
    assert sae.threshold.item() == 4.5
    losses.total.backward()
    f_grad = 1 * 1.0 + 0.5 * 0.5
    torch.testing.assert_close(sae.b_enc.grad, torch.tensor([f_grad, 0.0]).double())
    torch.testing.assert_close(sae.W_dec.grad[..., 0], torch.tensor([[3.0, 1.5], [0.0, 0.0]]).double())
    torch.testing.assert_close(sae.encoder.grad[..., 0], torch.tensor([[2 * f_grad, f_grad], [0.0, 0.0]]).double())
    with torch.no_grad():
        sae.W_dec[1] *= 2  # 1 * 8: now the second
    assert sae.training_loss(acts).fired.tolist() == [False, True]
    torch.testing.assert_close(sae.activation_floor(), sae.threshold / torch.tensor([1.5, 8.0]).double())


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_loss_and_gradient_agree_with_a_dense_definition_in_float64(config, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    sae, acts = make(config).double(), torch.randn(30, config.n_slots, D_IN, dtype=torch.float64)
    mask = sae.membership[..., None]
    encoder, W_dec = sae.encoder * mask, sae.W_dec * mask
    pre_acts = torch.einsum("bsd,fsd->bf", acts - sae.b_dec, encoder) + sae.b_enc
    norms = W_dec.norm(dim=2).sum(1)
    if config.sparsity == "l1":
        feature_acts = pre_acts.relu()
    else:
        size = (pre_acts * norms).detach()
        feature_acts = pre_acts * (size >= size.flatten().topk(6 * 30).values.min())
    recon = torch.einsum("bf,fsd->bsd", feature_acts, W_dec) + sae.b_dec
    total = (recon - acts).pow(2).mean()
    if config.sparsity == "l1":
        total = total + 0.3 * (feature_acts * norms).sum(1).mean() / (config.n_slots * D_IN)
    expected = torch.autograd.grad(total, list(sae.parameters()))
    losses = sae.training_loss(acts)
    torch.testing.assert_close(losses.total, total)
    for ours, theirs in zip(torch.autograd.grad(losses.total, list(sae.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dead_features_are_asked_for_what_the_slots_lack_side_by_side(monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    sae = make(CrosscoderConfig(d_sae=D_SAE, k=6, k_aux=40, n_exclusive=30)).double()
    acts = torch.randn(30, 2, D_IN, dtype=torch.float64)
    losses = sae.training_loss(acts, dead=DEAD)
    sae.threshold.fill_(0)
    feature_acts = sae.encode(acts) * sae.decoder_norms
    kept = feature_acts * (feature_acts >= feature_acts.flatten().topk(6 * 30).values.min()) / sae.decoder_norms
    lacking = (acts - sae.decode(kept)).detach().flatten(1)
    revived = (sae.pre_acts(acts).relu() * DEAD) @ (sae.W_dec * sae.membership[..., None]).flatten(1)
    aux = (lacking - revived).pow(2).sum() / (lacking - lacking.mean(0)).pow(2).sum() / 32
    torch.testing.assert_close(losses.aux, aux.detach())


@pytest.mark.parametrize("few", [False, True], ids=["many_active", "few_active"])
@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_the_tuned_and_the_reference_path_agree(config, few, monkeypatch):
    acts, grads = torch.randn(30, config.n_slots, D_IN), []
    for path, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        monkeypatch.setattr(crosscoder, "few_above", lambda *_, path=path: few and path == "cpu")
        sae = make(config).to(dtype)
        losses = sae.training_loss(acts.to(dtype), dead=DEAD)
        losses.total.backward()
        assert (losses.aux > 0) == (config.sparsity == "batchtopk")
        grads.append({name: parameter.grad.double() for name, parameter in sae.named_parameters()})
    for name, exact in grads[1].items():
        torch.testing.assert_close(grads[0][name], exact, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_with_identical_slots_it_is_an_sae_on_the_slots_side_by_side():
    acts = torch.randn(30, D_IN, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    for sparsity in ("l1", "batchtopk"):
        ours = new_sae(CrosscoderConfig(d_sae=D_SAE, k=6, sparsity=sparsity, l1_coefficient=0.5), d_in=D_IN)
        # n identical slots: the sum of norms is sqrt(n) times the norm side by side
        plain = ReLUConfig(d_sae=D_SAE, l1_coefficient=0.5 * 2**0.5, weight_l1_by_decoder_norm=True)
        twin = new_sae(plain if sparsity == "l1" else BatchTopKConfig(d_sae=D_SAE, k=6), d_in=2 * D_IN)
        ours, twin = ours.double(), twin.double()
        with torch.no_grad():
            for name in ("encoder", "W_dec", "b_enc", "b_dec"):
                twin.get_parameter(name).copy_(ours.get_parameter(name).view_as(twin.get_parameter(name)))
        side_by_side = acts.flatten(1)
        losses, others = ours.training_loss(acts, dead=None), twin.training_loss(side_by_side, dead=None)
        torch.testing.assert_close(losses.total, others.total)
        assert losses.l0 == others.l0
        losses.total.backward()
        others.total.backward()
        for name in ("encoder", "W_dec", "b_enc", "b_dec"):
            grad, other = ours.get_parameter(name).grad, twin.get_parameter(name).grad
            torch.testing.assert_close(grad.flatten(), other.flatten(), msg=name)
            if name != "b_enc":  # and both slots learn the same
                torch.testing.assert_close(*grad.view(-1, 2, D_IN).unbind(1))


def step_(sae, optimizer, acts, **arguments) -> None:
    sae.training_loss(acts, **arguments).total.backward()
    sae.project_decoder_grad_()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    set_lr_(optimizer, 1e-2)
    optimizer.step()
    optimizer.zero_grad()
    sae.normalise_decoder_()


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[3]], ids=named)
def test_exclusive_features_keep_exactly_zero_blocks(config):
    sae = make(config)
    optimizer = adam(sae, OptimConfig())
    owners = [config.owner(feature) for feature in range(D_SAE)]
    assert owners == [0] * 20 + [1] * 20 + [2] * 20 + [None] * 140
    expected = torch.tensor([[owner in (None, slot) for slot in range(3)] for owner in owners])
    assert torch.equal(sae.membership, expected)
    for _ in range(20):
        step_(sae, optimizer, torch.randn(50, 3, D_IN), dead=DEAD)
    sae.fold_(torch.randn(3, D_IN), torch.tensor([1.0, 2.0, 3.0]))
    for weight in (sae.encoder, sae.W_dec):
        assert torch.equal((weight != 0).any(2), expected)
        assert not weight[~expected].any()
    acts = torch.randn(1, 3, D_IN)
    moved = acts.clone()
    moved[:, 1:] += 1
    assert torch.equal(sae.pre_acts(acts)[:, :20], sae.pre_acts(moved)[:, :20])
    shares = relative_decoder_norms(sae.W_dec.detach(), sae.slot_scale)
    assert torch.equal(shares[:20], torch.tensor([[1.0, 0.0, 0.0]]).expand(20, 3))


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_folding_slots_of_different_scales_is_exact(config):
    sae = make(config).double()
    acts = torch.randn(40, config.n_slots, D_IN, dtype=torch.float64)
    sae.training_loss(acts)
    if config.sparsity == "batchtopk":
        sae.threshold -= 1e-3  # which lies on an activation, where rounding decides
    before, recon, norms = sae.encode(acts), sae(acts), sae.decoder_norms
    shares = relative_decoder_norms(sae.W_dec.detach())
    mean, scale = torch.randn(config.n_slots, D_IN), torch.tensor([4.0, 0.5, 3.0][: config.n_slots])
    sae.fold_(mean, scale)
    of_slot = scale.double()[:, None]
    raw = acts / of_slot + mean.double()
    torch.testing.assert_close(sae.encode(raw), before / scale[-1].double())
    torch.testing.assert_close(sae(raw), recon / of_slot + mean.double())
    torch.testing.assert_close(sae.decoder_norms, norms)
    torch.testing.assert_close(relative_decoder_norms(sae.W_dec.detach(), sae.slot_scale), shares)
    with pytest.raises(ConfigError, match="scales to fold"):
        sae.fold_(mean, torch.zeros(config.n_slots))


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_sparse_codes_are_the_dense_activations(config):
    sae, acts = make(config), torch.randn(40, config.n_slots, D_IN)
    sae.training_loss(acts)
    if config.sparsity == "batchtopk":
        sae.threshold -= 1e-3
    feature_acts, codes = sae.encode(acts), sae.sparse_codes(acts)
    dense = torch.zeros_like(feature_acts)
    dense[codes.rows, codes.features] = codes.values
    torch.testing.assert_close(dense, feature_acts)
    assert sae(acts).shape == acts.shape
    assert sae.feature(3).direction.shape == (config.n_slots, D_IN)
    assert sae.W_enc.shape == (config.n_slots, D_IN, D_SAE)


def test_decoder_norms_are_free():
    sae = make(CONFIGS[0])
    before = sae.W_dec.detach().clone()
    sae.training_loss(torch.randn(30, 2, D_IN)).total.backward()
    grad = sae.W_dec.grad.clone()
    sae.project_decoder_grad_()
    sae.normalise_decoder_()
    assert torch.equal(sae.W_dec, before)
    assert torch.equal(sae.W_dec.grad, grad)


def test_relative_norms_by_hand():
    W_dec = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    shares = relative_decoder_norms(W_dec)
    assert shares[:2].tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert shares[2].isnan().all()
    assert relative_decoder_norms(W_dec, torch.tensor([3.0, 1.0]))[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_rows_of_zeros_and_nan_are_not_hidden(config):
    sae, acts = make(config), torch.randn(10, config.n_slots, D_IN)
    acts[3] = 0
    with torch.no_grad():
        sae.W_dec[7] = 0  # a feature that writes nothing has no norm to divide by
    sae.training_loss(acts, dead=DEAD).total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())
    assert not sae.encode(acts).isnan().any()
    acts[4, 1, 2] = torch.nan
    assert sae.training_loss(acts, dead=DEAD).total.isnan()


@pytest.mark.parametrize("sparsity", ["batchtopk", "l1"])
def test_training_finds_shared_and_exclusive_directions(sparsity):
    """Two models share 12 directions and have 3 of their own each; of all, 2 are active in a token."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(18, 2, 24, generator=generator), dim=2)
    directions[12:15, 1], directions[15:18, 0] = 0, 0
    directions *= 12**0.5
    config = CrosscoderConfig(d_sae=48, k=2, sparsity=sparsity, l1_coefficient=0.3)
    sae = new_sae(config, d_in=24, generator=generator)
    optimizer = adam(sae, OptimConfig())
    for step in range(300):
        chosen = torch.rand(256, 18, generator=generator).topk(2).indices
        acts = directions[chosen].sum(1)
        step_(sae, optimizer, acts, progress=step / 299)
    unexplained = (sae(acts) - acts).pow(2).sum() / acts.pow(2).sum()
    assert unexplained < 0.15
    side_by_side = torch.nn.functional.normalize(directions.flatten(1), dim=1)
    cosines, found = (side_by_side @ torch.nn.functional.normalize(sae.W_dec.flatten(1), dim=1).T).max(1)
    assert cosines.median() > 0.95
    shares = relative_decoder_norms(sae.W_dec.detach())[found, 1]
    assert (shares[:12] - 0.5).abs().median() < 0.1
    assert shares[12:15].max() < 0.3
    assert shares[15:].min() > 0.7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": 0}, "k must be between 1 and d_sae=64"),
        ({"n_slots": 1}, "n_slots must be at least 2, got 1"),
        ({"n_exclusive": 33}, "n_exclusive=33 for each of 2 slots does not fit into d_sae=64"),
        ({"n_exclusive": -1}, "n_exclusive=-1"),
        ({"l1_coefficient": -1.0}, "l1_coefficient must not be negative"),
        ({"l1_warmup_share": 1.5}, "l1_warmup_share"),
        ({"threshold_momentum": -0.1}, "threshold_momentum"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(change, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        CrosscoderConfig(**({"d_sae": 64, "k": 2} | change))
    assert "\n" not in str(caught.value)


def test_activations_of_another_shape_are_refused():
    sae = make(CONFIGS[0])
    for shape in ((5, D_IN), (5, 3, D_IN), (5, 2, D_IN + 1)):
        with pytest.raises(ShapeError, match="this crosscoder reads 2 slots of width 12"):
            sae.encode(torch.randn(shape))
    with pytest.raises(ShapeError, match="decode got 7 feature activations"):
        sae.decode(torch.randn(3, 7))
