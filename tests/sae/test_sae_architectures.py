"""The architectures: encode, decode, sparse forms, folding, single features."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.sae.abstopk import AbsTopKConfig
from saelab.sae.base import SAE, Metadata, SparseCodes
from saelab.sae.batchtopk import BatchTopK, BatchTopKConfig
from saelab.sae.gated import GatedConfig
from saelab.sae.io import new_sae
from saelab.sae.jumprelu import JumpReLUConfig, jump_relu
from saelab.sae.matching_pursuit import MatchingPursuitConfig
from saelab.sae.panneal import PAnnealConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopK, TopKConfig

D_IN, D_SAE = 33, 320
CONFIGS = [
    ReLUConfig(d_sae=D_SAE),
    ReLUConfig(d_sae=D_SAE, b_dec="zero"),
    ReLUConfig(d_sae=D_SAE, weight_l1_by_decoder_norm=True),
    TopKConfig(d_sae=D_SAE, k=7),
    BatchTopKConfig(d_sae=D_SAE, k=7),
    JumpReLUConfig(d_sae=D_SAE),
    PAnnealConfig(d_sae=D_SAE),
    AbsTopKConfig(d_sae=D_SAE, k=7),
    GatedConfig(d_sae=D_SAE),
    MatchingPursuitConfig(d_sae=D_SAE, max_iterations=7),
]
every_architecture = pytest.mark.parametrize("config", CONFIGS, ids=str)


def make(config, *, d_in: int = D_IN, seed: int = 0) -> SAE:
    """An SAE with every weight different from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    sae = new_sae(config, d_in=d_in, generator=generator)
    with torch.no_grad():
        for name in ("encoder", "b_enc", "b_gate", "b_mag", "r_mag"):
            if hasattr(sae, name):
                weights = getattr(sae, name)
                weights += 0.1 * torch.randn(weights.shape, generator=generator)
        if getattr(config, "b_dec", "learned") == "learned":
            sae.b_dec += torch.randn(sae.b_dec.shape, generator=generator)
        if config.arch in ("batchtopk", "jumprelu"):
            sae.threshold += 0.3
    return sae


def feature_acts_by_definition(sae: SAE, acts: torch.Tensor) -> torch.Tensor:
    """From the weights in float64, each architecture by its formula."""
    arch, W_dec, b_dec = sae.cfg.arch, sae.W_dec.double(), sae.b_dec.double()
    if arch == "matching_pursuit":
        residual, feature_acts = acts.double() - b_dec, torch.zeros(len(acts), sae.d_sae, dtype=torch.float64)
        for _ in range(sae.cfg.max_iterations):
            value, index = (residual @ W_dec.T).max(dim=1)
            feature_acts[torch.arange(len(acts)), index] += value
            residual = residual - value[:, None] * W_dec[index]
        return feature_acts
    projections = (acts.double() - b_dec) @ sae.W_enc.double()
    if arch == "gated":
        magnitudes = projections * sae.r_mag.double().exp() + sae.b_mag.double()
        return magnitudes.relu() * (projections + sae.b_gate.double() > 0)
    pre_acts = projections + sae.b_enc.double()
    if arch == "abstopk":
        return pre_acts * (pre_acts.abs() >= pre_acts.abs().topk(sae.cfg.k).values[:, -1:])
    if arch == "topk":
        return pre_acts.relu() * (pre_acts >= pre_acts.topk(sae.cfg.k).values[:, -1:])
    return pre_acts.relu() * (pre_acts > (sae.threshold.double() if arch in ("batchtopk", "jumprelu") else 0))


@every_architecture
def test_the_equations_hold(config):
    sae, acts = make(config), torch.randn(20, D_IN)
    feature_acts = feature_acts_by_definition(sae, acts)
    torch.testing.assert_close(sae.encode(acts).double(), feature_acts, rtol=1e-5, atol=1e-5)
    recon = feature_acts @ sae.W_dec.double() + sae.b_dec.double()
    torch.testing.assert_close(sae(acts).double(), recon, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(acts)), sae(acts), rtol=1e-5, atol=1e-5)


def test_the_seed_architecture_is_two_matrices_and_a_relu():
    sae, acts = make(ReLUConfig(d_sae=D_SAE, b_dec="zero")), torch.randn(5, D_IN)
    assert torch.equal(sae.encode(acts), torch.relu(acts @ sae.W_enc + sae.b_enc))
    assert torch.equal(sae(acts), torch.relu(acts @ sae.W_enc + sae.b_enc) @ sae.W_dec)
    sae.training_loss(acts).total.backward()
    assert sae.b_dec.grad is None


@every_architecture
def test_any_number_of_batch_axes_is_taken(config):
    sae, acts = make(config), torch.randn(2, 3, 4, D_IN)
    flat = acts.reshape(-1, D_IN)
    torch.testing.assert_close(sae.encode(acts).reshape(24, D_SAE), sae.encode(flat), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae(acts).reshape(24, D_IN), sae(flat), rtol=1e-5, atol=1e-6)
    assert sae(acts[0, 0, 0]).shape == (D_IN,)


@every_architecture
def test_sparse_codes_are_the_active_features_sorted_by_row_and_feature(config):
    sae, acts = make(config), torch.randn(20, D_IN)
    codes = sae.sparse_codes(acts)
    assert isinstance(codes, SparseCodes)
    keys = codes.rows * D_SAE + codes.features
    assert (keys.diff() > 0).all()
    dense = torch.zeros(20, D_SAE).index_put((codes.rows, codes.features), codes.values)
    torch.testing.assert_close(dense, sae.encode(acts).detach(), rtol=1e-5, atol=1e-6)
    assert (codes.values > 0).all() or config.arch == "abstopk"
    assert (codes.values != 0).all()


@every_architecture
def test_not_a_number_shows_in_every_form(config):
    sae, acts = make(config), torch.randn(3, D_IN)
    acts[1, 4] = float("nan")
    assert sae(acts).isnan().any(1).tolist() == [False, True, False]
    assert sae.sparse_codes(acts).values.isnan().any()
    assert sae.training_loss(acts).total.isnan()


@every_architecture
def test_folding_gives_the_same_sae_on_raw_activations(config):
    generator = torch.Generator().manual_seed(1)
    mean, scale = 100 * torch.randn(D_IN, generator=generator), 0.17
    if getattr(config, "b_dec", "learned") == "zero":
        mean.zero_()
    raw = mean + torch.randn(50, D_IN, generator=generator) / scale
    sae = make(config).double()  # in float64 equality is that of the formula, not of rounding
    mean, raw = mean.double(), raw.double()
    feature_acts, recon = sae.encode(scale * (raw - mean)), sae(scale * (raw - mean))
    norms = sae.W_dec.norm(dim=1)
    sae.fold_(mean, scale)
    torch.testing.assert_close(sae.encode(raw), feature_acts / scale, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae(raw), mean + recon / scale, rtol=1e-6, atol=1e-6)
    if getattr(config, "weight_l1_by_decoder_norm", False):
        norms = torch.ones_like(norms)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), norms)


@every_architecture
def test_a_floor_says_which_pre_activations_pass(config):
    sae, acts = make(config), torch.randn(20, D_IN)
    floor = sae.activation_floor()
    if floor is None:
        assert config.arch in ("topk", "abstopk", "matching_pursuit")
    else:
        pre_acts = sae.pre_acts(acts)
        torch.testing.assert_close(sae.encode(acts), pre_acts * (pre_acts > floor), rtol=1e-5, atol=1e-6)


@every_architecture
def test_folding_in_float32_is_within_rounding_of_the_mean(config):
    mean, scale = torch.full((D_IN,), 3.0), 0.5
    if getattr(config, "b_dec", "learned") == "zero":
        mean.zero_()
    normalised = torch.randn(50, D_IN)
    sae = make(config)
    recon = sae(normalised)
    sae.fold_(mean, scale)
    error = sae(mean + normalised / scale) - (mean + recon / scale)
    assert error.norm() / recon.norm() < 1e-5


def test_free_decoder_norms_move_into_the_encoder_when_folded():
    sae, acts = make(ReLUConfig(d_sae=D_SAE, weight_l1_by_decoder_norm=True)), torch.randn(20, D_IN)
    with torch.no_grad():
        sae.W_dec *= torch.rand(D_SAE, 1) + 0.5
    before = sae(acts)
    sae.fold_(torch.zeros(D_IN), 1.0)
    torch.testing.assert_close(sae(acts), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_the_seed_architecture_refuses_a_mean_and_no_sae_takes_a_scale_of_zero():
    sae = make(ReLUConfig(d_sae=D_SAE, b_dec="zero"))
    with pytest.raises(ConfigError, match="no place for a mean"):
        sae.fold_(torch.ones(D_IN), 1.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive number"):
            sae.fold_(torch.zeros(D_IN), scale)


def test_jumprelu_is_strict():
    pre_acts, threshold = torch.tensor([0.5, 0.75, 0.25, -1.0]), torch.tensor([0.5, 0.5, 0.0, -2.0])
    assert jump_relu(pre_acts, threshold).tolist() == [0.0, 0.75, 0.25, 0.0]


def test_topk_forms_agree():
    sae, acts = make(TopKConfig(d_sae=D_SAE, k=7)), torch.randn(20, D_IN)
    assert isinstance(sae, TopK)
    top = sae.encode_sparse(acts)
    assert top.top_acts.shape == (20, 7)
    torch.testing.assert_close(sae.decode_sparse(top), sae(acts), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), [(1, 33, 320, 7), (5, 33, 12, 12), (2, 1, 1, 1)])
def test_topk_takes_awkward_shapes(batch, d_in, d_sae, k):
    sae, acts = make(TopKConfig(d_sae=d_sae, k=k), d_in=d_in), torch.randn(batch, d_in)
    losses = sae.training_loss(acts, dead=torch.ones(d_sae, dtype=torch.bool))
    losses.total.backward()
    assert losses.l0 <= k
    assert sae.encode(acts).shape == (batch, d_sae)


def test_the_inference_threshold_of_batchtopk_follows_training_and_keeps_its_l0():
    sae = make(BatchTopKConfig(d_sae=D_SAE, k=7, threshold_momentum=0.9))
    assert isinstance(sae, BatchTopK)
    sae.threshold.zero_()
    acts = torch.randn(400, D_IN)
    smallest = []
    for batch in acts.split(100):
        smallest.append(sae.pre_acts(batch).flatten().topk(700).values.min())
        assert sae.training_loss(batch).l0.item() == pytest.approx(7)
    expected = smallest[0]
    for value in smallest[1:]:
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(sae.threshold, expected.detach())
    l0 = (sae.encode(acts) > 0).sum(1).float().mean()
    assert l0.item() == pytest.approx(7, rel=0.05)
    twin = sae.as_jumprelu()
    assert torch.equal(twin.encode(acts), sae.encode(acts))
    assert torch.equal(twin.threshold, sae.threshold.expand(D_SAE))


def test_a_batch_without_any_activation_leaves_the_threshold():
    sae = make(BatchTopKConfig(d_sae=D_SAE, k=7))
    with torch.no_grad():
        sae.b_enc -= 1000
    before = sae.threshold.clone()
    sae.training_loss(torch.randn(10, D_IN))
    assert torch.equal(sae.threshold, before)
    assert sae.n_updates == 0


@every_architecture
def test_the_same_seed_gives_the_same_tied_unit_weights(config):
    a, b = (new_sae(config, d_in=D_IN, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a.W_dec, b.W_dec)
    assert torch.equal(a.W_enc, a.W_dec.T)
    read = a.W_dec if config.arch == "matching_pursuit" else a.encoder
    assert a.W_enc.untyped_storage().data_ptr() == read.untyped_storage().data_ptr()
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(D_SAE))
    for name in ("b_enc", "b_gate", "b_mag", "r_mag", "b_dec"):
        assert not hasattr(a, name) or not getattr(a, name).any()
    assert not torch.equal(a.W_dec, new_sae(config, d_in=D_IN, generator=torch.Generator().manual_seed(5)).W_dec)


@every_architecture
def test_a_feature_knows_its_direction_hook_and_activation(config):
    sae, acts = make(config), torch.randn(4, 6, D_IN)
    sae.metadata = Metadata(hook_name="blocks.3.hook_resid_post")
    feature = sae.feature(11)
    assert torch.equal(feature.direction, sae.W_dec[11])
    assert not feature.direction.requires_grad
    assert feature.hook_name == "blocks.3.hook_resid_post"
    assert torch.equal(feature.activation(acts), sae.encode(acts)[..., 11])


def test_wrong_widths_and_features_are_named():
    sae = make(TopKConfig(d_sae=D_SAE, k=7))
    sae.metadata = Metadata(hook_name="blocks.3.hook_resid_post")
    for use in (sae, sae.encode, sae.encode_sparse, sae.sparse_codes, sae.training_loss):
        with pytest.raises(ShapeError, match=r"width 32, but this SAE reads blocks\.3\.hook_resid_post of width 33"):
            use(torch.randn(5, 32))
    with pytest.raises(ShapeError, match="has 320 features"):
        sae.decode(torch.randn(5, 319))
    for index in (-1, D_SAE):
        with pytest.raises(ShapeError, match=f"no feature {index}: this SAE has features 0 to 319"):
            sae.feature(index)


@pytest.mark.parametrize(
    ("make_config", "sentence"),
    [
        (lambda: TopKConfig(d_sae=8, k=9), "k must be between 1 and d_sae=8, got 9"),
        (lambda: TopKConfig(d_sae=8, k=0), "k must be between 1"),
        (lambda: TopKConfig(d_sae=8, k=1, aux_coefficient=-1.0), "aux_coefficient"),
        (lambda: TopKConfig(d_sae=8, k=1, k_aux=0), "k_aux"),
        (lambda: BatchTopKConfig(d_sae=8, k=9), "k must be between 1"),
        (lambda: BatchTopKConfig(d_sae=8, k=1, aux_coefficient=-1.0), "aux_coefficient"),
        (lambda: BatchTopKConfig(d_sae=8, k=1, k_aux=0), "k_aux"),
        (lambda: BatchTopKConfig(d_sae=8, k=1, threshold_momentum=1.0), "threshold_momentum"),
        (lambda: ReLUConfig(d_sae=0), "d_sae"),
        (lambda: ReLUConfig(d_sae=8, l1_coefficient=-0.1), "l1_coefficient"),
        (lambda: JumpReLUConfig(d_sae=0), "d_sae"),
        (lambda: new_sae(ReLUConfig(d_sae=8), d_in=0), "d_in"),
    ],
)
def test_impossible_settings_are_refused(make_config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_config()
