"""The steering report: dose curves of features and their baselines as JSON, Markdown and a page for a browser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from saelab.evals.report import Section, Table, as_html, as_markdown
from saelab.interp.steering_plot import dose_plot
from saelab.interp.steering_report import Point, overall, overall_sentence, perplexity, verdict
from saelab.interp.steering_suite import FEATURE, SteeringSuite
from saelab.stats import Interval


def to_json(suite: SteeringSuite, labels: Mapping[int, str], *, kl: float, seed: int) -> dict[str, Any]:
    """What steer.json holds under "baselines": verdicts, every dose, and the texts that were written."""
    verdicts = [verdict(measured, kl=kl, seed=seed) for measured in suite.features]
    rows = overall(verdicts, seed=seed)
    return {
        "kl": kl,
        "winner": overall_sentence(rows),
        "overall": [row._asdict() | {"difference": row.difference._asdict()} for row in rows],
        "unsteered_perplexity": perplexity([suite.unsteered], seed=seed)._asdict(),
        "unsteered_texts": suite.unsteered.texts,
        "features": [
            {
                "feature": measured.target.feature,
                "label": labels[measured.target.feature],
                "words": list(measured.target.words),
                "n_firing": measured.n_firing,
                "n_others": measured.n_others,
                "twins": list(measured.target.twins),
                "winner": found.winner,
                "sentence": found.sentence(),
                "comparisons": [
                    c._asdict() | {"difference": c.difference and c.difference._asdict(), "verdict": c.verdict}
                    for c in found.comparisons
                ],
                "points": [_plain_point(point) for point in found.points],
                "texts": measured.curves[FEATURE][0].doses[-1].texts,
            }
            for measured, found in zip(suite.features, verdicts, strict=True)
        ],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    return as_markdown(list(sections(result)))


def html(result: Mapping[str, Any]) -> str:
    """The report as one file that needs no other."""
    return as_html(list(sections(result)), title="saelab steer: who wins at equal KL")


def sections(result: Mapping[str, Any]) -> Iterator[Section]:
    """The content of steer.json with its baselines, for reading."""
    found = result["baselines"]
    n_features, features = len(found["features"]), found["features"]
    yield Section(
        "Steering: who wins at equal KL",
        tables=(
            Table(
                (
                    "baseline",
                    "at a KL of",
                    "feature minus baseline, nats",
                    "95 % interval",
                    "wins",
                    "ties",
                    "losses",
                ),
                [
                    (
                        row["baseline"],
                        f"{row['kl']:.2f}",
                        f"{row['difference']['value']:+.2f}",
                        f"{row['difference']['low']:+.2f} to {row['difference']['high']:+.2f}",
                        *(str(row[name]) for name in ("wins", "ties", "losses")),
                    )
                    for row in found["overall"]
                ],
            ),
        ),
        sentences=(
            f"Over {n_features} features: {found['winner']}",
            "These intervals resample features; of a single feature, prompts.",
            f"Effect: rise of the log-probability of a feature's tokens right after {result['n_prompts']} neutral "
            "prompts. Directions are pushed to the KL by their strength; an instruction costs what it costs, and the "
            "feature is read off its dose curve there. Wins, ties and losses are of the feature, by whether the "
            "interval over prompts of a feature's difference keeps clear of zero; of twenty such intervals one is "
            "expected to miss.",
        ),
    )
    yield Section(
        "Each feature",
        tables=(
            Table(
                ("feature", "label", "winner", *_baselines(features)),
                [
                    (
                        str(f["feature"]),
                        f["label"],
                        "no clear winner" if f["winner"] == "none" else f["winner"],
                        *(_difference(f, name) for name in _baselines(features)),
                    )
                    for f in features
                ],
            ),
        ),
        sentences=("Nats by which the feature is ahead of the baseline at equal KL, with the interval over prompts.",),
    )
    clean = Interval(**found["unsteered_perplexity"])
    for f in features:
        points = [_point(plain) for plain in f["points"]]
        yield Section(
            f"Feature {f['feature']}: {f['label']}",
            tables=(
                Table(("method", "strength", "KL", "effect, nats", "perplexity of its text"), _doses(points, clean)),
            ),
            sentences=(
                f"{f['sentence'][0].upper()}{f['sentence'][1:]}.",
                f"Mean difference and probe come from {f['n_firing']:,} tokens on which it clearly fires and "
                f"{f['n_others']:,} on which it does not. At the last dose it writes: {f['texts'][0]!r}",
            ),
            pictures=(dose_plot(points, unsteered_perplexity=clean.value),),
        )


def _baselines(features: list[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c["baseline"] for f in features for c in f["comparisons"]))


def _difference(feature: Mapping[str, Any], baseline: str) -> str:
    found = next(c["difference"] for c in feature["comparisons"] if c["baseline"] == baseline)
    return (
        "KL out of reach" if found is None else f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
    )


def _doses(points: list[Point], clean: Interval) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("unsteered", "", "0", "0", _interval(clean))]
    for p in points:
        strength = "" if p.strength is None else f"{p.strength:.2f}"
        effect = f"{p.effect.value:+.2f} ({p.effect.low:+.2f} to {p.effect.high:+.2f})"
        rows.append((p.method, strength, f"{p.kl:.2f}", effect, _interval(p.perplexity)))
    return rows


def _interval(value: Interval) -> str:
    return f"{value.value:.3g} ({value.low:.3g} to {value.high:.3g})"


def _plain_point(point: Point) -> dict[str, Any]:
    return point._asdict() | {"effect": point.effect._asdict(), "perplexity": point.perplexity._asdict()}


def _point(plain: Mapping[str, Any]) -> Point:
    effect, cost = Interval(**plain["effect"]), Interval(**plain["perplexity"])
    return Point(plain["method"], plain["strength"], plain["kl"], effect, cost)
