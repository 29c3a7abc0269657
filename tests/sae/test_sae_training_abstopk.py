"""The AbsTopK SAE: signs kept, loss and gradient by hand, the mirrored dictionary against the plain definition."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae.abstopk import AbsTopK, AbsTopKConfig
from saelab.sae.architectures import new_sae
from saelab_kernels.revive import packed

D_IN, D_SAE = 12, 60


def small(*, k: int = 1, **settings) -> AbsTopK:
    """Two inputs; feature 0 reads and writes the first, feature 1 the second doubled, feature 2 their sum."""
    sae = new_sae(AbsTopKConfig(d_sae=3, k=k, **settings), d_in=2).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def make(*, k: int = 5, d_sae: int = D_SAE, **settings) -> AbsTopK:
    sae = new_sae(AbsTopKConfig(d_sae=d_sae, k=k, **settings), d_in=D_IN, generator=torch.Generator().manual_seed(3))
    assert isinstance(sae, AbsTopK)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(d_sae))
        sae.b_dec.copy_(torch.randn(D_IN))
    return sae.double()


def by_definition(sae: AbsTopK, acts: torch.Tensor) -> torch.Tensor:
    pre_acts = (acts - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = pre_acts.detach().abs().argsort(dim=1, descending=True, stable=True)[:, : sae.cfg.k]
    return pre_acts * torch.zeros_like(pre_acts).scatter(1, kept, 1.0)


def test_the_largest_magnitude_is_kept_with_its_sign_and_the_loss_by_hand():
    # pre-activations: (-3, 1.5, -1) and (1, -3.5, -1.5)
    acts = torch.tensor([[-2.0, 1.0], [2.0, -4.0]], dtype=torch.float64)
    sae = small()
    assert sae.encode(acts).tolist() == [[-3.0, 0.0, 0.0], [0.0, -3.5, 0.0]]
    losses = sae.training_loss(acts)
    losses.total.backward()
    # recon (1 - 3, 0) and (1, -7): errors (0, -1) and (-1, -3)
    assert losses.reconstruction.item() == pytest.approx((1 + 1 + 9) / 4)
    assert (losses.l0.item(), losses.fired.tolist()) == (1.0, [True, True, False])
    # factor 2 / 4; dL/df = W_dec e / 2: 0 and -3; dL/dW_dec = f e / 2
    assert sae.W_dec.grad.tolist() == [[0.0, 1.5], [1.75, 5.25], [0.0, 0.0]]
    assert sae.b_enc.grad.tolist() == [0.0, -3.0, 0.0]
    assert sae.encoder.grad.tolist() == [[0.0, 0.0], [-3.0, 12.0], [0.0, 0.0]]  # times x - b_dec = (1, -4)
    assert sae.b_dec.grad.tolist() == [-0.5, -2.0 + 3.0]  # errors / 2, less what comes through the input


def test_the_auxiliary_loss_uses_dead_features_with_their_signs():
    acts = torch.tensor([[-2.0, 1.0], [2.0, -4.0]], dtype=torch.float64)
    losses = small(aux_coefficient=0.5).training_loss(acts, dead=torch.tensor([False, False, True]))
    # residual (0, 1) and (1, 3), of mean (.5, 2), variance 4 * .25 + ... : .25 + 1 + .25 + 1
    # feature 2 alone: -1 and -1.5 of (1, 1): errors (-1, -2) and (-2.5, -4.5)
    assert losses.aux.item() == pytest.approx(0.5 * (1 + 4 + 6.25 + 20.25) / 2.5)
    assert losses.total.item() == pytest.approx(losses.reconstruction.item() + losses.aux.item())


@pytest.mark.parametrize(("batch", "d_sae", "k"), [(1, 60, 5), (20, 60, 5), (3, 7, 7), (4, 1, 1), (2, 60, 60)])
def test_it_is_the_plain_definition_with_its_gradient(batch, d_sae, k):
    sae, acts = make(k=k, d_sae=d_sae), torch.randn(batch, D_IN, dtype=torch.float64)
    losses = sae.training_loss(acts)
    losses.total.backward()
    grads = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    feature_acts = by_definition(sae, acts)
    torch.testing.assert_close(sae.encode(acts), feature_acts)
    recon = feature_acts @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(acts), recon)
    (recon - acts).pow(2).mean().backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    assert losses.l0.item() == k
    assert torch.equal(losses.fired, (feature_acts != 0).any(0))


def test_negating_a_feature_changes_its_sign_alone():
    sae, acts = make(), torch.randn(20, D_IN, dtype=torch.float64)
    feature_acts, recon = sae.encode(acts), sae(acts)
    with torch.no_grad():
        for tensor in (sae.encoder, sae.b_enc, sae.W_dec):
            tensor[:30] *= -1
    flipped = feature_acts * torch.where(torch.arange(D_SAE) < 30, -1.0, 1.0)
    torch.testing.assert_close(sae.encode(acts), flipped)
    torch.testing.assert_close(sae(acts), recon)


def test_equal_magnitudes_go_to_the_lower_index_whatever_their_sign():
    sae = small(k=1)
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
        sae.b_enc.zero_()
    assert sae.encode(torch.tensor([[4.0, 0.0], [-2.0, 0.0]])).tolist() == [[-3.0, 0, 0], [3.0, 0, 0]]


def test_sparse_forms_keep_signs():
    sae, acts = make(), torch.randn(20, D_IN, dtype=torch.float64)
    feature_acts, top, codes = sae.encode(acts), sae.encode_sparse(acts), sae.sparse_codes(acts)
    assert (feature_acts < 0).any()
    assert (top.top_acts.abs().diff(dim=1) <= 0).all()
    torch.testing.assert_close(sae.decode_sparse(top), sae(acts))
    dense = torch.zeros_like(feature_acts).index_put((codes.rows, codes.features), codes.values)
    assert torch.equal(dense, feature_acts)
    assert len(codes.values) == 20 * 5


def test_a_row_of_zeros_has_no_active_feature():
    sae = make()
    with torch.no_grad():
        sae.b_enc.zero_()
    losses = sae.training_loss(sae.b_dec.detach()[None])
    losses.total.backward()
    assert losses.l0.item() == 0.0
    assert not losses.fired.any()
    assert len(sae.sparse_codes(sae.b_dec.detach()[None]).values) == 0


def test_the_sparse_and_the_dense_path_agree_in_float32(monkeypatch):
    monkeypatch.setattr(packed.dispatch, "bfloat16_units", lambda _: False)
    acts, dead, grads = torch.randn(40, D_IN), torch.arange(D_SAE) < 20, []
    for path, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        torch.manual_seed(2)
        sae = make().to(dtype)
        sae.training_loss(acts.to(dtype), dead=dead).total.backward()
        grads.append({name: parameter.grad.double() for name, parameter in sae.named_parameters()})
    for name, exact in grads[1].items():
        torch.testing.assert_close(grads[0][name], exact, rtol=1e-4, atol=1e-6)


def test_training_finds_the_toy_dictionary(trained_on_toys):
    result = trained_on_toys(AbsTopKConfig(d_sae=48, k=3))
    assert result.explained_variance > 0.8
    assert result.l0 == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k": 9}, "k must be between 1 and d_sae=8"),
        ({"aux_coefficient": -1.0}, "aux_coefficient"),
        ({"k_aux": 0}, "k_aux"),
    ],
)
def test_impossible_settings_of_abstopk_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        AbsTopKConfig(**{"d_sae": 8, "k": 2, **settings})
