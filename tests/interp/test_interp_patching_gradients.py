from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.interp.attribution_patching import attributions, gradients, integrated_attributions
from saelab.interp.patch_agreement import agreement
from saelab.interp.patch_metrics import logit_difference
from saelab.interp.patch_runs import run_patched
from saelab.interp.patch_sites import Site
from saelab.interp.patching import PatchGrid, patch
from saelab.interp.prompt_pairs import prompt_pair
from saelab.interp.replacements import from_run
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.relu import ReLUConfig

CLEAN, CORRUPT = "the king of the north island was old", "the people of the south island was old"
METRIC = logit_difference(20, 30)


@pytest.fixture(scope="module")
def pair(tiny_model):
    return prompt_pair(tiny_model, CLEAN, CORRUPT)


@pytest.fixture(scope="module")
def everywhere(pair):
    return tuple(range(1, pair.clean.shape[1]))


def full_effect(model, pair, hook_name, everywhere) -> float:
    site = Site(hook_name, everywhere)
    row = [(site, from_run(model, pair.clean, [site])[site.key])]
    patched, base = run_patched(model, pair.corrupt, [row, ()], METRIC).tolist()
    return patched - base


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"])
def test_gradients_are_the_slopes_of_finite_differences(tiny_model, pair, hook_name):
    slope = gradients(tiny_model, pair.clean, [hook_name], METRIC)[hook_name]
    position, generator = pair.clean.shape[1] - 1, torch.Generator().manual_seed(0)
    direction = torch.randn(slope.shape[1], generator=generator)
    site = Site(hook_name, (position,))
    here = from_run(tiny_model, pair.clean, [site])[site.key]
    rows = []
    for size in (-1e-2, 1e-2):
        moved = here.clone()
        moved[position] += size * direction
        rows.append([(site, moved)])
    down, up = run_patched(tiny_model, pair.clean, rows, METRIC).double().tolist()
    assert float(slope[position] @ direction) == pytest.approx((up - down) / 2e-2, rel=2e-2, abs=2e-3)


def test_bos_has_no_gradient(tiny_model, pair):
    (slope,) = gradients(tiny_model, pair.clean, ["blocks.0.hook_resid_pre"], METRIC).values()
    assert not slope[0].any()
    assert slope[1:].any(1).all()


def test_attribution_is_exact_where_the_metric_is_linear(tiny_model, pair, everywhere):
    """Behind the last norm a logit difference is linear in the activations."""
    sites = [Site("unembed.hook_in", (p,)) for p in everywhere]
    base, source = (from_run(tiny_model, ids, sites) for ids in (pair.corrupt, pair.clean))
    estimate = attributions(tiny_model, pair.corrupt, sites, base, source, METRIC)
    rows = [[(site, source[site.key])] for site in sites]
    exact = run_patched(tiny_model, pair.corrupt, [*rows, ()], METRIC)
    torch.testing.assert_close(estimate, exact[:-1] - exact[-1], rtol=1e-4, atol=1e-4)
    assert estimate.abs().max() > 0.1


@pytest.mark.parametrize("at", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_integrated_gradients_of_a_layer_add_up_to_the_effect_of_patching_all_of_it(tiny_model, pair, everywhere, at):
    grid = patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, at=at, method="ig", steps=64)
    whole = [full_effect(tiny_model, pair, f"blocks.{layer}.hook_{at}", everywhere) for layer in range(3)]
    torch.testing.assert_close(grid.effects.sum(1), torch.tensor(whole), rtol=1e-2, atol=1e-2)


def test_integrated_gradients_of_heads_add_up_to_the_attention_output(tiny_model, pair, everywhere):
    grid = patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, at="head", method="ig", steps=64)
    whole = [full_effect(tiny_model, pair, f"blocks.{layer}.hook_attn_out", everywhere) for layer in range(3)]
    torch.testing.assert_close(grid.effects.sum(1), torch.tensor(whole), rtol=1e-2, atol=1e-2)


def test_plain_gradients_do_not_add_up(tiny_model, pair, everywhere):
    grid = patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, method="attribution")
    whole = [full_effect(tiny_model, pair, f"blocks.{layer}.hook_resid_post", everywhere) for layer in range(3)]
    assert not torch.allclose(grid.effects.sum(1), torch.tensor(whole), rtol=5e-2, atol=5e-2)


def test_moving_the_input_is_moving_the_first_residual_stream(tiny_model):
    arguments = {"metric": METRIC, "at": "resid_pre", "layers": [0], "steps": 7}
    ours = patch(tiny_model, CLEAN, CORRUPT, method="ig_inputs", **arguments)
    theirs = patch(tiny_model, CLEAN, CORRUPT, method="ig", **arguments)
    torch.testing.assert_close(ours.effects, theirs.effects, rtol=1e-3, atol=1e-4)
    later = {**arguments, "layers": [2], "at": "mlp_out"}
    ours = patch(tiny_model, CLEAN, CORRUPT, method="ig_inputs", **later)
    theirs = patch(tiny_model, CLEAN, CORRUPT, method="ig", **later)
    assert not torch.allclose(ours.effects, theirs.effects, rtol=1e-2, atol=1e-3)


def test_the_gradient_of_a_feature_is_that_along_its_direction(tiny_model, pair, everywhere):
    """A ReLU feature that stays on moves along its decoder direction, so a small move has the effect that is said."""
    hook_name = "blocks.1.hook_resid_post"
    sae = new_sae(ReLUConfig(d_sae=64), d_in=32, generator=torch.Generator().manual_seed(0))
    sae.metadata = Metadata(hook_name=hook_name)
    position = everywhere[-1]
    acts = tiny_model.capture(pair.clean, [hook_name])[hook_name][0, position]
    site = Site(hook_name, (position,), feature=sae.feature(int(sae.encode(acts).argmax())))
    base = from_run(tiny_model, pair.clean, [site])
    source = {site.key: base[site.key] + 0.02}
    estimate = attributions(tiny_model, pair.clean, [site], base, source, METRIC)
    row = [(site, source[site.key])]
    patched, plain = run_patched(tiny_model, pair.clean, [row, ()], METRIC).tolist()
    assert float(estimate[0]) == pytest.approx(patched - plain, rel=2e-2)


def test_features_move_together_on_the_path(tiny_model, pair, everywhere):
    hook_name = "blocks.1.hook_resid_post"
    sae = new_sae(ReLUConfig(d_sae=64), d_in=32, generator=torch.Generator().manual_seed(0))
    sae.metadata = Metadata(hook_name=hook_name)
    sites = [Site(hook_name, everywhere, feature=sae.feature(i)) for i in range(64)]
    base, source = (from_run(tiny_model, ids, sites) for ids in (pair.corrupt, pair.clean))
    estimate = integrated_attributions(tiny_model, pair.corrupt, sites, base, source, METRIC, steps=64)
    row = [(site, source[site.key]) for site in sites]
    patched, plain = run_patched(tiny_model, pair.corrupt, [row, ()], METRIC).tolist()
    assert float(estimate.sum()) == pytest.approx(patched - plain, rel=2e-2, abs=1e-2)


def test_cells_that_overlap_have_no_path(tiny_model, pair):
    sites = [Site("blocks.1.hook_resid_post", where) for where in ((1, 2), (2, 3))]
    values = from_run(tiny_model, pair.clean, sites)
    with pytest.raises(ConfigError, match=r"two cells at blocks\.1\.hook_resid_post overlap"):
        integrated_attributions(tiny_model, pair.corrupt, sites, values, values, METRIC, steps=2)


def grid_of(effects: torch.Tensor) -> PatchGrid:
    rows, columns = effects.shape
    labels = tuple(map(str, range(max(rows, columns))))
    return PatchGrid(
        effects=effects, rows=labels[:rows], columns=labels[:columns], base=0.0, target=1.0, at="resid_post",
        kind="denoise", method="exact", metric="m", tokens=("a",),
    )  # fmt: skip


def test_agreement_is_the_pearson_correlation_over_all_cells():
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(3, 5, generator=generator) for _ in range(4)]
    near = [2 * x + 0.3 * torch.randn(3, 5, generator=generator) for x in exact]
    found = agreement([grid_of(x) for x in exact], [grid_of(y) for y in near])
    x, y = (torch.cat(grids).flatten().numpy() for grids in (exact, near))
    assert found.pooled.value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert found.pooled.low < found.pooled.value < found.pooled.high
    expected = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(exact, near, strict=True)]
    assert found.by_pair == pytest.approx(expected, abs=1e-6)
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-5)
    assert found.n_cells == 60


def test_what_cannot_be_compared_is_refused():
    grid, flat = grid_of(torch.arange(6.0).view(2, 3)), grid_of(torch.ones(2, 3))
    with pytest.raises(ShapeError, match="other cells"):
        agreement([grid], [grid_of(torch.arange(8.0).view(2, 4))])
    with pytest.raises(ConfigError, match="all the same"):
        agreement([grid], [flat])
    with pytest.raises(ConfigError, match="0 exact and 0 approximate"):
        agreement([], [])
