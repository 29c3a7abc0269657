"""Attribution: which features of an SAE, at which tokens, move a metric, and how much the SAE's error does.

    A_i = (f_i - f'_i) * integral over a in 0..1 of dM/df_i at x' + a (x - x')      (Sundararajan et al. 2017, eq. 1)

x are the activations at the SAE's hook on the text, x' those of a baseline, f and f' the feature activations; the error
is treated like one more feature with a direction of its own at each token. Along the path the activations move on a
straight line, so that sum A = M(x) - M(x') whatever the SAE's architecture: nothing is lost, and what the SAE does
not explain shows as the error's share. One step is plain gradient x difference at the middle of the path.
Source for features and error as nodes: Marks et al. 2024, arXiv 2403.19647, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError, TextError
from saelab.interp.attribution_patching import gradients
from saelab.interp.feature_gradients import (
    Decomposition,
    Held,
    decomposed,
    holding,
    hook_of,
    metric_values,
    recomposed,
    replacing,
    straight_path,
)
from saelab.interp.patch_metrics import Metric
from saelab.interp.patch_runs import rows_at_once
from saelab.interp.prompt_pairs import prompt_pair
from saelab.models.load import Model
from saelab.sae.base import SAE

#: Steps at which the sum agrees with the effect to about a percent on the demo model; more cost proportionally.
DEFAULT_STEPS = 16


class Part(NamedTuple):
    """A feature, or the error (``feature`` None), at one token."""

    position: int  # index into the text's tokens, 0 is BOS
    feature: int | None
    act: float  # on the text: activation of the feature, norm of the error
    baseline_act: float  # the same in the baseline
    attribution: float  # in units of the metric


@dataclass(frozen=True)
class Attribution:
    """What each feature and the error contribute to ``clean_value - baseline_value`` at each token of a text."""

    hook_name: str
    tokens: tuple[str, ...]
    """The text's tokens, BOS included; nothing is attributed to BOS."""
    token_ids: tuple[int, ...]
    clean: Decomposition
    baseline: Decomposition
    baseline_is_text: bool
    """Whether the baseline is a run on another text, or else means or nothing."""
    clean_value: float
    baseline_value: float
    """The metric with the baseline's activations at the hook."""
    gradient: Float[Tensor, "seq d_model"]
    """Gradient of the metric with respect to the activations, the mean over the path."""
    features: Float[Tensor, "seq d_sae"]
    """Attributions, in units of the metric."""
    error: Float[Tensor, " seq"]
    """Attributions of the error."""

    @property
    def effect(self) -> float:
        """What is divided up: the metric on the text minus that of the baseline."""
        return self.clean_value - self.baseline_value

    @property
    def gap(self) -> float:
        """``effect`` minus the sum of all attributions: the error of the integral, which shrinks with the steps."""
        return self.effect - float(self.features.sum() + self.error.sum())

    @property
    def active(self) -> Bool[Tensor, "seq d_sae"]:
        """The features that can have an effect, since they differ between text and baseline, and that are active on
        the text or, where the baseline is a text, on that. (Means are not 0 for any feature that ever fires.)"""
        on = self.clean.feature_acts != 0
        if self.baseline_is_text:
            on |= self.baseline.feature_acts != 0
        return on & (self.clean.feature_acts != self.baseline.feature_acts)

    def top(self, n: int, *, errors: bool = True) -> list[Part]:
        """The ``n`` parts of largest absolute attribution, largest first; with ``errors`` those of the error too."""
        parts = [*self._features(n), *(self._errors() if errors else ())]
        return sorted(parts, key=lambda part: -abs(part.attribution))[:n]

    def per_token(self) -> Float[Tensor, " seq"]:
        """Sum of the attributions at each token, features and error."""
        return self.features.sum(1) + self.error

    def _features(self, n: int) -> Iterator[Part]:
        d_sae = self.features.shape[1]
        flat = self.features.flatten()
        for index in flat.abs().topk(min(n, len(flat))).indices.tolist():
            position, feature = divmod(index, d_sae)
            if flat[index] != 0:
                yield Part(
                    position,
                    feature,
                    float(self.clean.feature_acts[position, feature]),
                    float(self.baseline.feature_acts[position, feature]),
                    float(flat[index]),
                )

    def _errors(self) -> Iterator[Part]:
        norms, baseline_norms = self.clean.error.norm(dim=1), self.baseline.error.norm(dim=1)
        for position in range(1, len(self.tokens)):
            yield Part(
                position,
                None,
                float(norms[position]),
                float(baseline_norms[position]),
                float(self.error[position]),
            )


def attribute(
    model: Model,
    sae: SAE,
    text: str,
    metric: Metric,
    *,
    corrupt: str | None = None,
    reference: Sequence[str] | None = None,
    steps: int = DEFAULT_STEPS,
) -> Attribution:
    """Divide up what ``metric`` owes to the activations at the SAE's hook among its features and its error.

    The baseline from which differences are taken is the ``corrupt`` text of as many tokens, or the mean features and
    mean error over the tokens of the ``reference`` texts, or, with neither, no features and no error. BOS keeps its
    own activations throughout. For several layers call it once for each SAE: each divides up the whole effect of its
    own hook.

    Raises:
        ConfigError: both kinds of baseline, no steps, or an SAE that does not reconstruct what it reads.
        TextError: a text without tokens, or a corrupt one of another length.
        ShapeError: the model does not fit the SAE, or the metric does not fit its logits.
    """
    hook_name = hook_of(model, sae)
    ids = _ids(model, text)
    clean = _parts_of(model, sae, hook_name, ids)
    baseline = _baseline(model, sae, hook_name, text, clean, corrupt=corrupt, reference=reference)
    start, end = recomposed(sae, baseline), recomposed(sae, clean)
    values = metric_values(model, ids, hook_name, torch.stack([end, start]), metric)
    path = straight_path(start, end, steps=steps)
    gradient = path_gradient(model, ids, hook_name, path, metric)
    features, error = divided_up(sae, gradient, clean=clean, baseline=baseline)
    return Attribution(
        hook_name=hook_name,
        tokens=tuple(model.str_tokens(ids)),
        token_ids=tuple(ids.tolist()),
        clean=clean,
        baseline=baseline,
        baseline_is_text=corrupt is not None,
        clean_value=float(values[0]),
        baseline_value=float(values[1]),
        gradient=gradient,
        features=features,
        error=error,
    )


def path_gradient(
    model: Model,
    ids: Int[Tensor, " seq"],
    hook_name: str,
    path: Float[Tensor, "steps seq d_model"],
    metric: Metric,
    *,
    frozen: Held | None = None,
) -> Float[Tensor, "seq d_model"]:
    """Gradient of the metric with respect to the activations at the hook, the mean over the path.

    What passes through ``frozen`` hooks does not count.

    Raises:
        ConfigError: the metric has no gradient.
    """
    total = torch.zeros_like(path[0])
    for part in path.split(rows_at_once(len(ids))):
        rows = ids.expand(len(part), -1)
        under = [(hook_name, replacing(part)), *holding(frozen, runs=len(part))]
        total += len(part) / len(path) * gradients(model, rows, [hook_name], metric, under=under)[hook_name]
    return total


class Shares(NamedTuple):
    features: Float[Tensor, "*runs seq d_sae"]
    error: Float[Tensor, "*runs seq"]


@torch.no_grad()
def divided_up(
    sae: SAE, gradient: Float[Tensor, "*runs seq d_model"], *, clean: Decomposition, baseline: Decomposition
) -> Shares:
    """Difference times slope for each feature and for the error; they add up to ``gradient . (x - x')``."""
    features = (clean.feature_acts - baseline.feature_acts) * (gradient @ sae.W_dec.T)
    return Shares(features, ((clean.error - baseline.error) * gradient).sum(-1))


def _ids(model: Model, text: str) -> Int[Tensor, " seq"]:
    ids = model.to_tokens(text).ids[0]
    if len(ids) < 2:
        raise TextError("there is no text to attribute to beside BOS; give at least one word")
    return ids


def _parts_of(model: Model, sae: SAE, hook_name: str, ids: Int[Tensor, " seq"]) -> Decomposition:
    return decomposed(sae, model.capture(ids[None], [hook_name])[hook_name][0])


def _baseline(
    model: Model,
    sae: SAE,
    hook_name: str,
    text: str,
    clean: Decomposition,
    *,
    corrupt: str | None,
    reference: Sequence[str] | None,
) -> Decomposition:
    """BOS has the clean text's own parts in every baseline, as it is never replaced."""
    seq = len(clean.error)
    if corrupt is not None and reference is not None:
        raise ConfigError("a baseline is either a corrupt text or the mean over reference texts; leave one of them out")
    if corrupt is not None:
        parts = _parts_of(model, sae, hook_name, prompt_pair(model, text, corrupt).corrupt[0])
    elif reference is not None:
        means = _mean_parts(model, sae, hook_name, reference)
        parts = Decomposition(*(mean.expand(seq, -1) for mean in means))
    else:
        parts = Decomposition(torch.zeros_like(clean.feature_acts), torch.zeros_like(clean.error))
    return Decomposition(*(torch.cat([own[:1], other[1:]]) for own, other in zip(clean, parts, strict=True)))


def _mean_parts(model: Model, sae: SAE, hook_name: str, texts: Sequence[str]) -> Decomposition:
    """Mean over all tokens but BOS, as [1, d_sae] and [1, d_model]."""
    parts = [_parts_of(model, sae, hook_name, _ids(model, text)) for text in texts]
    if not parts:
        raise ConfigError("a mean baseline needs at least one reference text, got none; give some")
    return Decomposition(*(torch.cat([p[1:] for p in kind]).mean(0, keepdim=True) for kind in zip(*parts, strict=True)))
