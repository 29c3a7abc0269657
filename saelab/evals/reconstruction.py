"""How faithful an SAE is on text it never saw: to the activations, and to the predictions with it spliced in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.errors import ArtifactError, ConfigError
from saelab.models.load import EditFn, Model
from saelab.sae.base import SAE
from saelab.stats import Interval, Statistic, bootstrap, ratio

Progress = Callable[[int, int, str], None]


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


class Sums(NamedTuple):
    """What each sequence (or feature) adds to the numerators and denominators; ratios are taken once, at the end."""

    variance: Float[Tensor, "sequences columns"]
    variance_no_outliers: Float[Tensor, "sequences columns"]
    l0: Float[Tensor, " sequences"]
    l1: Float[Tensor, " sequences"]
    ce: Float[Tensor, "sequences 3"]
    kl: Float[Tensor, "sequences 2"]
    n_outliers: int
    fired: Int[Tensor, " d_sae"]

    @property
    def n_tokens(self) -> int:
        return int(self.variance[:, 0].sum())


class Ratio(NamedTuple):
    """A metric as a statistic of the sums of some columns, over clusters that are resampled whole."""

    statistic: Statistic
    columns: Callable[[Sums], Tensor]
    over: str  # "sequences" or "features"


def evaluate(
    sae: SAE, store: ActivationStore, model: Model, config: EvalConfig, *, progress: Progress | None = None
) -> Evaluation:
    """Evaluate ``sae`` on held-out sequences of ``store`` with ``model`` running live. See `measure` and `summarise`.

    Raises:
        ArtifactError: the SAE was made for another model or hook, or the store holds no held-out text.
    """
    return summarise(measure([sae], store, model, config, progress=progress)[0], config)


@torch.inference_mode()
def measure(
    saes: Sequence[SAE],
    store: ActivationStore,
    model: Model,
    config: EvalConfig,
    *,
    progress: Progress | None = None,
) -> list[Sums]:
    """The sums of several SAEs of one hook over the same held-out sequences.

    Two forward passes a batch for all of them, as it is and with zeros in place of the activations, and one for each
    SAE with its reconstruction there. BOS is never replaced and never counted. A transcoder reads one hook, and its
    output takes the place of the activations at the other.

    Raises:
        ArtifactError: an SAE was made for another hook than the first or the store's, reads several activations a
            token, or the store holds no held-out text.
    """
    read, written = hooks(saes[0])
    for sae in saes:
        if hooks(sae) != (read, written):
            raise ArtifactError(f"the SAEs read {read} and {hooks(sae)[0]}; compare SAEs of one hook")
    if read not in store.hook_names:
        raise ArtifactError(
            f"the SAE reads {read}, but {store.path} holds {', '.join(store.hook_names)}; give other activations"
        )
    rows = held_out_rows(store, tokens=config.tokens)
    limit = config.outlier_factor * _median_norm(store, read, rows, config.batch_rows)
    batches: list[list[Sums]] = []
    for start in range(0, len(rows), config.batch_rows):
        ids = store.tokens(rows[start : start + config.batch_rows])
        batches.append(_measure(saes, model, read, written, ids, outlier_norm=limit))
        if progress:
            progress(min(start + config.batch_rows, len(rows)), len(rows), "held-out sequences")
    return [_joined(parts) for parts in zip(*batches, strict=True)]


def summarise(sums: Sums, config: EvalConfig) -> Evaluation:
    """The metrics. Intervals resample whole sequences (neighbouring tokens are not independent), except for
    dead_fraction and density, which resample features."""
    metrics = {
        name: bootstrap(metric.statistic, metric.columns(sums).double().numpy(), draws=config.draws, seed=config.seed)
        for name, metric in RATIOS.items()
    }
    return Evaluation(metrics, sums.n_tokens, len(sums.variance), sums.n_outliers, sums.fired.numpy())


def hooks(sae: SAE) -> tuple[str, str]:
    """The hook that ``sae`` reads, and the one whose activations it stands for: another one for a transcoder.

    Raises:
        ArtifactError: a crosscoder, which stands for several at once.
    """
    read = sae.metadata.hook_name
    written = getattr(sae.metadata, "hook_name_out", None) or read
    if sae.W_dec.ndim != 2:
        raise ArtifactError(
            f"an SAE of architecture {sae.cfg.arch!r} stands for several activations of a token at once, which "
            "saelab eval does not measure; evaluate an SAE of one hook"
        )
    return read, written


def held_out_rows(store: ActivationStore, *, tokens: int) -> Int[np.ndarray, " rows"]:
    """Held-out rows that hold about ``tokens`` tokens, BOS not counted, spread over all that there are.

    Raises:
        ArtifactError: fewer than two.
    """
    rows = store.rows("held_out")
    if len(rows) < 2:
        raise ArtifactError(
            f"{store.path} holds {len(rows)} held-out sequences, too few to evaluate on; "
            "cache more text or raise held_out"
        )
    n_rows = min(len(rows), max(2, -(-tokens // (store.context - 1))))
    # held-out documents lie one after another, so an even spread over the rows sees all of them
    return rows[np.linspace(0, len(rows) - 1, n_rows).round().astype(int)]


def _measure(
    saes: Sequence[SAE], model: Model, read: str, written: str, ids: Int[Tensor, "batch seq"], *, outlier_norm: float
) -> list[Sums]:
    """One batch: the activations without BOS (position 0), which the predictions still start from."""
    seen: dict[str, Tensor] = {}

    def watching(name: str) -> EditFn:
        def watch(acts: Tensor, keep: Bool[Tensor, "batch seq"]) -> Tensor:
            seen[name] = acts.float()
            return acts

        return watch

    def zero(original: Tensor, keep: Bool[Tensor, "batch seq"]) -> Tensor:
        return torch.zeros_like(original)

    with model.edits({name: watching(name) for name in {read, written}}):
        clean = model.logits(ids).log_softmax(-1)
    acts, target = seen[read][:, 1:], seen[written][:, 1:]
    inlier = acts.norm(dim=-1) <= outlier_norm
    without = _predictions(model, written, zero, ids, clean)
    batches = []
    for sae in saes:
        feature_acts = sae.encode(acts)
        active = feature_acts != 0
        recon = sae.decode(feature_acts)
        with_sae = _predictions(model, written, _splicing(recon), ids, clean)
        error = (target - recon).pow(2).sum(-1)
        batches.append(
            Sums(
                variance=variance_sums(target, error, torch.ones_like(error)).cpu(),
                variance_no_outliers=variance_sums(target, error, inlier.float()).cpu(),
                l0=active.sum((1, 2)).double().cpu(),
                l1=feature_acts.abs().sum((1, 2)).double().cpu(),
                ce=torch.stack([_cross_entropy(clean, ids), with_sae.ce, without.ce], 1).double().cpu(),
                kl=torch.stack([with_sae.kl, without.kl], 1).double().cpu(),
                n_outliers=int((~inlier).sum()),
                fired=active.sum((0, 1)).cpu(),
            )
        )
    return batches


class _Predictions(NamedTuple):
    """How an edited model predicts: cross-entropy and KL from the clean one, each summed over a sequence, in nats."""

    ce: Float[Tensor, " batch"]
    kl: Float[Tensor, " batch"]


def _predictions(
    model: Model, hook_name: str, edit: EditFn, ids: Int[Tensor, "batch seq"], clean: Float[Tensor, "batch seq d_vocab"]
) -> _Predictions:
    with model.edit(hook_name, edit):
        edited = model.logits(ids).log_softmax(-1)
    kl = torch.nn.functional.kl_div(edited[:, :-1], clean[:, :-1], log_target=True, reduction="none")
    return _Predictions(_cross_entropy(edited, ids), kl.sum((1, 2)))


def _splicing(recon: Float[Tensor, "batch rest d_out"]) -> EditFn:
    def splice(original: Tensor, keep: Bool[Tensor, "batch seq"]) -> Tensor:
        return torch.cat([original[:, :1], recon.to(original.dtype)], dim=1)

    return splice


def _joined(batches: Sequence[Sums]) -> Sums:
    """The sums of all sequences; counts of tokens and firings are added up."""

    def column(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    return Sums(
        variance=column("variance"),
        variance_no_outliers=column("variance_no_outliers"),
        l0=column("l0"),
        l1=column("l1"),
        ce=column("ce"),
        kl=column("kl"),
        n_outliers=sum(batch.n_outliers for batch in batches),
        fired=torch.stack([batch.fired for batch in batches]).sum(0),
    )


def _median_norm(store: ActivationStore, hook_name: str, rows: Int[np.ndarray, " rows"], batch_rows: int) -> float:
    starts = range(0, len(rows), batch_rows)
    norms = [store.acts(hook_name, rows[s : s + batch_rows])[:, 1:].float().norm(dim=-1).flatten() for s in starts]
    return float(torch.cat(norms).median())


def _cross_entropy(logps: Float[Tensor, "batch seq d_vocab"], ids: Int[Tensor, "batch seq"]) -> Float[Tensor, " batch"]:
    """Summed over the predictions of each sequence, in nats."""
    return -logps[:, :-1].gather(-1, ids[:, 1:, None].to(logps.device)).squeeze(-1).sum(-1)


def variance_sums(
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


def explained(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    """1 - sum|x - x_hat|^2 / sum|x - mean(x)|^2, where sum|x - mean|^2 = sum|x|^2 - |sum x|^2 / n."""
    n, error, square, total = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
    return 1 - error / (square - (total**2).sum(1) / n)


def _ce_recovered(sums: Float[np.ndarray, "draws 3"]) -> Float[np.ndarray, " draws"]:
    """Of summed cross-entropies: clean, with the SAE, with zeros."""
    return (sums[:, 2] - sums[:, 1]) / (sums[:, 2] - sums[:, 0])


def _kl_recovered(sums: Float[np.ndarray, "draws 2"]) -> Float[np.ndarray, " draws"]:
    """Of summed KL divergences: with the SAE, with zeros."""
    return 1 - sums[:, 0] / sums[:, 1]


def _by_token(column: Callable[[Sums], Tensor]) -> Ratio:
    """The mean over tokens of what is summed over sequences."""
    return Ratio(ratio, lambda s: torch.column_stack([column(s), s.variance[:, 0]]), "sequences")


#: How each metric follows from the sums; their meaning stands in saelab/metrics.py.
RATIOS = {
    "explained_variance": Ratio(explained, lambda s: s.variance, "sequences"),
    "explained_variance_no_outliers": Ratio(explained, lambda s: s.variance_no_outliers, "sequences"),
    "l0": _by_token(lambda s: s.l0),
    "l1": _by_token(lambda s: s.l1),
    "ce_clean": _by_token(lambda s: s.ce[:, 0]),
    "ce_sae": _by_token(lambda s: s.ce[:, 1]),
    "ce_zero": _by_token(lambda s: s.ce[:, 2]),
    "ce_recovered": Ratio(_ce_recovered, lambda s: s.ce, "sequences"),
    "kl_sae": _by_token(lambda s: s.kl[:, 0]),
    "kl_recovered": Ratio(_kl_recovered, lambda s: s.kl, "sequences"),
    "dead_fraction": Ratio(ratio, lambda s: torch.column_stack([s.fired == 0, torch.ones(len(s.fired))]), "features"),
    "density": Ratio(
        ratio, lambda s: torch.column_stack([s.fired, torch.full((len(s.fired),), float(s.n_tokens))]), "features"
    ),
}
