"""Overview: is this SAE healthy, how was it made, and which features does it hold?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import streamlit as st

import saelab as sl
from saelab.errors import ArtifactError
from saelab.metrics import METRICS
from saelab_explorer import charts, frame, snippets
from saelab_explorer.figures import count, percent, plural
from saelab_explorer.runs import StageRecord, provenance, read_curves, read_evaluation, read_json
from saelab_explorer.snippets import Card

#: Metrics shown as cards: name, title, and how it is written.
CARDS = (
    ("explained_variance", "Explained variance", "share"),
    ("l0", "Active features (L0)", "count"),
    ("ce_recovered", "CE recovered", "share"),
    ("kl_recovered", "KL recovered", "share"),
    ("dead_fraction", "Dead features", "percent"),
)

#: Training curves: name in metrics.jsonl, title, format of the axis.
CURVES = (
    ("reconstruction", "Reconstruction error", ".2f"),
    ("l0", "Active features (L0)", "~s"),
    ("n_dead", "Dead features", "~s"),
    ("lr", "Learning rate", "~e"),
)


def show() -> None:
    run = frame.run()
    frame.show_address()
    records = provenance(run)
    unfinished = [f"{record.stage} unfinished" for record in records if not record.finished]
    snippets.draw(snippets.heading(run.name, kicker="Run", sub=_what_it_is(run.begun("sae")), chips=unfinished))
    _metrics()
    if run.has("index"):
        _features(frame.index())
    else:
        why = "The index holds each feature's examples, tokens and neighbours. Make it with:"
        snippets.draw(snippets.empty("The features are not indexed yet", why))
        st.code(run.command("index"), language="bash")
    training = next((record for record in records if record.stage == "sae"), None)
    st.fragment(_training, run_every=None if training is None or training.finished else 5.0)()
    _provenance(records)


def _what_it_is(sae: Path | None) -> str:
    """One line about the SAE, from its cfg.json."""
    if sae is None or not (sae / "cfg.json").exists():
        return ""
    cfg = read_json(sae / "cfg.json")
    metadata: Mapping[str, Any] = cfg.get("metadata") or {}
    facts = [
        f"{count(cfg['d_sae'])} features" if isinstance(cfg.get("d_sae"), int) else "",
        cfg.get("architecture", ""),
    ]
    facts.append(f"k = {cfg['k']}" if "k" in cfg else "")
    model = f" of {PurePath(str(metadata['model_name'])).name}" if metadata.get("model_name") else ""
    facts.append(f"{metadata['hook_name']}{model}" if metadata.get("hook_name") else "")
    return " · ".join(map(str, filter(None, facts)))


def _metrics() -> None:
    run = frame.run()
    try:
        evaluation = read_evaluation(run)
    except ArtifactError:
        why = "Explained variance, recovered loss and dead features, on held-out text. Measure them with:"
        snippets.draw(snippets.empty("This run was not evaluated yet", why))
        st.code(run.command("eval"), language="bash")
        return
    metrics = evaluation.get("metrics", {})
    snippets.draw(snippets.cards([_card(*card, metrics[card[0]]) for card in CARDS if card[0] in metrics]))
    losses = [
        f"{name[3:]} {metrics[name]['value']:.3f}" for name in ("ce_clean", "ce_sae", "ce_zero") if name in metrics
    ]
    text = f"{count(evaluation.get('n_tokens', 0))} held-out tokens; 95 % bootstrap intervals over sequences"
    text += " (dead features: over features)."
    if losses:
        text += f" Cross-entropy in nats: {', '.join(losses)}."
    if evaluation.get("n_outliers"):
        text += f" {plural(evaluation['n_outliers'], 'token')} of outlying norm."
    snippets.draw(snippets.note(text))


def _card(name: str, title: str, written: str, metric: Mapping[str, float]) -> Card:
    value, low, high = metric["value"], metric["low"], metric["high"]
    meaning = METRICS[name].meaning if name in METRICS else ""
    if written == "count":
        return Card(title, f"{value:.1f}", "", f"{low:.1f} – {high:.1f}", None, meaning)
    if written == "percent":
        return Card(
            title, f"{100 * value:.2g}", "%", f"{100 * low:.2g} – {100 * high:.2g} %", (low, value, high), meaning
        )
    return Card(title, f"{value:.3f}", "", f"{low:.3f} – {high:.3f}", (low, value, high), meaning)


def _features(index: sl.FeatureIndex) -> None:
    density, palette = index.column("density"), frame.palette()
    left, right = st.columns([2, 3], gap="large")
    with left:
        snippets.draw(snippets.section("Density", f"over {count(index.n_tokens)} tokens"))
        histogram = charts.densities(density, palette)
        if histogram is not None:
            st.vega_lite_chart(spec=histogram, key="densities", width="stretch")
        facts = {
            "silent": count(int((density == 0).sum())),
            "over 10 %": count(int((density > 0.1).sum())),
            "with a rule": count(int((~np.isnan(index.column("label_precision"))).sum())),
            "median": percent(float(np.median(density))),
        }
        snippets.draw(snippets.facts(facts))
    with right:
        snippets.draw(snippets.section("Density and strength", "a dot is a feature; click one to open it"))
        spec = charts.density_by_max(density, index.column("max"), index.column("label").tolist(), palette)
        if spec is not None:
            event: Any = st.vega_lite_chart(spec=spec, key="scatter", on_select="rerun", width="stretch")
            feature = charts.selected_feature(event.get("selection"))
            if feature is not None and 0 <= feature < index.n_features:
                frame.open_feature(feature)


def _training() -> None:
    lines = read_curves(frame.run())
    specs = {name: charts.curve(lines, name, title, frame.palette(), format=form) for name, title, form in CURVES}
    if not any(specs.values()):
        return
    snippets.draw(
        snippets.section("Training", f"{count(lines[-1]['tokens'])} tokens, {count(lines[-1]['step'])} steps")
    )
    for column, (name, spec) in zip(st.columns(len(specs), gap="medium"), specs.items(), strict=True):
        if spec is not None:
            column.vega_lite_chart(spec=spec, key=f"curve_{name}", width="stretch")


def _provenance(records: list[StageRecord]) -> None:
    versions = {name: version for record in records for name, version in record.versions.items()}
    shown = [f"{name} {versions[name]}" for name in ("saelab", "torch", "transformers") if name in versions]
    snippets.draw(snippets.section("Provenance", ", ".join(shown)))
    rows = [
        (
            record.stage,
            record.started.replace("T", " ")[:16] if record.finished else "unfinished",
            _spoken(record.command),
            record.sha256[:10],
            ", ".join(f"{name} {digest[:10]}" for name, digest in record.parents.items()),
        )
        for record in records
    ]
    snippets.draw(snippets.chain(("stage", "begun", "command", "hash", "inputs"), rows, long=2))


def _spoken(command: str) -> str:
    """A recorded command as one types it: ``.../saelab/__main__.py eval runs/x`` is ``saelab eval runs/x``."""
    program, _, rest = command.partition(" ")
    path = PurePath(program)
    return f"{path.parent.name if path.stem == '__main__' else path.name} {rest}".strip()


show()
