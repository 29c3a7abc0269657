"""Transcoders: loss and gradient by hand and against dense definitions, folding of two slots, inference."""

from __future__ import annotations

import pytest
import torch

from saelab import config as configs
from saelab.errors import ConfigError, ShapeError
from saelab.sae import transcoder
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.topk import TopKConfig
from saelab.sae.transcoder import TranscoderConfig
from saelab.train.optim import OptimConfig, adam, set_lr_
from saelab_kernels.revive import packed

D_IN, D_SAE = 12, 200
DEAD = torch.arange(D_SAE) < 40
CONFIGS = [
    TranscoderConfig(d_sae=D_SAE, k=6, activation=activation, skip=skip)
    for activation in ("topk", "batchtopk", "relu")
    for skip in (False, True)
]


def named(config: TranscoderConfig) -> str:
    return config.activation + ("_skip" if config.skip else "")


@pytest.fixture(autouse=True)
def _float32_revival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.dispatch, "bfloat16_units", lambda _: False)


def make(config, *, d_in: int = D_IN):
    sae = new_sae(config, d_in=d_in, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, sae.d_out))
        sae.b_enc.copy_(torch.linspace(-0.1, 0.1, len(sae.b_enc)))
        if getattr(config, "skip", False):
            sae.W_skip.copy_(torch.randn(sae.W_skip.shape, generator=torch.Generator().manual_seed(5)) / 5)
        if getattr(config, "activation", "") == "jumprelu":
            sae.threshold.copy_(torch.linspace(-0.5, 2, config.d_sae))
    return sae


def test_loss_and_gradient_by_hand():
    sae = make(TranscoderConfig(d_sae=2, k=1, skip=True, aux_coefficient=0.0), d_in=2).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        sae.W_skip.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        sae.b_enc.zero_()
        sae.b_dec.copy_(torch.tensor([0.5, 0.0]))
    acts = torch.tensor([[[3.0, 1.0], [4.0, 2.0]]], dtype=torch.float64)  # input (3, 1), target (4, 2)
    losses = sae.training_loss(acts)
    # feature 0 fires with 3: (0, 3) + skip (3, 0) + b_dec (0.5, 0) = (3.5, 3), error (-0.5, 1)
    assert losses.total.item() == pytest.approx((0.25 + 1) / 2)
    assert losses.fired.tolist() == [True, False]
    losses.total.backward()
    # d total / d error = error = (-0.5, 1); feature 0's pre-activation sees its dot with (0, 1), which is 1
    expected = {
        "W_dec": [[-1.5, 3.0], [0.0, 0.0]],
        "encoder": [[3.0, 1.0], [0.0, 0.0]],
        "b_enc": [1.0, 0.0],
        "b_dec": [-0.5, 1.0],
        "W_skip": [[-1.5, -0.5], [3.0, 1.0]],
    }
    for name, grad in expected.items():
        torch.testing.assert_close(sae.get_parameter(name).grad, torch.tensor(grad).double(), msg=name)


def test_the_l1_penalty_by_hand_and_its_warmup():
    config = TranscoderConfig(d_sae=2, activation="relu", l1_coefficient=0.5, l1_warmup_share=0.1)
    sae = make(config, d_in=2)
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_enc.zero_()
    acts = torch.tensor([[[3.0, 1.0], [0.0, 0.0]], [[-1.0, 2.0], [0.0, 0.0]]])
    assert sae.training_loss(acts).sparsity.item() == pytest.approx(0.5 * (4 + 2) / 2 / 2)
    assert sae.training_loss(acts, progress=0.05).sparsity.item() == pytest.approx(0.5 * (4 + 2) / 2 / 2 / 2)


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_loss_and_gradient_agree_with_a_dense_definition_in_float64(config, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    sae, acts = make(config).double(), torch.randn(30, 2, D_IN, dtype=torch.float64)
    inputs, target = acts.unbind(1)
    pre_acts = inputs @ sae.W_enc + sae.b_enc
    cut = {
        "topk": pre_acts.topk(6).values[:, -1:],
        "batchtopk": pre_acts.flatten().topk(6 * 30).values.min(),
        "relu": torch.zeros(()),
    }[config.activation]
    feature_acts = (pre_acts * (pre_acts >= cut)).relu()
    recon = feature_acts @ sae.W_dec + sae.b_dec + (inputs @ sae.W_skip.T if config.skip else 0)
    total = (recon - target).pow(2).mean()
    if config.activation == "relu":
        total = total + feature_acts.sum(1).mean() / D_IN
    expected = torch.autograd.grad(total, list(sae.parameters()))
    losses = sae.training_loss(acts)
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(losses.l0, (feature_acts > 0).sum(1).double().mean())
    assert torch.equal(losses.fired, (feature_acts > 0).any(0))
    for ours, theirs in zip(torch.autograd.grad(losses.total, list(sae.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dead_features_read_the_input_and_are_asked_for_what_the_output_lacks(monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    sae = make(TranscoderConfig(d_sae=D_SAE, k=6, k_aux=40, skip=True)).double()
    acts = torch.randn(30, 2, D_IN, dtype=torch.float64)
    losses = sae.training_loss(acts, dead=DEAD)
    inputs, target = acts.unbind(1)
    lacking = (target - sae(inputs)).detach()
    revived = (inputs @ sae.W_enc + sae.b_enc).relu()[:, DEAD] @ sae.W_dec[DEAD]  # k_aux = 40 takes all of them
    aux = (lacking - revived).pow(2).sum() / (lacking - lacking.mean(0)).pow(2).sum() / 32
    torch.testing.assert_close(losses.aux, aux.detach())
    torch.testing.assert_close(losses.total, (lacking.pow(2).mean() + aux).detach())


@pytest.mark.parametrize("few", [False, True], ids=["many_active", "few_active"])
@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_the_tuned_and_the_reference_path_agree(config, few, monkeypatch):
    acts, grads = torch.randn(30, 2, D_IN), []
    for path, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        monkeypatch.setattr(transcoder, "few_above", lambda *_, path=path: few and path == "cpu")
        sae = make(config).to(dtype)
        losses = sae.training_loss(acts.to(dtype), dead=DEAD)
        losses.total.backward()
        assert (losses.aux > 0) == (config.activation != "relu")
        grads.append({name: parameter.grad.double() for name, parameter in sae.named_parameters()})
    for name, exact in grads[1].items():
        torch.testing.assert_close(grads[0][name], exact, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_with_target_equal_to_input_and_no_b_dec_it_is_an_autoencoder():
    sae, twin = make(TranscoderConfig(d_sae=D_SAE, k=6)), make(TopKConfig(d_sae=D_SAE, k=6))
    with torch.no_grad():
        for one in (sae, twin):
            one.b_dec.zero_()
        twin.W_dec.copy_(sae.W_dec)
        twin.encoder.copy_(sae.encoder)
    acts = torch.randn(30, D_IN)
    ours, theirs = sae.training_loss(acts[:, None].expand(-1, 2, -1), dead=DEAD), twin.training_loss(acts, dead=DEAD)
    torch.testing.assert_close(ours.total, theirs.total)
    ours.total.backward()
    theirs.total.backward()
    for name in ("encoder", "W_dec", "b_enc"):
        torch.testing.assert_close(sae.get_parameter(name).grad, twin.get_parameter(name).grad)
    assert torch.equal(sae.encode(acts), twin.encode(acts))
    torch.testing.assert_close(sae(acts), twin(acts))


@pytest.mark.parametrize(
    "config", [*CONFIGS, TranscoderConfig(d_sae=D_SAE, activation="jumprelu", skip=True)], ids=named
)
def test_folding_two_slots_is_exact(config):
    sae = make(config).double()
    acts = torch.randn(40, 2, D_IN, dtype=torch.float64)
    if config.activation != "jumprelu":
        sae.training_loss(acts)
    if config.activation == "batchtopk":
        sae.threshold -= 1e-3  # which lies on an activation, where rounding decides
    inputs = acts[:, 0]
    before, predicted = sae.encode(inputs), sae(inputs)
    mean, scale = torch.randn(2, D_IN), torch.tensor([4.0, 0.5])
    sae.fold_(mean, scale)
    raw = inputs / 4 + mean[0].double()
    torch.testing.assert_close(sae.encode(raw), before / 0.5)
    torch.testing.assert_close(sae(raw), predicted / 0.5 + mean[1].double())
    for wrong in (torch.tensor([1.0, 0.0]), torch.tensor([1.0]), torch.tensor([torch.nan, 1.0])):
        with pytest.raises(ConfigError, match="scales to fold"):
            sae.fold_(mean, wrong)


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_sparse_codes_are_the_dense_activations(config):
    sae, acts = make(config), torch.randn(40, 2, D_IN)
    sae.training_loss(acts)
    if config.activation == "batchtopk":
        sae.threshold -= 1e-3  # which lies on an activation, where rounding decides
    feature_acts, codes = sae.encode(acts[:, 0]), sae.sparse_codes(acts[:, 0])
    dense = torch.zeros_like(feature_acts)
    dense[codes.rows, codes.features] = codes.values
    torch.testing.assert_close(dense, feature_acts)
    torch.testing.assert_close(
        sae.decode(feature_acts) + (acts[:, 0] @ sae.W_skip.T if config.skip else 0), sae(acts[:, 0])
    )


def test_at_inference_batchtopk_is_a_transcoder_with_thresholds():
    sae, acts = make(TranscoderConfig(d_sae=D_SAE, k=6, activation="batchtopk", skip=True)), torch.randn(40, 2, D_IN)
    sae.metadata = Metadata(hook_name="blocks.0.ln2.hook_normalized")
    sae.training_loss(acts)
    twin = sae.as_jumprelu()
    assert (twin.cfg.activation, twin.metadata) == ("jumprelu", sae.metadata)
    assert torch.equal(twin(acts[:, 0]), sae(acts[:, 0]))
    with pytest.raises(ConfigError, match="is for inference; train topk"):
        twin.training_loss(acts)
    other = make(TranscoderConfig(d_sae=D_SAE, k=6))
    assert other.as_jumprelu() is other


def test_an_output_of_another_width_can_be_used_but_not_trained():
    sae = make(TranscoderConfig(d_sae=D_SAE, k=6, d_out=20, skip=True))
    assert sae(torch.randn(3, 4, D_IN)).shape == (3, 4, 20)
    assert (sae.d_in, sae.d_out, sae.feature(7).direction.shape) == (D_IN, 20, (20,))
    with pytest.raises(ConfigError, match="d_out=20"):
        sae.training_loss(torch.randn(5, 2, D_IN))
    with pytest.raises(ShapeError, match="width 5"):
        sae(torch.randn(3, 5))


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_rows_of_zeros_and_nan_are_not_hidden(config):
    sae, acts = make(config), torch.randn(10, 2, D_IN)
    acts[3] = 0
    sae.training_loss(acts, dead=DEAD).total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())
    for slot in (0, 1):
        bad = acts.clone()
        bad[4, slot, 2] = torch.nan
        assert sae.training_loss(bad, dead=DEAD).total.isnan()


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[4]], ids=named)
def test_training_learns_a_layer(config):
    """The target is a ReLU layer with 16 neurons plus a linear map, which a skip transcoder has a place for."""
    generator = torch.Generator().manual_seed(0)
    neurons = torch.randn(16, D_IN, generator=generator) / D_IN**0.5
    out = torch.nn.functional.normalize(torch.randn(16, D_IN, generator=generator), dim=1)
    linear = torch.randn(D_IN, D_IN, generator=generator) / D_IN**0.5
    sae = new_sae(
        TranscoderConfig(d_sae=64, k=16, activation=config.activation, skip=config.skip, l1_coefficient=0.02),
        d_in=D_IN,
        generator=generator,
    )
    optimizer = adam(sae, OptimConfig())
    for step in range(200):
        inputs = torch.randn(256, D_IN, generator=generator)
        target = ((inputs @ neurons.T - 0.5).relu() @ out + inputs @ linear) / 1.3
        losses = sae.training_loss(torch.stack([inputs, target], 1), progress=step / 199)
        losses.total.backward()
        sae.project_decoder_grad_()
        set_lr_(optimizer, 1e-2 * min(1.0, (200 - step) / 70))
        optimizer.step()
        optimizer.zero_grad()
        sae.normalise_decoder_()
    assert losses.reconstruction < (0.03 if config.skip else 0.25)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": 0}, "k must be between 1 and d_sae=64"),
        ({"l1_coefficient": -1.0}, "l1_coefficient must not be negative"),
        ({"l1_warmup_share": 2.0}, "l1_warmup_share"),
        ({"d_out": 0}, "d_out must be at least 1"),
        ({"aux_coefficient": -1.0}, "aux_coefficient must not be negative"),
        ({"threshold_momentum": 1.0}, "threshold_momentum"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(change, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        TranscoderConfig(**({"d_sae": 64, "k": 2} | change))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="activation must be one of 'topk', 'batchtopk', 'relu', 'jumprelu'"):
        configs.from_mapping(TranscoderConfig, {"d_sae": 64, "activation": "gelu"})


def test_k_does_not_matter_where_nothing_is_counted():
    assert TranscoderConfig(d_sae=8, activation="relu").k == 32
    assert TranscoderConfig(d_sae=8, activation="jumprelu").k == 32
