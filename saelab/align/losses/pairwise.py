"""Losses on preference pairs against a frozen reference: DPO and its relatives.

All are functions of two log-ratios a token sequence each, a = log pi(y_w|x) - log ref(y_w|x) for the chosen and b for
the rejected completion, and of h = beta (a - b). A log-probability is summed over the tokens of its completion, EOS
included, the prompt left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


class PairLogps(NamedTuple):
    """Log-probabilities of pairs in nats, summed over the tokens of each completion, and the counts of these tokens."""

    chosen: Float[Tensor, " batch"]
    rejected: Float[Tensor, " batch"]
    ref_chosen: Float[Tensor, " batch"]
    ref_rejected: Float[Tensor, " batch"]
    n_chosen: Int[Tensor, " batch"]
    n_rejected: Int[Tensor, " batch"]

    @property
    def chosen_ratio(self) -> Float[Tensor, " batch"]:
        """a = log pi(chosen) - log ref(chosen)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Float[Tensor, " batch"]:
        """b = log pi(rejected) - log ref(rejected)."""
        return self.rejected - self.ref_rejected


class PreferenceLoss(NamedTuple):
    """A value for each pair; the caller takes the mean."""

    loss: Float[Tensor, " batch"]
    chosen_rewards: Float[Tensor, " batch"]
    """beta times the log-ratio (of a loss without reference: times the log-probability), detached, for the log."""
    rejected_rewards: Float[Tensor, " batch"]


#: From a log-ratio to f'(ratio), the implicit reward over beta under the f-divergence (Wang et al. 2023, 2309.16240).
Divergence = Callable[[Float[Tensor, " batch"]], Float[Tensor, " batch"]]

#: Beyond this, exp overflows float32.
_LARGEST_EXPONENT = 80.0


def reverse_kl(ratio: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """f'(u) = log u (+ 1): the divergence of DPO itself."""
    return ratio


def forward_kl(ratio: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """f'(u) = 1 - 1/u: mass-covering."""
    return 1 - (-ratio).clamp(max=_LARGEST_EXPONENT).exp()


def jensen_shannon(ratio: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """f'(u) = log(2u / (1 + u)), bounded above by log 2."""
    return torch.log(torch.tensor(2.0, dtype=ratio.dtype, device=ratio.device)) + logsigmoid(ratio)


def alpha_divergence(alpha: float) -> Divergence:
    """f'(u) = (u^(alpha - 1) - 1) / (alpha - 1), for alpha other than 1.

    Raises:
        ValueError: alpha is 1, where the limit is ``reverse_kl``.
    """
    if alpha == 1:
        raise ValueError("alpha must differ from 1, where the divergence is reverse_kl; use that")

    def derivative(ratio: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return (((alpha - 1) * ratio).clamp(max=_LARGEST_EXPONENT).exp() - 1) / (alpha - 1)

    return derivative


def sigmoid_loss(pairs: PairLogps, *, beta: float, divergence: Divergence = reverse_kl) -> PreferenceLoss:
    """-log sigma(h): direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    With another ``divergence``, h = beta (f'(ratio_w) - f'(ratio_l)) (Wang et al. 2023, arXiv 2309.16240, eq. 7).
    """
    h = beta * (divergence(pairs.chosen_ratio) - divergence(pairs.rejected_ratio))
    return _with_rewards(softplus(-h), pairs, beta)


def normalised_sigmoid_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """DPO on log-ratios a token, so that long answers weigh no more (Lambert et al. 2024, arXiv 2411.15124, eq. 6)."""
    return _with_rewards(softplus(-beta * _mean_difference(pairs)), pairs, beta)


def conservative_loss(pairs: PairLogps, *, beta: float, label_smoothing: float) -> PreferenceLoss:
    """-(1 - e) log sigma(h) - e log sigma(-h): cDPO, for labels that are wrong with probability e (Mitchell 2023)."""
    h = _margin(pairs, beta)
    return _with_rewards((1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h), pairs, beta)


def robust_loss(pairs: PairLogps, *, beta: float, label_smoothing: float) -> PreferenceLoss:
    """(-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2e): unbiased under flipped labels (arXiv 2403.00409, eq. 11).

    Raises:
        ValueError: e is not below one half, where the labels say nothing.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing}; lower it")
    h = _margin(pairs, beta)
    loss = ((1 - label_smoothing) * softplus(-h) - label_smoothing * softplus(h)) / (1 - 2 * label_smoothing)
    return _with_rewards(loss, pairs, beta)


def hinge_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """max(0, 1 - h) (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return _with_rewards((1 - _margin(pairs, beta)).relu(), pairs, beta)


def ipo_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """(a/|y_w| - b/|y_l| - 1/(2 beta))^2: identity preference optimisation on log-ratios a token.

    Azar et al. 2023, arXiv 2310.12036, eq. 17, with the authors' later advice to average over tokens. ``ipo_sum_loss``
    is the equation to the letter; the two have optima of different meaning, so they have two names.
    """
    return _with_rewards((_mean_difference(pairs) - 1 / (2 * beta)).square(), pairs, beta)


def ipo_sum_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """(a - b - 1/(2 beta))^2: IPO as printed (Azar et al. 2023, arXiv 2310.12036, eq. 17)."""
    difference = pairs.chosen_ratio - pairs.rejected_ratio
    return _with_rewards((difference - 1 / (2 * beta)).square(), pairs, beta)


def exo_loss(pairs: PairLogps, *, beta: float, label_smoothing: float) -> PreferenceLoss:
    """KL between sigma(h) and the smoothed label (1 - e, e): EXO (Ji et al. 2024, arXiv 2402.00856, eq. 16).

    Raises:
        ValueError: e is not above 0, where the divergence is infinite.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, got {label_smoothing}; 1e-3 is usual")
    h = _margin(pairs, beta)
    wanted, other = torch.log(torch.tensor([1 - label_smoothing, label_smoothing], dtype=h.dtype, device=h.device))
    loss = h.sigmoid() * (logsigmoid(h) - wanted) + (-h).sigmoid() * (logsigmoid(-h) - other)
    return _with_rewards(loss, pairs, beta)


def nca_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """-log sigma(beta a) - (log sigma(-beta a) + log sigma(-beta b)) / 2: NCA (Chen et al. 2024, arXiv 2402.05369)."""
    a, b = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return _with_rewards(softplus(-a) + 0.5 * softplus(a) + 0.5 * softplus(b), pairs, beta)


def bco_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """-log sigma(beta a) - log sigma(-beta b): a binary classifier of good and bad (Jung et al. 2024, 2404.04656)."""
    return _with_rewards(softplus(-beta * pairs.chosen_ratio) + softplus(beta * pairs.rejected_ratio), pairs, beta)


def apo_zero_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """1 - sigma(beta a) + sigma(beta b): chosen up, rejected down (D'Oosterlinck et al. 2024, arXiv 2408.06266)."""
    a, b = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return _with_rewards(1 - a.sigmoid() + b.sigmoid(), pairs, beta)


def apo_down_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """sigma(beta a) + 1 - sigma(h): both down, rejected more; for answers worse than the model's own (2408.06266)."""
    a, h = beta * pairs.chosen_ratio, _margin(pairs, beta)
    return _with_rewards(a.sigmoid() + 1 - h.sigmoid(), pairs, beta)


def sppo_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2: self-play with hard labels (SPPO, Wu et al. 2024, 2405.00675)."""
    target = 1 / (2 * beta)
    loss = (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()
    return _with_rewards(loss, pairs, beta)


def dpop_loss(pairs: PairLogps, *, beta: float, penalty: float = 5.0) -> PreferenceLoss:
    """-log sigma(beta (a - b - penalty max(0, -a))): DPO that may not lower the chosen (Smaug, 2402.13228, eq. 3)."""
    a, b = pairs.chosen_ratio, pairs.rejected_ratio
    return _with_rewards(softplus(-beta * (a - b - penalty * (-a).relu())), pairs, beta)


def aot_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """DPO between the sorted margins of policy and reference: distributional preference (AOT, arXiv 2406.05882)."""
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _with_rewards(softplus(-beta * (policy - reference)), pairs, beta)


def aot_unpaired_loss(pairs: PairLogps, *, beta: float) -> PreferenceLoss:
    """DPO between the sorted log-ratios of chosen and rejected, whichever pair they come from (arXiv 2406.05882)."""
    h = beta * (pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values)
    return _with_rewards(softplus(-h), pairs, beta)


def discovered_loss(pairs: PairLogps, *, beta: float, temperature: float = 0.05) -> PreferenceLoss:
    """(1 - m) (-log sigma(h)) + m exp(-h) with m = sigma(h / temperature): DiscoPOP (Lu et al. 2024, 2406.08414)."""
    h = _margin(pairs, beta)
    mixed = (h / temperature).sigmoid()
    return _with_rewards((1 - mixed) * softplus(-h) + mixed * (-h).exp(), pairs, beta)


def nll_loss(pairs: PairLogps, *, beta: float, mean_length: float | None = None) -> PreferenceLoss:
    """Negative log-likelihood of the chosen a token; its mean over the batch weighs all tokens alike.

    A term for mixes: added to DPO it keeps the chosen from losing probability. ``mean_length`` is that of the chosen
    answers of the whole batch, where ``pairs`` are a part of it. ``beta`` only scales the logged rewards.
    """
    return _with_rewards(-pairs.chosen / (mean_length or _mean_length(pairs.n_chosen)), pairs, beta)


def length_desensitised(
    logps: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    n_public: Int[Tensor, " batch"],
    *,
    alpha: float,
) -> Float[Tensor, " batch"]:
    """Sum of the completion's log-probabilities, those beyond its first ``n_public`` tokens times ``alpha``.

    LD-DPO (Liu et al. 2024, arXiv 2409.06411, eq. 7): with the length of the pair's shorter completion as
    ``n_public``, what an answer says beyond the other's length weighs less. For policy and reference alike.
    """
    beyond = mask.cumsum(1) > n_public[:, None]
    return (logps.where(mask, 0.0) * torch.where(beyond, alpha, 1.0)).sum(1)


def on_policy_weights(
    logps: Float[Tensor, "batch seq"], log_collisions: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """exp of the mean over a completion of log pi(token) - log sum_v pi(v)^2: WPO (arXiv 2406.11827, eq. 2), detached.

    About 1 for what the policy would write itself, near 0 for what it would not: a pair counts by the product of its
    two. ``log_collisions`` is the log-probability that two draws of the token are equal.
    """
    aligned = (logps - log_collisions).where(mask, 0.0).detach()
    return (aligned.sum(1) / mask.sum(1)).exp()


def _mean_length(n_tokens: Int[Tensor, " batch"]) -> float:
    return float(n_tokens.double().mean())


def _margin(pairs: PairLogps, beta: float) -> Float[Tensor, " batch"]:
    return beta * (pairs.chosen_ratio - pairs.rejected_ratio)


def _mean_difference(pairs: PairLogps) -> Float[Tensor, " batch"]:
    """a / |y_w| - b / |y_l|."""
    return pairs.chosen_ratio / pairs.n_chosen - pairs.rejected_ratio / pairs.n_rejected


def _with_rewards(loss: Float[Tensor, " batch"], pairs: PairLogps, beta: float) -> PreferenceLoss:
    return PreferenceLoss(loss, beta * pairs.chosen_ratio.detach(), beta * pairs.rejected_ratio.detach())
