"""The report on explanations: numbers for machines, and the same as Markdown and as one HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from saelab.evals.drawing import Row, histogram, interval_plot
from saelab.evals.report import Section, Table, as_html, as_markdown
from saelab.features.explain import KINDS, Explained
from saelab.features.explain_run import ExplainConfig, ExplainRun
from saelab.features.explain_scores import MEANINGS, Referees
from saelab.features.explain_summary import FIRINGS, MEASURES, by_firings, compare, of_kind, scorable, values
from saelab.stats import Interval, bootstrap_difference, interval_of_mean, ratio

#: Firings in the scoring documents from which on a feature's numbers are more than a few cases.
ENOUGH = 10

_EDGES = np.linspace(0, 1, 21)


def explain_features(run: ExplainRun, referees: Referees) -> tuple[dict[str, Any], dict[str, list[Explained]]]:
    """Everything: explanations of both sides with their scores. The result for machines, and each side's features."""
    explained: dict[str, list[Explained]] = {}
    scores: dict[str, dict[str, dict[int, float]]] = {}
    notes: dict[str, str] = {}
    shares: dict[str, float | None] = {}
    for side in run.sides():
        found = run.scanned(side)
        explained[side.name] = run.explained(side, found)
        scores[side.name] = run.scored(side, found, explained[side.name], referees)
        notes[side.name] = side.note
        shares[side.name] = run.token_share(side)
    n_features = run.own.sae.d_sae
    about = {
        "sae": str(run.sae_path),
        "arch": run.own.sae.cfg.arch,
        "hook_name": run.own.sae.metadata.hook_name,
        "model": run.store.manifest.model.name,
        "n_features": n_features,
        "documents": list(run.documents()),
        "tokens": list(run.tokens()),
        "clear": run.config.clear,
        "seed": run.config.seed,
        "encoder": referees.encoder.name,
        "judge": referees.judge_name,
        "no_control": run.no_control,
        "sides": notes,
        "token_share": shares,
    }
    return summary(explained, scores, about, run.config), explained


def summary(
    explained: Mapping[str, Sequence[Explained]],
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
    about: dict[str, Any],
    config: ExplainConfig,
) -> dict[str, Any]:
    """The numbers of the report; ``explained`` and ``scores`` by side, the SAE's first."""
    names = list(explained)
    own, control = explained[names[0]], explained[names[1]] if len(names) > 1 else None
    comparisons = []
    for least in (1, ENOUGH):
        theirs = None if control is None else scorable(control, least=least)
        found = compare(scorable(own, least=least), theirs, draws=config.draws, seed=config.seed)
        comparisons += [{"least": least, **_plain(c._asdict())} for c in found]
    return {
        "about": about,
        "comparisons": comparisons,
        "sides": {name: _side(features) for name, features in explained.items()},
        "scores": _compared_scores(scores, names, config),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    return as_markdown(sections(result))


def html(result: Mapping[str, Any]) -> str:
    """The report as one file that needs no other."""
    return as_html(sections(result), title=f"saelab explain {result['about']['sae']}")


def sections(result: Mapping[str, Any]) -> list[Section]:
    """The report for reading."""
    about = result["about"]
    documents, tokens = about["documents"], about["tokens"]
    first = Section(
        f"Explanations of {about['sae']}",
        sentences=(
            f"{about['arch']}, {about['n_features']:,} features, reads {about['hook_name']} of {about['model']}.",
            f"Explanations were found on {tokens[0]:,} tokens ({documents[0]} documents), the best of each feature "
            f"was chosen on {tokens[1]:,} ({documents[1]}), and scored on {tokens[2]:,} ({documents[2]}), seed "
            f"{about['seed']}. A firing counts where it reaches {about['clear']:.2f} of the feature's maximum; weaker "
            "ones count neither for nor against an explanation.",
            "A feature without an explanation, or with one that matches nothing in the scoring documents, has "
            "precision and recall 0. Intervals are 95 % bootstrap intervals over features; the documents are fixed.",
            _control_sentence(about),
        ),
    )
    return [
        first,
        _medians(result),
        *_distributions(result),
        _kinds(result),
        _by_firings(result),
        *([_scores(result)] if result["scores"] else []),
    ]


def _control_sentence(about: Mapping[str, Any]) -> str:
    if about["no_control"] is not None:
        return f"There is no random-weights control: {about['no_control']}."
    return (
        "The control is an SAE of the same kind on the model with random weights, reading the same text: "
        f"{about['sides']['random weights']}. The token explains {_share(about, 'SAE')} of the variance that the SAE "
        f"reads and {_share(about, 'random weights')} of what the control reads. Where the second is much the smaller, "
        "the control is an easy one: rules on tokens must fail there, whatever the model has or has not learned."
    )


def _share(about: Mapping[str, Any], side: str) -> str:
    share = about["token_share"][side]
    return "an unknown share" if share is None else f"{share:.0%}"


def _medians(result: Mapping[str, Any]) -> Section:
    rows = [
        (
            c["measure"],
            f"at least {c['least']}",
            _shown(c["own"]),
            _shown(c["control"]),
            _shown(c["difference"]),
            f"{c['n']:,}" + ("" if c["n_control"] is None else f" and {c['n_control']:,}"),
        )
        for c in result["comparisons"]
    ]
    plotted = [
        Row(
            f"{c['measure']}, at least {c['least']}",
            Interval(**c["own"]),
            Interval(**c["control"]) if c["control"] else None,
        )
        for c in result["comparisons"]
    ]
    header = ("median of", "clear firings", "SAE", "random weights", "difference", "features")
    return Section(
        "Held-out precision and recall of the best explanation",
        tables=(Table(header, rows),),
        sentences=("Medians over the features with so many clear firings in the scoring documents.",),
        pictures=(interval_plot(plotted, unit="median"),) if plotted else (),
    )


def _distributions(result: Mapping[str, Any]) -> list[Section]:
    rows, parts = [], []
    for name, side in result["sides"].items():
        rows.append(
            (
                name,
                f"{side['n_clear']:,}",
                f"{side['n_scorable']:,}",
                f"{side['n_explained']:,}",
                *(
                    " / ".join(f"{q:.2f}" for q in side["quantiles"][measure]) if side["n_scorable"] else "-"
                    for measure in MEASURES
                ),
            )
        )
        for measure in MEASURES:
            parts.append((f"{name}, {measure}", histogram(_EDGES.tolist(), side["histograms"][measure], unit=measure)))
    quantiles = (f"{m}: 10/25/50/75/90 %" for m in MEASURES)
    header = ("side", "fire clearly", "of them in the scoring documents", "explained", *quantiles)
    return [
        Section("Distributions", tables=(Table(header, rows),)),
        *(Section(title, pictures=(picture,)) for title, picture in parts),
    ]


def _kinds(result: Mapping[str, Any]) -> Section:
    sides = result["sides"]
    rows = []
    for kind in KINDS:
        cells = [kind]
        for side in sides.values():
            of = side["kinds"][kind]
            cells += [f"{of['chosen']:,}", *(f"{of[m]:.2f}" if of[m] is not None else "-" for m in MEASURES)]
        rows.append(tuple(cells))
    header = ["kind"]
    for name in sides:
        header += [f"{name}: best for", *(f"median {m} alone" for m in MEASURES)]
    return Section(
        "By kind of explanation",
        tables=(Table(tuple(header), rows),),
        sentences=("Medians are over all scorable features, those that a kind says nothing of counting 0.",),
    )


def _by_firings(result: Mapping[str, Any]) -> Section:
    rows = []
    ends = [f"{low:,} to {high - 1:,}" for low, high in pairwise(FIRINGS)]
    for i, label in enumerate([*ends, f"{FIRINGS[-1]:,} and more"]):
        cells = [label]
        for side in result["sides"].values():
            n, *medians = side["by_firings"][i]
            cells += [f"{n:,}", *("-" if m is None else f"{m:.2f}" for m in medians)]
        rows.append(tuple(cells))
    header = ["clear firings in the text"]
    for name in result["sides"]:
        header += [f"{name}: features", *(f"median {measure}" for measure in MEASURES)]
    return Section(
        "By how often features fire",
        tables=(Table(tuple(header), rows),),
        sentences=("Features of the two sides fire differently often; within a row they are alike in that.",),
    )


def _scores(result: Mapping[str, Any]) -> Section:
    about, rows = result["about"], []
    for name, found in result["scores"].items():
        meaning, chance = MEANINGS[name]
        control = "-" if found["control"] is None else f"{_shown(found['control'])}, {found['n_control']} features"
        rows.append(
            (
                name,
                f"{_shown(found['own'])}, {found['n']} features",
                control,
                _shown(found["difference"]),
                f"{chance:g}",
                meaning,
            )
        )
    judge = f" Judge: {about['judge']}." if about["judge"] else ""
    header = ("score", "SAE, mean", "random weights, mean", "difference", "chance", "meaning")
    return Section(
        "Scores on a sample of features",
        tables=(Table(header, rows),),
        sentences=(f"Texts of the scoring documents. Encoder: {about['encoder']}.{judge}",),
    )


def _side(features: Sequence[Explained]) -> dict[str, Any]:
    able = scorable(features)
    chosen = Counter(feature.best.kind for feature in able if feature.best is not None)
    medians = [by_firings(able, measure) for measure in MEASURES]
    return {
        "n_clear": len(features),
        "n_scorable": len(able),
        "n_explained": sum(chosen.values()),
        "quantiles": {
            m: np.quantile(values(able, m), [0.1, 0.25, 0.5, 0.75, 0.9]).tolist() if able else [] for m in MEASURES
        },
        "histograms": {m: np.histogram(values(able, m), _EDGES)[0].tolist() for m in MEASURES},
        "kinds": {
            kind: {"chosen": chosen[kind]}
            | {m: float(np.median(of_kind(able, kind, m))) if able else None for m in MEASURES}
            for kind in KINDS
        },
        "by_firings": [[n, *(column[i][1] for column in medians)] for i, (n, _) in enumerate(medians[0])],
    }


def _compared_scores(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]], names: Sequence[str], config: ExplainConfig
) -> dict[str, Any]:
    found = {}
    own, control = scores[names[0]], scores[names[1]] if len(names) > 1 else {}
    for name in MEANINGS:
        if name in own:
            ours = np.array(list(own[name].values()))
            theirs = np.array(list(control.get(name, {}).values()))
            both = [np.stack([of, np.ones(len(of))], 1) for of in (ours, theirs)]
            difference = None
            if len(theirs):
                difference = bootstrap_difference(ratio, *both, paired=False, draws=config.draws, seed=config.seed)
            found[name] = _plain(
                {
                    "own": interval_of_mean(ours, draws=config.draws, seed=config.seed),
                    "control": interval_of_mean(theirs, draws=config.draws, seed=config.seed) if len(theirs) else None,
                    "difference": difference,
                    "n": len(ours),
                    "n_control": len(theirs),
                    "features": {str(i): value for i, value in own[name].items()},
                }
            )
    return found


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in found.items()}


def _shown(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
