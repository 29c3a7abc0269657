"""Do the features that attribution names carry the effect? Curves over the number of features, beside controls.

    faithfulness(n) = [M(baseline, n features from the text) - M(baseline)] / [M(text) - M(baseline)]
    completeness(n) = [M(text) - M(text, n features from the baseline)] / [M(text) - M(baseline)]

Both are shares of the effect: 1 where the n features are all that matters, 0 where they do nothing; above 1 they
overshoot, since a model is not linear in them. The first puts features of the text into the baseline, the second takes
them out of the text; the rest, the SAE's error included, stays. A feature counts once for each token it stands at.
Source: Marks et al. 2024, arXiv 2403.19647, section 3.3 (their completeness is what remains, ours what is lost).

All three choices are made among the active features that differ between text and baseline: those of largest absolute
attribution; random ones, the mean over several draws; and the ones that differ most in norm, whatever the metric. Only
the last control tells attribution from a preference for strong features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import stats
from saelab.errors import ConfigError
from saelab.interp.attribution import Attribution
from saelab.interp.feature_gradients import metric_values, recomposed
from saelab.interp.patch_metrics import Metric
from saelab.models.load import Model
from saelab.sae.base import SAE

#: Numbers of features at which the curves are taken.
COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Recovered(NamedTuple):
    """Change of the metric towards the goal for each number of features, in units of the metric."""

    attribution: Float[np.ndarray, " counts"]
    random: Float[np.ndarray, " counts"]  # mean over the draws
    largest: Float[np.ndarray, " counts"]
    all_features: float  # every feature, the error alone left out: no choice of features can be expected to do more


class Recovery(NamedTuple):
    """What patching features of one text does."""

    effect: float  # M(text) - M(baseline), of which the curves are shares
    faithfulness: Recovered
    completeness: Recovered


class CurvePoint(NamedTuple):
    """Shares of the effect recovered by ``n_features``, over all texts; intervals over texts, differences paired."""

    n_features: int
    attribution: stats.Interval
    random: stats.Interval
    largest: stats.Interval
    over_random: stats.Interval  # attribution minus random
    over_largest: stats.Interval  # attribution minus largest


class Curves(NamedTuple):
    n_texts: int
    faithfulness: tuple[CurvePoint, ...]
    completeness: tuple[CurvePoint, ...]
    all_features: tuple[stats.Interval, stats.Interval]  # share recovered by all features, in and out


def recovery(
    model: Model,
    sae: SAE,
    attributed: Attribution,
    metric: Metric,
    *,
    counts: Sequence[int] = COUNTS,
    draws: int = 8,
    seed: int = 0,
) -> Recovery:
    """Patch the top, the random and the largest features of one text into its baseline and out of it.

    Raises:
        ConfigError: counts or draws below 1, or fewer active features than the largest count.
    """
    if not counts or min(counts) < 1 or draws < 1:
        raise ConfigError(f"counts and draws must be at least 1, got counts {list(counts)} and {draws} draws")
    candidates = torch.nonzero(attributed.active.flatten())[:, 0]
    if len(candidates) < max(counts):
        raise ConfigError(
            f"only {len(candidates)} active features of {''.join(attributed.tokens[1:])!r} differ from the baseline, "
            f"fewer than the {max(counts)} to patch; give a longer text or smaller counts"
        )
    difference = attributed.clean.feature_acts - attributed.baseline.feature_acts
    size = difference * sae.W_dec.detach().norm(dim=1)
    orders = [
        _largest_first(attributed.features, candidates),
        _largest_first(size, candidates),
        *_shuffles(candidates, draws=draws, seed=seed),
    ]
    moves = torch.stack([_written(sae, difference, order[:n]) for order in orders for n in counts])
    everything = torch.arange(difference.numel(), device=difference.device)
    moves = torch.cat([moves, _written(sae, difference, everything)[None]])

    ids = torch.tensor(attributed.token_ids, device=model.device)
    baseline, clean = recomposed(sae, attributed.baseline), recomposed(sae, attributed.clean)
    put_in = metric_values(model, ids, attributed.hook_name, baseline + moves, metric) - attributed.baseline_value
    taken_out = attributed.clean_value - metric_values(model, ids, attributed.hook_name, clean - moves, metric)
    return Recovery(attributed.effect, *(_by_choice(change, len(counts)) for change in (put_in, taken_out)))


def curves(
    recoveries: Sequence[Recovery], *, counts: Sequence[int] = COUNTS, draws: int = 1000, seed: int = 0
) -> Curves:
    """Shares over all texts: the sum of what was recovered over the sum of the effects, so that a text with a small
    effect does not outweigh the others. ``counts`` are those of the recoveries, ``draws`` those of the bootstrap.

    Raises:
        ConfigError: no recoveries, or effects of both signs, whose sum is no measure of their size.
    """
    effects = np.array([r.effect for r in recoveries])
    if not len(effects) or not (np.all(effects > 0) or np.all(effects < 0)):
        raise ConfigError(
            f"curves over texts need effects of one sign, got {[round(float(e), 2) for e in effects]}; swap the "
            "answers of a text whose effect has the other sign, or leave it out"
        )

    def sums(values: Sequence[float]) -> Float[np.ndarray, "texts 2"]:
        return np.stack([np.array(values), effects], 1)

    def share(values: Sequence[float]) -> stats.Interval:
        return stats.bootstrap(stats.ratio, sums(values), draws=draws, seed=seed)

    def over(values: Sequence[float], others: Sequence[float]) -> stats.Interval:
        return stats.bootstrap_difference(stats.ratio, sums(values), sums(others), paired=True, draws=draws, seed=seed)

    def points(recovered: Sequence[Recovered]) -> tuple[CurvePoint, ...]:
        found = []
        for i, n in enumerate(counts):
            top = [float(r.attribution[i]) for r in recovered]
            random = [float(r.random[i]) for r in recovered]
            largest = [float(r.largest[i]) for r in recovered]
            found.append(
                CurvePoint(n, share(top), share(random), share(largest), over(top, random), over(top, largest))
            )
        return tuple(found)

    put_in, taken_out = [r.faithfulness for r in recoveries], [r.completeness for r in recoveries]
    ceilings = tuple(share([r.all_features for r in kind]) for kind in (put_in, taken_out))
    return Curves(len(recoveries), points(put_in), points(taken_out), (ceilings[0], ceilings[1]))


def _largest_first(values: Float[Tensor, "seq d_sae"], candidates: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The candidates (indices into the flat ``values``) by falling absolute value."""
    return candidates[values.flatten()[candidates].abs().argsort(descending=True, stable=True)]


def _shuffles(candidates: Int[Tensor, " n"], *, draws: int, seed: int) -> list[Int[Tensor, " n"]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        candidates[torch.randperm(len(candidates), generator=generator).to(candidates.device)] for _ in range(draws)
    ]


@torch.no_grad()
def _written(sae: SAE, acts: Float[Tensor, "seq d_sae"], chosen: Int[Tensor, " n"]) -> Float[Tensor, "seq d_model"]:
    """What the chosen of ``acts`` (flat indices) add to the activations."""
    only = torch.zeros_like(acts).flatten()
    only[chosen] = acts.flatten()[chosen]
    return only.view_as(acts) @ sae.W_dec


def _by_choice(changes: Float[Tensor, " runs"], n_counts: int) -> Recovered:
    """Runs come as `recovery` orders them: attribution, largest, the random draws, and all features last."""
    rows = changes[:-1].double().cpu().numpy().reshape(-1, n_counts)
    return Recovered(rows[0], rows[2:].mean(0), rows[1], float(changes[-1]))
