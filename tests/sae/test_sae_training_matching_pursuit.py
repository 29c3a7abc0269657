"""Matching pursuit: the steps and their gradient by hand, against unrolled autograd, and when a token stops."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae import matching_pursuit
from saelab.sae.architectures import new_sae
from saelab.sae.matching_pursuit import MatchingPursuit, MatchingPursuitConfig

D_IN, D_SAE = 12, 60


def small(**settings) -> MatchingPursuit:
    """Two inputs, two unit directions that are not orthogonal: (1, 0) and (0.6, 0.8)."""
    sae = new_sae(MatchingPursuitConfig(d_sae=2, **settings), d_in=2).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def make(*, d_sae: int = D_SAE, **settings) -> MatchingPursuit:
    settings = {"max_iterations": 6, **settings}
    sae = new_sae(MatchingPursuitConfig(d_sae=d_sae, **settings), d_in=D_IN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.W_dec.mul_(0.8 + 0.4 * torch.rand(d_sae, 1))  # its formulas do not ask for unit rows
        sae.b_dec.copy_(torch.randn(D_IN))
    return sae.double()


def unrolled(sae: MatchingPursuit, acts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual and dense activations of each token by itself, with autograd through every step."""
    residuals, feature_acts = [], []
    for row in acts:
        residual, found, taken = row - sae.b_dec, torch.zeros(sae.d_sae, dtype=acts.dtype), set()
        for _ in range(sae.cfg.max_iterations or sae.d_in):
            projections = residual @ sae.W_dec.T
            index = int(projections.argmax())
            value = projections[index].relu()
            found = found + torch.nn.functional.one_hot(torch.tensor(index), sae.d_sae) * value
            residual = residual - value * sae.W_dec[index]
            repeated = index in taken and sae.cfg.stop_on_duplicate_support
            taken.add(index)
            if repeated or value == 0 or residual.norm() < sae.cfg.residual_threshold:
                break
        residuals.append(residual)
        feature_acts.append(found)
    return torch.stack(residuals), torch.stack(feature_acts)


def test_two_steps_and_their_loss_by_hand():
    # x - b_dec = (2, 4): projections 2 and 4.4; residual (2, 4) - 4.4 (.6, .8) = (-.64, .48): projections -.64 and 0
    # x - b_dec = (5, 1): projections 5 and 3.8; residual (0, 1): 0 and .8; residual (0, 1) - .8 (.6, .8) = (-.48, .36)
    acts = torch.tensor([[3.0, 4.0], [6.0, 1.0]], dtype=torch.float64)
    sae = small(max_iterations=2)
    torch.testing.assert_close(sae.encode(acts), torch.tensor([[0.0, 4.4], [5.0, 0.8]]).double())
    torch.testing.assert_close(sae(acts), acts - torch.tensor([[-0.64, 0.48], [-0.48, 0.36]]).double())
    losses = sae.training_loss(acts)
    assert losses.total.item() == pytest.approx((0.64**2 + 0.48**2 + 0.48**2 + 0.36**2) / 4)
    assert losses.total.item() == losses.reconstruction.item()
    assert (losses.sparsity.item(), losses.aux.item()) == (0.0, 0.0)
    assert losses.l0.item() == pytest.approx(1.5)
    assert losses.fired.tolist() == [True, True]


def test_the_gradient_of_two_steps_by_hand():
    sae = small(max_iterations=2)
    sae.training_loss(torch.tensor([[6.0, 1.0]], dtype=torch.float64)).total.backward()
    # g_2 = r_2 = (-.48, .36) (mean over 2 numbers, times 2). Step 1: d = (.6, .8), a = .8, r = (0, 1):
    #   alpha = -g . d = 0; dL/dd = -a g = (.384, -.288); g_1 = g_2
    # step 0: d = (1, 0), a = 5, r = (5, 1): alpha = .48; dL/dd = .48 r - 5 g = (4.8, -1.32); g_0 = (0, .36)
    expected = torch.tensor([[4.8, -1.32], [0.384, -0.288]]).double()
    torch.testing.assert_close(sae.W_dec.grad, expected)
    torch.testing.assert_close(sae.b_dec.grad, torch.tensor([0.0, -0.36]).double())


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize(
    ("batch", "d_sae", "settings"),
    [
        (20, 60, {}),
        (20, 60, {"residual_threshold": 1.5}),
        (20, 8, {"max_iterations": 30, "residual_threshold": 0.0}),  # few directions: they repeat
        (1, 60, {"max_iterations": 1}),
        (3, 1, {}),
        (5, 60, {"max_iterations": None}),
    ],
)
def test_steps_and_gradient_are_those_of_the_unrolled_loop(batch, d_sae, settings, stop):
    sae = make(d_sae=d_sae, stop_on_duplicate_support=stop, **settings)
    acts = torch.randn(batch, D_IN, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch, d_sae, dtype=torch.float64)
    residual, feature_acts = unrolled(sae, acts)
    torch.testing.assert_close(sae.encode(acts), feature_acts)
    torch.testing.assert_close(sae(acts), acts - residual)
    of = [sae.W_dec, sae.b_dec, acts]
    for mine, theirs in (
        (sae.training_loss(acts).total, residual.pow(2).mean()),
        ((sae.encode(acts) * weights).sum(), (feature_acts * weights).sum()),
        ((sae(acts) * weights.sum(1, keepdim=True)).sum(), ((acts - residual) * weights.sum(1, keepdim=True)).sum()),
    ):
        grads = [torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True) for loss in (mine, theirs)]
        for name, one, other in zip(("W_dec", "b_dec", "acts"), *grads, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize(
    ("d_sae", "settings"),
    [(60, {}), (60, {"residual_threshold": 1.5}), (8, {"max_iterations": 12, "residual_threshold": 0.0}), (1, {})],
)
def test_the_table_of_inner_products_gives_the_same_steps(d_sae, settings, stop, monkeypatch):
    monkeypatch.setattr(matching_pursuit, "_ROWS", 7)
    sae = make(d_sae=d_sae, stop_on_duplicate_support=stop, **settings)
    centred = torch.randn(30, D_IN, dtype=torch.float64)
    exact = matching_pursuit.pursue(centred, sae.W_dec, sae.cfg)
    by_gram = matching_pursuit.pursue_by_gram(centred, sae.W_dec, sae.cfg)
    torch.testing.assert_close(by_gram.residual, exact.residual)
    torch.testing.assert_close(by_gram.values, exact.values)
    taken = exact.values > 1e-12  # what rounding leaves of a projection of 0 may fall to any feature
    assert torch.equal(by_gram.features[taken], exact.features[taken])
    assert torch.equal(by_gram.is_new[taken], exact.is_new[taken])


def test_the_table_of_inner_products_is_used_where_it_pays():
    config = MatchingPursuitConfig(d_sae=4608, max_iterations=32)
    assert matching_pursuit.gram_pays(2048, 4608, config, torch.float32)
    assert not matching_pursuit.gram_pays(1, 4608, config, torch.float32)
    assert not matching_pursuit.gram_pays(2048, 16384, config, torch.float32)  # a table of 1 GiB


def test_the_loss_of_a_large_batch_is_that_of_its_reconstruction():
    sae, acts = make(), torch.randn(200, D_IN, dtype=torch.float64)
    assert matching_pursuit.gram_pays(200, D_SAE, sae.cfg, sae.dtype)
    acts[3, 2] = float("nan")
    losses = sae.training_loss(acts)
    assert losses.total.isnan()
    losses = sae.training_loss(acts[4:])
    losses.total.backward()
    torch.testing.assert_close(losses.reconstruction, (sae(acts[4:]) - acts[4:]).pow(2).mean().detach())
    codes = sae.encode(acts[4:]) != 0
    assert losses.l0.item() == pytest.approx(codes.sum(1).double().mean().item())
    assert torch.equal(losses.fired, codes.any(0))


def test_the_reconstruction_is_the_decoded_activations():
    sae, acts = make(), torch.randn(20, D_IN, dtype=torch.float64)
    torch.testing.assert_close(sae.decode(sae.encode(acts)), sae(acts))


def test_every_step_lowers_the_error():
    acts, errors = torch.randn(20, D_IN, dtype=torch.float64), []
    for n in range(1, 8):
        sae = new_sae(
            MatchingPursuitConfig(d_sae=D_SAE, max_iterations=n), d_in=D_IN, generator=torch.Generator().manual_seed(3)
        )
        errors.append((sae.double()(acts) - acts).norm(dim=1))
    assert (torch.stack(errors).diff(dim=0) <= 1e-12).all()


def test_a_token_stops_at_the_threshold_and_at_a_feature_it_has():
    # residual (0, 1) after one step: below 2, and not below 0.5
    acts = torch.tensor([[6.0, 1.0]], dtype=torch.float64)
    assert small(residual_threshold=2.0).encode(acts).tolist() == [[5.0, 0.0]]
    assert small(residual_threshold=0.61).encode(acts)[0, 1].item() == pytest.approx(0.8)
    # (2, 4): feature 1, then nothing above 0
    assert small().training_loss(torch.tensor([[3.0, 4.0]], dtype=torch.float64)).l0.item() == 1.0
    # a short row is taken again: half of what is left each time
    for stop, n_steps in ((True, 2), (False, 5)):
        sae = small(max_iterations=5, residual_threshold=0.0, stop_on_duplicate_support=stop)
        with torch.no_grad():
            sae.W_dec.copy_(torch.tensor([[0.5**0.5, 0.0], [0.0, 0.0]], dtype=torch.float64))
        losses = sae.training_loss(torch.tensor([[9.0, 0.0]], dtype=torch.float64))
        assert losses.reconstruction.item() == pytest.approx((8 / 2**n_steps) ** 2 / 2)
        assert losses.l0.item() == 1.0


def test_a_tokens_steps_do_not_depend_on_its_batch():
    sae, acts = make(residual_threshold=2.0), torch.randn(30, D_IN, dtype=torch.float64)
    alone = torch.cat([sae.encode(row[None]) for row in acts])
    torch.testing.assert_close(sae.encode(acts), alone)


def test_folding_moves_the_residuals_threshold_along():
    sae, acts = make(residual_threshold=1.5), torch.randn(30, D_IN, dtype=torch.float64)
    feature_acts = sae.encode(acts)
    sae.fold_(torch.zeros(D_IN), 0.5)
    assert sae.cfg.residual_threshold == 3.0
    torch.testing.assert_close(sae.encode(acts / 0.5), feature_acts / 0.5)


def test_it_has_two_parameters_and_reads_with_what_it_writes():
    sae = make()
    assert sorted(name for name, _ in sae.named_parameters()) == ["W_dec", "b_dec"]
    assert sorted(sae.state_dict()) == ["W_dec", "b_dec"]
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (D_IN, D_SAE, D_IN)


def test_a_row_of_zeros_takes_nothing():
    sae = make()
    losses = sae.training_loss(sae.b_dec.detach()[None])
    losses.total.backward()
    assert (losses.l0.item(), losses.total.item()) == (0.0, 0.0)
    assert not losses.fired.any()
    assert sae.W_dec.grad.isfinite().all()


def test_training_finds_the_toy_dictionary(trained_on_toys):
    result = trained_on_toys(MatchingPursuitConfig(d_sae=48, max_iterations=3), steps=100)
    assert result.explained_variance > 0.8
    assert result.l0 <= 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"d_sae": 0}, "d_sae"),
        ({"residual_threshold": -0.1}, "residual_threshold"),
        ({"max_iterations": 0}, "max_iter"),
    ],
)
def test_impossible_settings_of_matching_pursuit_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MatchingPursuitConfig(**{"d_sae": 8, **settings})
