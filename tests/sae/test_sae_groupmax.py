"""GroupMax: the largest of each group, its loss and gradient by hand, and revival of dead features."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae.groupmax import GroupMax, GroupMaxConfig
from saelab.sae.io import new_sae
from saelab_kernels.step import reference as step_reference

D_IN, D_SAE, K = 6, 24, 4


def make(**settings: object) -> GroupMax:
    generator = torch.Generator().manual_seed(1)
    sae = new_sae(GroupMaxConfig(d_sae=D_SAE, k=K, **settings), d_in=D_IN, generator=generator)
    assert isinstance(sae, GroupMax)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return sae


def test_each_token_keeps_the_largest_positive_feature_of_each_group():
    sae, acts = make(), torch.randn(50, D_IN)
    feature_acts, pre_acts = sae.encode(acts), sae.pre_acts(acts)
    for group in torch.arange(D_SAE).view(K, -1):
        largest = pre_acts[:, group].max(1)
        assert torch.equal(feature_acts[:, group].sum(1), largest.values.relu())
        rows = largest.values > 0
        assert torch.equal(feature_acts[rows][:, group].argmax(1), largest.indices[rows])
    assert (feature_acts > 0).sum(1).max() <= K


def test_of_equal_features_of_a_group_the_first_stays():
    sae = make()
    with torch.no_grad():
        sae.encoder.zero_()
        sae.b_enc.copy_(torch.tensor([0.0, 2.0, 2.0, 1.0, 2.0, 0.0]).repeat(K))
    assert sae.encode(torch.randn(1, D_IN)).nonzero()[:, 1].tolist() == [1, 7, 13, 19]


def test_one_group_is_the_maximum_and_groups_of_one_are_relu():
    acts = torch.randn(20, D_IN)
    for k in (1, D_SAE):
        sae = new_sae(GroupMaxConfig(d_sae=D_SAE, k=k), d_in=D_IN)
        relu = sae.pre_acts(acts).relu()
        torch.testing.assert_close(
            sae.encode(acts), relu * (relu == relu.max(1, keepdim=True).values) if k == 1 else relu
        )


def test_loss_and_gradient_are_those_by_hand():
    sae, acts = make(aux_coefficient=0.0).double(), torch.randn(7, D_IN, dtype=torch.float64)
    losses = sae.training_loss(acts)
    losses.total.backward()
    pre_acts = sae.pre_acts(acts).detach()
    kept = torch.zeros_like(pre_acts)
    for row in range(7):
        for start in range(0, D_SAE, D_SAE // K):
            best = start + int(pre_acts[row, start : start + D_SAE // K].argmax())
            kept[row, best] = float(pre_acts[row, best] > 0)
    f = pre_acts * kept
    error = f @ sae.W_dec.detach() + sae.b_dec.detach() - acts
    torch.testing.assert_close(losses.total.detach(), error.pow(2).sum() / (7 * D_IN))
    scale = 2 / (7 * D_IN)
    into = (error @ sae.W_dec.detach().T) * kept * scale
    torch.testing.assert_close(sae.W_dec.grad, f.T @ error * scale)
    torch.testing.assert_close(sae.encoder.grad, into.T @ (acts - sae.b_dec.detach()))
    torch.testing.assert_close(sae.b_enc.grad, into.sum(0))
    torch.testing.assert_close(sae.b_dec.grad, error.sum(0) * scale - into.sum(0) @ sae.encoder.detach())
    assert torch.equal(losses.fired, (f > 0).any(0))
    assert losses.l0.item() == pytest.approx((f > 0).sum(1).double().mean().item())


def test_dead_features_get_a_gradient_from_the_auxiliary_loss_alone():
    sae, acts = make(), torch.randn(64, D_IN)
    with torch.no_grad():
        sae.b_enc[:3] = -50
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:3] = True
    sae.training_loss(acts).total.backward()
    assert not sae.W_dec.grad[:3].any()
    with torch.no_grad():
        sae.b_enc[:3] = 0.5
        sae.encoder[:3] *= 0.01  # never the largest of its group, but positive
    sae.zero_grad()
    losses = sae.training_loss(acts, dead=dead)
    losses.total.backward()
    assert losses.aux > 0
    assert sae.W_dec.grad[:3].any(1).all()


def test_not_a_number_shows():
    sae, acts = make(), torch.randn(3, D_IN)
    acts[1, 2] = float("nan")
    assert sae(acts).isnan().any(1).tolist() == [False, True, False]
    assert sae.training_loss(acts).total.isnan()


def test_groups_must_be_equal():
    with pytest.raises(ConfigError, match="k must divide d_sae=24 into equal groups, got 5"):
        GroupMaxConfig(d_sae=D_SAE, k=5)


@pytest.mark.parametrize("n_dead", [0, 3])
def test_the_sparse_gradient_is_that_of_autograd(n_dead: int):
    sae, twin, acts = make(), make(), torch.randn(33, D_IN)
    dead = torch.arange(D_SAE) < n_dead
    losses = twin.training_loss(acts, dead=dead)
    losses.total.backward()
    gradient = sae.training_gradient(acts, dead=dead)
    for ours, theirs in zip(gradient.losses, losses, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    whole = step_reference.written_out(gradient.sparse)
    for name, grad in (
        ("encoder", whole.W_enc),
        ("W_dec", whole.W_dec),
        ("b_enc", whole.b_enc),
        ("b_dec", whole.b_dec),
    ):
        torch.testing.assert_close(grad, getattr(twin, name).grad, rtol=1e-4, atol=1e-6)
