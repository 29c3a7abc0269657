"""What every piece of an evaluation hands back: numbers with intervals, each beside its control, and plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from saelab.stats import Interval


class Score(NamedTuple):
    """One number of a report."""

    metric: str  # its name in saelab/metrics.py
    label: str  # which of several: "SAE features, k = 1"; may be empty
    interval: Interval
    n: int  # what it was measured on ...
    counted: str  # ... of which kind: "tokens", "texts", "words", "features"
    control: Interval | None = None  # the same for an SAE of the model with random weights


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part of a suite: either its scores, or why there are none."""

    name: str
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences that belong beside the numbers."""
    skipped: str | None = None
    """Why it did not run, and what would make it run."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "skipped": self.skipped,
            "notes": list(self.notes),
            "scores": [
                {
                    "metric": score.metric,
                    "label": score.label,
                    **score.interval._asdict(),
                    "n": score.n,
                    "counted": score.counted,
                    "control": None if score.control is None else score.control._asdict(),
                }
                for score in self.scores
            ],
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Piece:
        scores = (
            Score(
                entry["metric"],
                entry["label"],
                Interval(entry["value"], entry["low"], entry["high"]),
                entry["n"],
                entry["counted"],
                None if entry["control"] is None else Interval(**entry["control"]),
            )
            for entry in plain["scores"]
        )
        return cls(name=plain["name"], scores=tuple(scores), notes=tuple(plain["notes"]), skipped=plain["skipped"])


def beside(piece: Piece, control: Piece) -> Piece:
    """``piece`` with each number beside the one that ``control`` has under the same name and label."""
    if control.skipped is not None:
        return replace(piece, notes=(*piece.notes, f"No number of the control: {control.skipped}."))
    found = {(score.metric, score.label): score.interval for score in control.scores}
    scores = tuple(score._replace(control=found.get((score.metric, score.label))) for score in piece.scores)
    return replace(piece, scores=scores)
