"""Patching by gradients: the effect of every cell from a few passes, estimated instead of run.

With ``base`` and ``source`` the values that a cell has in the run and would be given, and m the metric, the effect
m(source) - m(base) is estimated as (source - base) . g, summed over the cell's positions and columns, where g is

``attribution``: the gradient of m at the base run (Nanda 2023; Syed et al. 2023, arXiv 2310.10348, eq. 2). One pass
for all hooks; exact where m is linear in the cell.

``ig``: the mean of the gradient along a straight line (Sundararajan et al. 2017, arXiv 1703.01365, eq. 1), on which
*all cells of one hook move together* from base to source, at ``steps`` midpoints. Everything before the hook stays as
in the base run. One pass of ``steps`` rows for each hook. The estimates of one hook add up to the effect of patching
all its cells at once, up to the error of the midpoint rule.

``ig_inputs``: the same mean along the line on which the *input of the first block* moves from the base prompt's to
the source prompt's, at all positions, and all later activations follow (Hanna et al. 2024, arXiv 2403.17806, eq. 3).
One pass of ``steps`` rows for all hooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.interp.feature_gradients import straight_path
from saelab.interp.patch_metrics import Metric
from saelab.interp.patch_runs import Progress, measured
from saelab.interp.patch_sites import Site
from saelab.interp.replacements import Values
from saelab.models.load import EditFn, Model

#: Where every later activation follows from.
INPUT = "blocks.0.hook_resid_pre"


def attributions(
    model: Model,
    ids: Int[Tensor, "1 seq"],
    sites: Sequence[Site],
    base: Values,
    source: Values,
    metric: Metric,
) -> Float[Tensor, " sites"]:
    """Gradient at the base run times difference, for each site."""
    return _dotted(sites, base, source, gradients(model, ids, _hooks(sites), metric))


def integrated_attributions(
    model: Model,
    ids: Int[Tensor, "1 seq"],
    sites: Sequence[Site],
    base: Values,
    source: Values,
    metric: Metric,
    *,
    steps: int,
    progress: Progress | None = None,
) -> Float[Tensor, " sites"]:
    """Mean gradient along the line on which all ``sites`` of a hook move together, times difference, for each site.

    Raises:
        ConfigError: fewer than one step, or two sites of one hook that overlap.
    """
    found: dict[str, Tensor] = {}
    for number, hook_name in enumerate(_hooks(sites)):
        here = [site for site in sites if site.hook_name == hook_name]
        _check_apart(here)
        width = model.hook_width(hook_name)
        whole = torch.stack([change(site, base, source, width=width) for site in here]).sum(0)
        moved = [(hook_name, _adding(straight_path(torch.zeros_like(whole), whole, steps=steps)))]
        found |= gradients(model, ids.expand(steps, -1), [hook_name], metric, under=moved)
        if progress:
            progress(number + 1, len(_hooks(sites)), "hooks")
    return _dotted(sites, base, source, found)


def input_attributions(
    model: Model,
    ids: Int[Tensor, "1 seq"],
    source_ids: Int[Tensor, "1 seq"],
    sites: Sequence[Site],
    base: Values,
    source: Values,
    metric: Metric,
    *,
    steps: int,
) -> Float[Tensor, " sites"]:
    """Mean gradient along the line from the base prompt's input to the source prompt's, times difference.

    Raises:
        ConfigError: fewer than one step.
    """
    start, end = (model.capture(prompt, [INPUT])[INPUT][0].float() for prompt in (ids, source_ids))
    moved = [(INPUT, _adding(straight_path(torch.zeros_like(start), end - start, steps=steps)))]
    found = gradients(model, ids.expand(steps, -1), _hooks(sites), metric, under=moved)
    return _dotted(sites, base, source, found)


def gradients(
    model: Model,
    ids: Int[Tensor, "rows seq"],
    hook_names: Sequence[str],
    metric: Metric,
    *,
    under: Sequence[tuple[str, EditFn]] = (),
) -> dict[str, Float[Tensor, "seq width"]]:
    """Gradient of the metric with respect to the activations at each hook under the edits ``under``, mean over rows.

    It is 0 at BOS, which edits do not reach.

    Raises:
        ConfigError: the metric is not a differentiable function of the logits.
    """
    rows, seq = ids.shape
    leaves = {
        name: torch.zeros(rows, seq, model.hook_width(name), device=model.device, requires_grad=True)
        for name in hook_names
    }
    with model.edits([*under, *((name, _adding(leaf)) for name, leaf in leaves.items())]):
        values = measured(metric, model.logits(ids, with_gradients=True))
    if not values.requires_grad:
        raise ConfigError("the metric has no gradient, so it can be patched exactly only; give method='exact'")
    grads = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf[0]) if grad is None else grad.mean(0)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def change(site: Site, base: Values, source: Values, *, width: int) -> Float[Tensor, "seq width"]:
    """What patching the site adds to the activations at its hook; 0 outside of it."""
    difference = source[site.key].float() - base[site.key].float()
    total = torch.zeros(len(difference), width, device=difference.device)
    where = list(site.positions)
    if site.feature is not None:
        total[where] = difference[where, None] * site.feature.direction.float().to(total.device)
    else:
        columns = slice(*(site.columns or (None, None)))
        total[where, columns] = difference[where, columns]
    return total


def _adding(moved: Float[Tensor, "#rows seq width"]) -> EditFn:
    return lambda acts, keep: (acts.float() + moved).to(acts.dtype)


def _hooks(sites: Sequence[Site]) -> list[str]:
    return list(dict.fromkeys(site.hook_name for site in sites))


def _dotted(
    sites: Sequence[Site], base: Values, source: Values, grads: dict[str, Float[Tensor, "seq width"]]
) -> Float[Tensor, " sites"]:
    slopes = [grads[site.hook_name] for site in sites]
    pairs = zip(sites, slopes, strict=True)
    return torch.stack([(change(site, base, source, width=g.shape[1]) * g).sum() for site, g in pairs])


def _check_apart(sites: Sequence[Site]) -> None:
    """Raise ConfigError when two sites of a hook replace the same thing, so that they could not move together."""
    taken: set[tuple[int, int]] = set()
    for site in sites:
        first, stop = site.columns or (0, 1)
        entries = (site.feature.index,) if site.feature is not None else range(first, stop)
        places = {(position, entry) for position in site.positions for entry in entries}
        if places & taken:
            raise ConfigError(f"two cells at {site.hook_name} overlap, so they have no integrated gradient; part them")
        taken |= places
