"""Activation patching: what happens to a metric when activations of a run are replaced by those of another, or by none.

Two prompts that differ in one fact are run; then each cell of a grid (a layer and a position, a head, a feature at a
token) is replaced in one of them by its value in the other:

``denoise``: the corrupt prompt is run and clean values are put in, which finds what suffices to restore the answer;
``noise``: the clean prompt is run and corrupt values are put in, which finds what is necessary for it.

With ablations there is one prompt, and what is put in carries nothing of it. Effects are always the metric of the
patched run minus that of the run as it is; `PatchGrid.shares` divides them by the effect of replacing everything.
Source: Meng et al. 2022, arXiv 2202.05262, section 2; Heimersheim and Nanda 2024, arXiv 2404.15255 (the directions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.interp.attribution_patching import attributions, input_attributions, integrated_attributions
from saelab.interp.patch_metrics import Metric
from saelab.interp.patch_runs import Progress, run_patched
from saelab.interp.patch_sites import Cells, Granularity, Site, cells, check_word
from saelab.interp.prompt_pairs import prompt_pair
from saelab.interp.replacements import Ablation, Values, ablations, from_run
from saelab.models.load import Model
from saelab.sae.base import Feature

Direction = Literal["denoise", "noise"]
Method = Literal["exact", "attribution", "ig", "ig_inputs"]

#: Steps of integrated gradients; on the demo model 5 and 10 agree with exact patching equally well.
DEFAULT_STEPS = 10


@dataclass(frozen=True)
class PatchGrid:
    """The effect of replacing each cell of a grid, in units of the metric."""

    effects: Float[Tensor, "rows columns"]
    """The metric of the patched run minus ``base``; for an approximation its estimate."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    base: float
    """The metric of the run as it is."""
    target: float | None
    """The metric of the run whose values are put in; None for an ablation, which has no such run."""
    at: str
    """What a cell is, for example ``resid_post``."""
    kind: str
    """What is replaced by what: ``denoise``, ``noise``, or ``zero``, ``mean`` or ``resample`` for an ablation."""
    method: str
    """``exact``, or how it was approximated."""
    metric: str
    tokens: tuple[str, ...]
    """The text that was run, BOS included."""
    other_tokens: tuple[str, ...] = ()
    """The text whose values were put in; empty for an ablation."""

    @property
    def has_shares(self) -> bool:
        """Whether there is a target, and it is elsewhere than the run is already."""
        return self.target is not None and self.target != self.base

    @property
    def shares(self) -> Float[Tensor, "rows columns"]:
        """``effects / (target - base)``: 0 where a cell does nothing, 1 where it does what replacing everything does.

        Raises:
            ConfigError: there is no target, or it is where the run is already, so that there is nothing to share.
        """
        if self.target is None or not self.has_shares:
            raise ConfigError(
                f"the {self.metric} goes from {self.base:.4g} to {self.target}, so effects have no shares; read effects"
            )
        return self.effects / (self.target - self.base)


def patch(
    model: Model,
    clean: str,
    corrupt: str,
    *,
    metric: Metric,
    at: Granularity = "resid_post",
    method: Method = "exact",
    direction: Direction = "denoise",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    features: Sequence[Feature] = (),
    steps: int = DEFAULT_STEPS,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PatchGrid:
    """Replace each cell of ``at`` in one prompt's run by its value in the other's, and see what the metric does.

    ``metric`` makes logits [runs, seq, d_vocab] one number a run, such as ``logit_difference(right, wrong)`` of
    `saelab.interp.patch_metrics`. ``layers`` and ``positions`` choose among all; a head is patched at all positions
    together. ``features`` are what ``at="feature"`` patches, for example ``[sae.feature(12)]``. ``batch_size`` is in
    runs; by default it bounds the memory.

    The approximations are those of `saelab.interp.attribution_patching`; ``steps`` is for the integrated gradients.
    Give a model in float32: in bfloat16 the logits are rounded more coarsely than most cells move them.

    Raises:
        TextError: the prompts are not aligned.
        ConfigError: an unknown granularity, method, direction, layer or position, a metric without gradient for an
            approximation, or overlapping cells (``position``) for one.
        ShapeError: the metric does not give one number a run, or the model does not fit the features' SAE.
    """
    check_word(method, Method, "method")
    ids, source_ids = aligned(model, clean, corrupt, direction)
    tokens = tuple(model.str_tokens(ids[0]))
    grid = cells(model, at, tokens, layers=layers, positions=positions, features=features)
    source = from_run(model, source_ids, _sites(grid))
    base = _value(model, ids, metric)
    if method == "ig_inputs":

        def estimate(sites: Sequence[Site], base: Values, values: Values) -> Float[Tensor, " sites"]:
            return input_attributions(model, ids, source_ids, sites, base, values, metric, steps=steps)

        effects = _estimated(model, ids, grid, [source], estimate)
    else:
        effects = _effects(
            model,
            ids,
            grid,
            [source],
            metric,
            base=base,
            method=method,
            steps=steps,
            batch_size=batch_size,
            progress=progress,
        )
    return PatchGrid(
        effects=effects.reshape(len(grid.rows), len(grid.columns)).cpu(),
        rows=grid.rows,
        columns=grid.columns,
        base=base,
        target=_value(model, source_ids, metric),
        at=at,
        kind=direction,
        method=method,
        metric=metric_name(metric),
        tokens=tokens,
        other_tokens=tuple(model.str_tokens(source_ids[0])),
    )


def ablate(
    model: Model,
    text: str,
    *,
    metric: Metric,
    by: Ablation,
    texts: Sequence[str] = (),
    at: Granularity = "resid_post",
    method: Method = "exact",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    features: Sequence[Feature] = (),
    n_draws: int = 8,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PatchGrid:
    """As `patch`, with one prompt: cells are replaced by zeros, by their mean over ``texts``, or by what they are in
    ``n_draws`` of the ``texts``, whose effects are averaged (see `saelab.interp.replacements.ablations`).

    Raises:
        ConfigError: as `patch`, or ``ig_inputs``, which needs a second prompt, or texts where none are needed.
        TextError: too few of the texts are as long as the prompt.
        ShapeError: as `patch`.
    """
    check_word(method, Method, "method")
    if method == "ig_inputs":
        raise ConfigError("ig_inputs moves from one prompt to another, and an ablation has one; give method='ig'")
    ids = model.to_tokens(text).ids
    tokens = tuple(model.str_tokens(ids[0]))
    grid = cells(model, at, tokens, layers=layers, positions=positions, features=features)
    sources = ablations(model, ids, _sites(grid), by=by, texts=texts, n_draws=n_draws, seed=seed)
    base = _value(model, ids, metric)
    effects = _effects(
        model,
        ids,
        grid,
        sources,
        metric,
        base=base,
        method=method,
        steps=steps,
        batch_size=batch_size,
        progress=progress,
    )
    return PatchGrid(
        effects=effects.reshape(len(grid.rows), len(grid.columns)).cpu(),
        rows=grid.rows,
        columns=grid.columns,
        base=base,
        target=None,
        at=at,
        kind=by,
        method=method,
        metric=metric_name(metric),
        tokens=tokens,
    )


class Runs(NamedTuple):
    base: Int[Tensor, "1 seq"]  # the prompt that is run
    source: Int[Tensor, "1 seq"]  # the prompt whose values are put in


def aligned(model: Model, clean: str, corrupt: str, direction: Direction) -> Runs:
    """The prompts in the part that ``direction`` gives them.

    Raises:
        ConfigError: an unknown direction.
        TextError: the prompts are not aligned.
    """
    check_word(direction, Direction, "direction")
    pair = prompt_pair(model, clean, corrupt)
    return Runs(pair.corrupt, pair.clean) if direction == "denoise" else Runs(pair.clean, pair.corrupt)


def metric_name(metric: Metric) -> str:
    """What a metric is called: the function that it is or, for the nameless ones of `patch_metrics`, that made it."""
    *makers, own = getattr(metric, "__qualname__", type(metric).__qualname__).split(".<locals>.")
    return makers[-1] if makers and own in ("metric", "<lambda>") else own


#: From sites, their values in the run and the values to put in, to an estimate of the effect of each.
Estimate = Callable[[Sequence[Site], Values, Values], Float[Tensor, " sites"]]


def _effects(
    model: Model,
    ids: Int[Tensor, "1 seq"],
    grid: Cells,
    sources: Sequence[Values],
    metric: Metric,
    *,
    base: float,
    method: str,
    steps: int,
    batch_size: int | None,
    progress: Progress | None,
) -> Float[Tensor, " cells"]:
    """Effect of each cell on a metric that is ``base`` without it, row by row; the mean over ``sources``."""
    if method == "exact":
        patches = [patched for row in grid.sites for patched in row]
        rows = [[(site, values[site.key]) for site in patched] for values in sources for patched in patches]
        found = run_patched(model, ids, rows, metric, batch_size=batch_size, progress=progress)
        return found.view(len(sources), len(patches)).mean(0) - base

    def estimate(sites: Sequence[Site], base: Values, values: Values) -> Float[Tensor, " sites"]:
        if method == "attribution":
            return attributions(model, ids, sites, base, values, metric)
        return integrated_attributions(model, ids, sites, base, values, metric, steps=steps, progress=progress)

    return _estimated(model, ids, grid, sources, estimate)


def _estimated(
    model: Model, ids: Int[Tensor, "1 seq"], grid: Cells, sources: Sequence[Values], estimate: Estimate
) -> Float[Tensor, " cells"]:
    if any(len(patched) > 1 for row in grid.sites for patched in row):
        raise ConfigError("cells of several hooks (at='position') have no gradient of their own; give method='exact'")
    sites = _sites(grid)
    base = from_run(model, ids, sites)
    return torch.stack([estimate(sites, base, values) for values in sources]).mean(0)


def _sites(grid: Cells) -> list[Site]:
    return [site for row in grid.sites for patched in row for site in patched]


def _value(model: Model, ids: Int[Tensor, "1 seq"], metric: Metric) -> float:
    return float(run_patched(model, ids, [()], metric)[0])
