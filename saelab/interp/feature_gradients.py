"""A metric as a function of what an SAE sees at its hook, with gradients.

    acts = feature_acts @ W_dec + b_dec + error                            (the error: what the SAE does not explain)

Since the decoder is linear, the gradient with respect to feature i at a token is the gradient with respect to the
activations along row i of ``W_dec``: one backward pass serves all features. Everything is taken on runs of one text,
in which the activations at one hook are replaced; BOS is never replaced, so nothing is attributed to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError, ShapeError
from saelab.interp.patch_metrics import Metric
from saelab.interp.patch_runs import measured, rows_at_once
from saelab.models.load import EditFn, Model
from saelab.sae.base import SAE

#: Several values a run of what it makes at a later hook: ``fn(acts [runs, seq, d]) -> [runs, readouts]``.
Readout = Callable[[Float[Tensor, "runs seq d_model"]], Float[Tensor, "runs readouts"]]

#: Activations of hooks that keep them whatever happens before.
Held = Mapping[str, Float[Tensor, "seq d_model"]]


class Decomposition(NamedTuple):
    """Activations of a text as an SAE sees them."""

    feature_acts: Float[Tensor, "seq d_sae"]
    error: Float[Tensor, "seq d_model"]


def hook_of(model: Model, sae: SAE) -> str:
    """The hook of ``model`` that ``sae`` reads and reconstructs.

    Raises:
        ConfigError: the SAE writes elsewhere than it reads (a transcoder, a crosscoder), or names no hook of the model.
        ShapeError: the hook has another width than the SAE.
    """
    about = sae.metadata
    if sae.n_slots is not None or sae.W_dec.ndim != 2 or len(about.sources) > 1 or about.reads != "activations":
        raise ConfigError(
            f"an SAE of architecture {sae.cfg.arch!r} does not reconstruct the one hook that it reads, so there is no "
            "decomposition of activations into its features and an error; give a plain SAE"
        )
    hook_name = model.check_hook(about.hook_name)
    if model.hook_width(hook_name) != sae.d_in:
        raise ShapeError(
            f"{hook_name} of {model.name} has width {model.hook_width(hook_name)}, but the SAE reads width {sae.d_in}; "
            "give the model that the SAE was trained on"
        )
    return hook_name


@torch.no_grad()
def decomposed(sae: SAE, acts: Float[Tensor, "seq d_model"]) -> Decomposition:
    """``acts`` as feature activations and the error that they leave."""
    acts = acts.to(sae.dtype)
    feature_acts = sae.encode(acts)
    return Decomposition(feature_acts, acts - sae.decode(feature_acts))


@torch.no_grad()
def recomposed(sae: SAE, parts: Decomposition) -> Float[Tensor, "seq d_model"]:
    """The activations that ``parts`` are the parts of."""
    return sae.decode(parts.feature_acts) + parts.error


def straight_path(
    start: Float[Tensor, "seq d_model"], end: Float[Tensor, "seq d_model"], *, steps: int
) -> Float[Tensor, "steps seq d_model"]:
    """Middles of ``steps`` equal stretches of the straight line from ``start`` to ``end``.

    The mean over middles errs by O(1 / steps^2) in an integral, that over ends by O(1 / steps).

    Raises:
        ConfigError: no steps.
    """
    if steps < 1:
        raise ConfigError(f"integrated gradients need at least 1 step, got {steps}; 16 is usual")
    shares = (torch.arange(steps, device=start.device, dtype=start.dtype) + 0.5) / steps
    return start + shares[:, None, None] * (end - start)


def metric_values(
    model: Model, ids: Int[Tensor, " seq"], hook_name: str, acts: Float[Tensor, "runs seq d_model"], metric: Metric
) -> Float[Tensor, " runs"]:
    """The metric of the text in runs with ``acts`` at the hook (BOS excepted).

    Raises:
        ShapeError: the metric does not give one number a run.
        ConfigError: it is not finite.
    """
    values = []
    for part in acts.split(rows_at_once(len(ids))):
        with model.edit(hook_name, replacing(part)):
            values.append(measured(metric, model.logits(ids.expand(len(part), -1))))
    return torch.cat(values)


def mean_readout_gradients(
    model: Model,
    ids: Int[Tensor, " seq"],
    hook_name: str,
    acts: Float[Tensor, "runs seq d_model"],
    later_hook: str,
    readout: Readout,
    *,
    frozen: Held | None = None,
) -> Float[Tensor, "readouts seq d_model"]:
    """Gradients of what runs make at a later hook, the mean over the runs; the forward pass ends there.

    What passes through ``frozen`` hooks between the two does not count.
    """
    totals: Tensor | float = 0.0
    for part in acts.split(rows_at_once(len(ids))):
        leaf = part.detach().requires_grad_()
        seen: list[Tensor] = []

        def look(here: Tensor, keep: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(readout(here.float()))
            raise _Seen

        edits = [(hook_name, replacing(leaf)), *holding(frozen, runs=len(part)), (later_hook, look)]
        with torch.enable_grad(), contextlib.suppress(_Seen), model.edits(edits):
            model.logits(ids.expand(len(part), -1), with_gradients=True)
        totals = totals + torch.stack([_gradient(column, leaf).sum(0) for column in seen[0].unbind(1)])
    assert isinstance(totals, Tensor)  # a path has at least one step
    return totals / len(acts)


class _Seen(Exception):
    """The later hook has been read, so the rest of the forward pass is not needed."""


def replacing(new: Float[Tensor, "runs seq d_model"]) -> EditFn:
    """Put ``new`` in the place of the activations."""
    return lambda acts, keep: new.to(acts)


def holding(frozen: Held | None, *, runs: int) -> list[tuple[str, EditFn]]:
    """The edits that keep the activations of ``frozen`` hooks in each of the runs."""
    return [(name, replacing(acts.expand(runs, -1, -1))) for name, acts in (frozen or {}).items()]


def _gradient(values: Float[Tensor, " runs"], leaf: Float[Tensor, "runs seq d_model"]) -> Tensor:
    (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True, materialize_grads=True)
    return gradient
