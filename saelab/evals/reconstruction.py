"""How faithful an SAE is on text it never saw: to the activations, and to the predictions with it spliced in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.errors import ArtifactError, ConfigError
from saelab.models.load import Model
from saelab.sae.base import SAE
from saelab.stats import Interval, bootstrap

Progress = Callable[[int, int, str], None]
Statistic = Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    tokens: int = 50_000
    """Held-out tokens to evaluate on, BOS not counted; fewer when the activations hold fewer."""
    batch_rows: int = 8
    """Sequences in a forward pass."""
    outlier_factor: float = 10.0
    """A token counts as an outlier when its norm exceeds this many times the median."""
    draws: int = 1000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Seed of the resampling."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_rows", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if not self.outlier_factor > 1:
            raise ConfigError(
                f"outlier_factor is a multiple of the median norm above 1, got {self.outlier_factor}; 10 is usual"
            )


class Evaluation(NamedTuple):
    """Metrics by name (see saelab/metrics.py), and the firing counts behind dead_fraction and density."""

    metrics: dict[str, Interval]
    n_tokens: int
    n_sequences: int
    n_outliers: int
    fired: Int[np.ndarray, " d_sae"]

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        return self.fired / self.n_tokens


def report(evaluation: Evaluation, *, n_bins: int = 40) -> dict[str, Any]:
    """Plain data for eval.json: every metric with its interval and token count, and the histogram of log10 density.

    Features that never fired are counted apart, because their density has no logarithm; rarer ones than 1e-6 are in
    the first bin.
    """
    alive = np.log10(evaluation.density[evaluation.fired > 0]).clip(min=-6.0)
    counts, edges = np.histogram(alive, bins=n_bins, range=(-6.0, 0.0))
    return {
        "metrics": {
            name: {**interval._asdict(), "n_tokens": evaluation.n_tokens}
            for name, interval in evaluation.metrics.items()
        },
        "n_tokens": evaluation.n_tokens,
        "n_sequences": evaluation.n_sequences,
        "n_outliers": evaluation.n_outliers,
        "log10_density": {
            "edges": edges.tolist(),
            "counts": counts.tolist(),
            "n_dead": int((evaluation.fired == 0).sum()),
        },
    }


@torch.inference_mode()
def evaluate(
    sae: SAE, store: ActivationStore, model: Model, config: EvalConfig, *, progress: Progress | None = None
) -> Evaluation:
    """Evaluate ``sae`` on held-out sequences of ``store`` with ``model`` running live.

    Three forward passes a batch: as it is, with the reconstruction in place of the activations, and with zeros. BOS is
    never replaced and never counted. Intervals resample whole sequences (neighbouring tokens are not independent),
    except for dead_fraction and density, which resample features.

    Raises:
        ArtifactError: the SAE was made for another model or hook, or the store holds no held-out text.
    """
    hook_name = sae.metadata.hook_name
    if hook_name not in store.hook_names:
        raise ArtifactError(
            f"the SAE reads {hook_name}, but {store.path} holds {', '.join(store.hook_names)}; give other activations"
        )
    rows = store.rows("held_out")
    if len(rows) < 2:
        raise ArtifactError(
            f"{store.path} holds {len(rows)} held-out sequences, too few to evaluate on; "
            "cache more text or raise held_out"
        )
    n_rows = min(len(rows), max(2, -(-config.tokens // (store.context - 1))))
    # held-out documents lie one after another, so an even spread over the rows sees all of them
    rows = rows[np.linspace(0, len(rows) - 1, n_rows).round().astype(int)]
    limit = config.outlier_factor * _median_norm(store, hook_name, rows, config.batch_rows)
    batches: list[_Sums] = []
    for start in range(0, n_rows, config.batch_rows):
        ids = store.tokens(rows[start : start + config.batch_rows])
        batches.append(_measure(sae, model, hook_name, ids, outlier_norm=limit))
        if progress:
            progress(min(start + config.batch_rows, n_rows), n_rows, "held-out sequences")
    return _evaluation(batches, config)


class _Sums(NamedTuple):
    """What a batch adds to the numerators and denominators, by sequence; ratios are taken once, at the end."""

    variance: Float[Tensor, "batch columns"]
    variance_no_outliers: Float[Tensor, "batch columns"]
    l0: Float[Tensor, " batch"]
    l1: Float[Tensor, " batch"]
    ce: Float[Tensor, "batch 3"]
    kl: Float[Tensor, "batch 2"]
    n_outliers: int
    fired: Int[Tensor, " d_sae"]


def _measure(sae: SAE, model: Model, hook_name: str, ids: Int[Tensor, "batch seq"], *, outlier_norm: float) -> _Sums:
    """One batch: the activations without BOS (position 0), which the predictions still start from."""
    seen: list[Tensor] = []

    def watch(acts: Tensor, keep: Bool[Tensor, "batch seq"]) -> Tensor:
        seen.append(acts.float())
        return acts

    with model.edit(hook_name, watch):
        clean = model.logits(ids).log_softmax(-1)
    acts = seen[0][:, 1:]
    feature_acts = sae.encode(acts)
    recon = sae.decode(feature_acts)

    def splice(original: Tensor, keep: Bool[Tensor, "batch seq"]) -> Tensor:
        return torch.cat([original[:, :1], recon.to(original.dtype)], dim=1)

    def zero(original: Tensor, keep: Bool[Tensor, "batch seq"]) -> Tensor:
        return torch.zeros_like(original)

    ce, kl = [_cross_entropy(clean, ids)], []
    for edit in (splice, zero):
        with model.edit(hook_name, edit):
            edited = model.logits(ids).log_softmax(-1)
        ce.append(_cross_entropy(edited, ids))
        kl.append(
            torch.nn.functional.kl_div(edited[:, :-1], clean[:, :-1], log_target=True, reduction="none").sum((1, 2))
        )
    error = (acts - recon).pow(2).sum(-1)
    inlier = acts.norm(dim=-1) <= outlier_norm
    return _Sums(
        variance=_variance_sums(acts, error, torch.ones_like(error)).cpu(),
        variance_no_outliers=_variance_sums(acts, error, inlier.float()).cpu(),
        l0=(feature_acts > 0).sum((1, 2)).double().cpu(),
        l1=feature_acts.sum((1, 2)).double().cpu(),
        ce=torch.stack(ce, 1).double().cpu(),
        kl=torch.stack(kl, 1).double().cpu(),
        n_outliers=int((~inlier).sum()),
        fired=(feature_acts > 0).sum((0, 1)).cpu(),
    )


def _evaluation(batches: list[_Sums], config: EvalConfig) -> Evaluation:
    def column(name: str) -> Float[Tensor, "sequences ..."]:
        return torch.cat([getattr(batch, name) for batch in batches])

    def interval(statistic: Statistic, *columns: Tensor) -> Interval:
        return bootstrap(statistic, torch.column_stack(columns).double().numpy(), draws=config.draws, seed=config.seed)

    variance, ce, kl = column("variance"), column("ce"), column("kl")
    n = variance[:, 0]
    fired = torch.stack([batch.fired for batch in batches]).sum(0)
    metrics = {
        "explained_variance": interval(_explained, variance),
        "explained_variance_no_outliers": interval(_explained, column("variance_no_outliers")),
        "l0": interval(_ratio, column("l0"), n),
        "l1": interval(_ratio, column("l1"), n),
        "ce_clean": interval(_ratio, ce[:, 0], n),
        "ce_sae": interval(_ratio, ce[:, 1], n),
        "ce_zero": interval(_ratio, ce[:, 2], n),
        "ce_recovered": interval(lambda s: (s[:, 2] - s[:, 1]) / (s[:, 2] - s[:, 0]), ce),
        "kl_sae": interval(_ratio, kl[:, 0], n),
        "kl_recovered": interval(lambda s: 1 - s[:, 0] / s[:, 1], kl),
        "dead_fraction": interval(_ratio, (fired == 0), torch.ones(len(fired))),
        "density": interval(_ratio, fired, torch.full((len(fired),), float(n.sum()))),
    }
    return Evaluation(metrics, int(n.sum()), len(n), sum(batch.n_outliers for batch in batches), fired.numpy())


def _median_norm(store: ActivationStore, hook_name: str, rows: Int[np.ndarray, " rows"], batch_rows: int) -> float:
    starts = range(0, len(rows), batch_rows)
    norms = [store.acts(hook_name, rows[s : s + batch_rows])[:, 1:].float().norm(dim=-1).flatten() for s in starts]
    return float(torch.cat(norms).median())


def _cross_entropy(logps: Float[Tensor, "batch seq d_vocab"], ids: Int[Tensor, "batch seq"]) -> Float[Tensor, " batch"]:
    """Summed over the predictions of each sequence, in nats."""
    return -logps[:, :-1].gather(-1, ids[:, 1:, None].to(logps.device)).squeeze(-1).sum(-1)


def _variance_sums(
    acts: Float[Tensor, "batch seq d_in"], error: Float[Tensor, "batch seq"], weight: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch columns"]:
    """For each sequence: tokens, squared error, squared norm, and the sum of the activations."""
    acts, error, weight = acts.double(), error.double(), weight.double()
    return torch.cat(
        [
            weight.sum(1, keepdim=True),
            (weight * error).sum(1, keepdim=True),
            (weight * acts.pow(2).sum(-1)).sum(1, keepdim=True),
            (weight[..., None] * acts).sum(1),
        ],
        dim=1,
    )


def _explained(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    """1 - sum|x - x_hat|^2 / sum|x - mean(x)|^2, where sum|x - mean|^2 = sum|x|^2 - |sum x|^2 / n."""
    n, error, square, total = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
    return 1 - error / (square - (total**2).sum(1) / n)


def _ratio(sums: Float[np.ndarray, "draws 2"]) -> Float[np.ndarray, " draws"]:
    return sums[:, 0] / sums[:, 1]
