"""Which of two SAEs is better? Differences over the same sequences, and no ranking of what lies inside the noise."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from saelab.evals.reconstruction import RATIOS, Sums
from saelab.metrics import METRICS
from saelab.stats import Interval, bootstrap_difference

Verdict = Literal["better", "worse", "higher", "lower", "not distinguishable"]


class Difference(NamedTuple):
    """The evaluated SAE minus another, in one metric."""

    metric: str
    against: str
    interval: Interval
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "against": self.against,
            **self.interval._asdict(),
            "verdict": self.verdict,
        }


def differences(ours: Sums, theirs: Sums, *, against: str, draws: int, seed: int) -> list[Difference]:
    """All metrics that depend on the SAE, with paired intervals (features of different SAEs are not paired).

    The intervals cover the choice of text. They do not cover the seed of the training: for that, train several.
    """
    found = []
    for name, ratio in RATIOS.items():
        if name in ("ce_clean", "ce_zero"):
            continue
        interval = bootstrap_difference(
            ratio.statistic,
            ratio.columns(ours).double().numpy(),
            ratio.columns(theirs).double().numpy(),
            paired=ratio.over == "sequences",
            draws=draws,
            seed=seed,
        )
        found.append(Difference(name, against, interval, verdict(name, interval)))
    return found


def verdict(metric: str, difference: Interval) -> Verdict:
    """What a difference says about the first of two; nothing while its interval reaches zero."""
    if difference.low <= 0 <= difference.high:
        return "not distinguishable"
    rises = difference.low > 0
    better = METRICS[metric].better
    if better == "neither":
        return "higher" if rises else "lower"
    return "better" if rises == (better == "higher") else "worse"
