"""Every metric once: what it is called in files, tables and plots, what it means, its unit and its good direction."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    name: str
    meaning: str
    unit: str
    better: Literal["higher", "lower", "neither"]


_ALL = (
    Metric(
        "explained_variance",
        "1 - sum|x - x_hat|^2 / sum|x - mean(x)|^2, the mean over all evaluation tokens",
        "share",
        "higher",
    ),
    Metric(
        "explained_variance_no_outliers", "explained_variance without the tokens of outlying norm", "share", "higher"
    ),
    Metric("l0", "active features per token", "count", "lower"),
    Metric("l1", "sum of feature activations per token", "activation", "neither"),
    Metric("ce_clean", "next-token cross-entropy of the model as it is", "nats", "lower"),
    Metric("ce_sae", "cross-entropy with the SAE's reconstruction in place of the activations", "nats", "lower"),
    Metric("ce_zero", "cross-entropy with the activations replaced by zero", "nats", "neither"),
    Metric("ce_recovered", "(ce_zero - ce_sae) / (ce_zero - ce_clean)", "share", "higher"),
    Metric("kl_recovered", "1 - KL(clean || sae) / KL(clean || zero) of next-token distributions", "share", "higher"),
    Metric("kl_sae", "KL(clean || sae)", "nats", "lower"),
    Metric("dead_fraction", "share of features that did not fire once in the evaluation tokens", "share", "lower"),
    Metric("density", "share of tokens on which a feature fires", "share", "neither"),
    Metric(
        "mean_max_cosine",
        "mean over true features of the largest cosine with a feature's direction",
        "cosine",
        "higher",
    ),
    Metric("mcc", "mean cosine of true features with their partners by one-to-one assignment", "cosine", "higher"),
    Metric("matched_f1", "mean over true features of the F1 of their partner's firing", "share", "higher"),
    Metric("probe_accuracy", "share of test texts that a probe puts into the right class", "share", "higher"),
    Metric("probe_f1", "harmonic mean of a probe's precision and recall", "share", "higher"),
    Metric("auroc", "chance that a positive text scores above another one, ties counted half", "share", "higher"),
    Metric(
        "recall_at_1_percent", "share of positive texts found where 1 % of the others raise an alarm", "share", "higher"
    ),
    Metric("ece", "mean distance of claimed probability from observed share, in ten bins", "share", "lower"),
    Metric("brier", "mean squared distance of claimed probability from outcome", "share", "lower"),
    Metric(
        "absorption_full", "share of a letter's words on which other features do its features' work", "share", "lower"
    ),
    Metric(
        "absorption_fraction", "share of a letter's direction in a word that other features carry", "share", "lower"
    ),
    Metric("split_features", "features that stand for one letter", "count", "lower"),
    Metric(
        "meta_explained_variance",
        "variance of the feature directions that a small dictionary of shared ones explains",
        "share",
        "lower",
    ),
    Metric(
        "seed_stability", "share of live features with a partner in the same SAE of another seed", "share", "higher"
    ),
    Metric("seed_cosine", "mean cosine of live features with their partners of another seed", "cosine", "higher"),
    Metric("loss", "what training minimises", "none", "lower"),
    Metric("reconstruction", "mean |x - x_hat|^2 / mean |x|^2 of centred activations in the batch", "share", "lower"),
    Metric("sparsity", "sparsity penalty, its coefficient included", "none", "lower"),
    Metric("aux", "auxiliary loss that revives dead features, its coefficient included", "none", "lower"),
    Metric("n_dead", "features that did not fire within the window of recent training tokens", "count", "lower"),
    Metric("lr", "learning rate", "none", "neither"),
    Metric("grad_norm", "norm of the gradient before clipping", "none", "neither"),
    Metric("n_skipped", "batches left out because their loss or gradient was not finite", "count", "lower"),
    Metric("coefficient", "sparsity coefficient that the L0 controller has come to", "none", "neither"),
    Metric(
        "saturated", "1 where that coefficient is at its limit, so that the target is out of reach", "0 or 1", "lower"
    ),
    Metric("gamma", "||mean|| / total standard deviation of the activations: predicts dead features", "ratio", "lower"),
    Metric(
        "decoder_projection",
        "n-th largest projection of an activation on decoder rows; least at the right L0",
        "share of norm",
        "lower",
    ),
    Metric(
        "tokens_per_second",
        "training speed since the last log line (a timing, not compared on resume)",
        "1/s",
        "higher",
    ),
    Metric(
        "stall_share",
        "share of the time since the last log line that training waited for data (a timing, not compared on resume)",
        "share",
        "lower",
    ),
    Metric("kl", "KL(clean || edited) of next-token distributions", "nats", "lower"),
    Metric("lens_kl", "KL(model || lens) of next-token distributions, the mean over tokens", "nats", "lower"),
    Metric("trigger_logp_rise", "log-probability of the trigger tokens, edited minus clean", "nats", "higher"),
)

METRICS = {metric.name: metric for metric in _ALL}

#: Names in metrics.jsonl whose values depend on the clock.
TIMINGS = frozenset({"tokens_per_second", "stall_share"})
