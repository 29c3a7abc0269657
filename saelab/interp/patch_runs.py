"""Runs of one text in which each row of the batch has something else replaced: exact activation patching."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError, ShapeError
from saelab.interp.patch_metrics import Metric
from saelab.interp.patch_sites import Site
from saelab.models.load import EditFn, Model

Progress = Callable[[int, int, str], None]

#: A site, and what is put there: [seq, width], or [seq] for the activation of a feature.
Change = tuple[Site, Tensor]

#: Tokens of all runs in one forward pass by default: bounds the memory that logits and their gradients take.
_TOKENS_AT_ONCE = 512


def rows_at_once(seq: int, batch_size: int | None = None) -> int:
    """Runs of a text of ``seq`` tokens in one forward pass: ``batch_size``, or as many as memory is meant to hold.

    Raises:
        ConfigError: a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1 run, got {batch_size}; leave it out for the default")
    return batch_size or max(1, _TOKENS_AT_ONCE // seq)


@torch.no_grad()
def run_patched(
    model: Model,
    ids: Int[Tensor, "1 seq"],
    rows: Sequence[Sequence[Change]],
    metric: Metric,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, " rows"]:
    """The metric of one run of ``ids`` for each row of changes. A row without changes is the run as it is.

    Changes at several hooks act one after the other, as the forward pass meets them. Features at one hook are all
    read before the first of them is replaced, so their order does not matter.

    Raises:
        ConfigError: an unknown hook, a position outside the text or 0 (which is never edited), no row, or a batch
            size below 1.
        ShapeError: values of another shape than the site's, or a metric that gives other than one number a run.
    """
    n_rows = rows_at_once(ids.shape[1], batch_size)
    if not rows:
        raise ConfigError("there is no run to patch; give at least one row of changes, which may be empty")
    for row in rows:
        for site, values in row:
            _check(model, site, values, seq=ids.shape[1])
    found = []
    for start in range(0, len(rows), n_rows):
        batch = rows[start : start + n_rows]
        with model.edits(changing(batch)):
            found.append(measured(metric, model.logits(ids.expand(len(batch), -1))))
        if progress:
            progress(start + len(batch), len(rows), "runs")
    return torch.cat(found)


def measured(metric: Metric, logits: Float[Tensor, "runs seq d_vocab"]) -> Float[Tensor, " runs"]:
    """``metric(logits)``, checked to be one number a run.

    Raises:
        ShapeError: it is not.
        ConfigError: it is not finite.
    """
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"a metric must make logits of {len(logits)} runs a tensor of shape ({len(logits)},), got {shape}"
        )
    if not values.isfinite().all():
        raise ConfigError("the metric is not a finite number on one of the runs; choose another metric or replacement")
    return values


def changing(rows: Sequence[Sequence[Change]]) -> list[tuple[str, EditFn]]:
    """The edits that make the changes of each row of a batch, and leave the other rows alone."""
    by_hook: dict[str, list[tuple[int, Site, Tensor]]] = {}
    for number, row in enumerate(rows):
        for site, values in row:
            by_hook.setdefault(site.hook_name, []).append((number, site, values))
    return [(hook_name, _replacing(changes)) for hook_name, changes in by_hook.items()]


def _replacing(changes: Sequence[tuple[int, Site, Tensor]]) -> EditFn:
    def edited(acts: Float[Tensor, "batch seq width"], keep: Tensor) -> Float[Tensor, "batch seq width"]:
        before = acts.clone()
        for row, site, values in changes:
            where = list(site.positions)
            if site.feature is None:
                columns = slice(*(site.columns or (None, None)))
                acts[row, where, columns] = values[where, columns].to(acts)
            else:
                change = values[where] - site.feature.activation(before[row, where].float())
                moved = acts[row, where].float() + change.unsqueeze(-1) * site.feature.direction.to(acts.device)
                acts[row, where] = moved.to(acts.dtype)
        return acts

    return edited


def _check(model: Model, site: Site, values: Tensor, *, seq: int) -> None:
    if not site.positions or not all(0 < p < seq for p in site.positions):
        raise ConfigError(
            f"the positions {site.positions} at {site.hook_name} are not all between 1 and {seq - 1}; position 0 is"
            " BOS and never edited"
        )
    width = model.hook_width(site.hook_name)
    if site.feature is not None and not site.feature.sae.d_in == site.feature.direction.numel() == width:
        raise ShapeError(
            f"{site.hook_name} of {model.name} has width {width}, but the SAE of feature {site.feature.index} reads"
            f" {site.feature.sae.d_in} and writes {tuple(site.feature.direction.shape)}; give an SAE of this hook"
        )
    expected = (seq,) if site.feature is not None else (seq, width)
    if values.shape != expected:
        raise ShapeError(f"the values for {site.hook_name} have shape {tuple(values.shape)}, not {expected}")
