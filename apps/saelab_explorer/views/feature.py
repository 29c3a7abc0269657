"""Feature: the evidence for what one feature does, on one page."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from itertools import pairwise

import streamlit as st

import saelab as sl
from saelab.errors import ArtifactError
from saelab_explorer import address, card, charts, frame, snippets
from saelab_explorer.causal import CausalCheck
from saelab_explorer.components.picture import save_picture
from saelab_explorer.components.table import Column, FeatureRow, feature_table
from saelab_explorer.components.tokens import TokenRow, token_strip
from saelab_explorer.figures import count, percent
from saelab_explorer.labels import label_cell, label_parts, share_cell
from saelab_explorer.prompt_text import hand_over, handed_over

FIRST_EXAMPLES = 10

KIND_SENTENCES = {
    "token": "clearly fires on these tokens",
    "previous": "clearly fires on the token that follows",
    "bigram": "clearly fires on these pairs of tokens",
    "promotes": "no rule on tokens describes it; named after what it makes likelier",
    "weak": "a rule seen too rarely to trust",
    "none": "no rule on tokens describes it, and its effect on the logits does not stand out",
    "dead": "did not fire on the indexed text",
}


def show() -> None:
    index = frame.index()
    feature = frame.feature_number(index.n_features)
    if feature is None:
        feature = frame.first_feature(index)
    frame.show_address(address.feature_query(frame.run().name, feature))
    record = index.feature(feature)
    _head(index, record)
    if not record.alive:
        why = f"Not once in the {count(index.n_tokens)} tokens of the index, so there is no text to show."
        snippets.draw(snippets.empty("This feature never fired", why))
    evidence, figures = st.columns([5, 3], gap="large")
    if record.alive:
        with evidence:
            _examples(record)
        with figures:
            _histogram(index, record)
    with figures:
        _logits(record)
        if record.alive:
            _causal(index, record)
        _neighbours(index, record)


def _head(index: sl.FeatureIndex, record: sl.FeatureRecord) -> None:
    feature, quiet = record.index, record.label.kind in ("none", "dead")
    title, ways = st.columns([1, 1], vertical_alignment="top")
    with title:
        parts, sub = label_parts(index, feature), _label_evidence(record)
        snippets.draw(snippets.feature_heading(parts, kicker=f"Feature {feature}", sub_markup=sub, quiet=quiet))
    with ways:
        _ways(index, record)
    if record.alive:
        snippets.draw(snippets.facts(card.facts_of(record)))


def _ways(index: sl.FeatureIndex, record: sl.FeatureRecord) -> None:
    """To the feature before, the next, any other one, to steering, and to a file."""
    feature, n = record.index, index.n_features
    go = frame.go_to_feature
    with st.container(horizontal=True, horizontal_alignment="right", gap="xsmall"):
        st.button("Previous", key="back", on_click=go, args=((feature - 1) % n,), shortcut="Left")
        st.button("Next", key="on", on_click=go, args=((feature + 1) % n,), shortcut="Right")
        st.button("Random", key="random", on_click=go, args=(_another(index, feature),), shortcut="x")
        if st.button("Steer", key="steer", type="primary", shortcut="s"):
            frame.open_feature(feature, frame.STEER)
        with st.popover("", icon=":material/more_horiz:", help="Go to a number, save as JSON, HTML or PNG"):
            st.session_state["go_to"] = None
            st.number_input(f"Go to feature (0 to {n - 1})", 0, n - 1, key="go_to", step=1, on_change=_typed_number)
            _files(index, record)


def _files(index: sl.FeatureIndex, record: sl.FeatureRecord) -> None:
    """The evidence as files, with the causal check if it was made."""
    # files are made when they are asked for, outside of any session: everything they need is read here
    run, evidence = frame.run().name, _label_evidence(record)
    name = f"{run}_feature_{record.index}"
    check = _checks().get(_check_key(index, record.index))
    kinds = {
        "JSON": (lambda: export(run, index, record, check), "application/json"),
        "HTML": (lambda: card.document(index, record, evidence, check).encode(), "text/html"),
    }
    for kind, (data, mime) in kinds.items():
        st.download_button(
            f"Save as {kind}",
            data=data,
            file_name=f"{name}.{kind.lower()}",
            mime=mime,
            on_click="ignore",
            icon=":material/download:",
            width="stretch",
            key=f"save_{kind}",
        )
    markup = card.style() + card.body_of(index, record, evidence, check)
    save_picture("Save as PNG", markup=markup, file_name=f"{name}.png", width=1240, key="save_png")


def _label_evidence(record: sl.FeatureRecord) -> str:
    """What the label rests on; markup made of our own words and numbers alone."""
    label = record.label
    sentence = KIND_SENTENCES.get(label.kind, "")
    if label.precision is None or label.recall is None:
        return sentence
    scores = f"precision <b>{percent(label.precision)}</b>, recall <b>{percent(label.recall)}</b>"
    matches = f"{count(label.n_held_out)} matches in documents that did not choose the rule"
    return f"{sentence} · {scores} on {matches}; below a quarter of its maximum counts neither way"


def _another(index: sl.FeatureIndex, feature: int) -> int:
    """Some other feature that fired."""
    alive = index.by_density(1e-12)
    return int(random.choice(alive)) if len(alive) else feature


def _typed_number() -> None:
    if st.session_state["go_to"] is not None:
        frame.go_to_feature(int(st.session_state["go_to"]))


def export(run: str, index: sl.FeatureIndex, record: sl.FeatureRecord, check: CausalCheck | None) -> bytes:
    """Everything the page shows, with what it was made from, as JSON."""
    made_from = ("hook_name", "model_name", "model_sha256", "sae_sha256", "activations_sha256", "n_tokens")
    source = {name: getattr(index.manifest, name) for name in made_from}
    content = {"run": run, "source": source, "feature": asdict(record)}
    if check is not None:
        texts = [text._asdict() for text in check.texts]
        content["causal_check"] = asdict(check) | {"texts": texts, "advantage": check.advantage}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


@st.fragment
def _examples(record: sl.FeatureRecord) -> None:
    if handed_over():
        st.switch_page(frame.PROMPT, query_params={"run": frame.run().name})
    groups = _groups(record)
    snippets.draw(snippets.section("Text it fires on", "strongest first, or a sample between two activations"))
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        chosen = st.segmented_control(
            "Examples",
            list(groups),
            default="Top",
            key=f"group{record.index}",
            label_visibility="collapsed",
            required=True,
        )
        breaks = st.toggle("Line breaks", key="breaks")
    examples = groups[chosen or "Top"]
    everything = f"all{record.index}{chosen}"
    shown = examples if st.session_state.get(everything) else examples[:FIRST_EXAMPLES]
    rows = [TokenRow(e.tokens, e.acts, e.peak, e.position - e.peak, f"{e.act:.2f}", e.title) for e in shown]
    detail = st.container()  # above the strip: under it, the answer to a click would be off the screen
    clicked = token_strip(rows, key=f"strip{record.index}{chosen}", max_act=record.max_act, breaks=breaks)
    with detail:
        if clicked is None:
            snippets.draw(snippets.legend(record.max_act))
        else:
            _token(shown[clicked.row], clicked.i)
    if len(shown) < len(examples):
        st.button(f"Show all {len(examples)}", key="more", on_click=_remember, args=(everything,), type="tertiary")


def _groups(record: sl.FeatureRecord) -> dict[str, tuple[sl.Example, ...]]:
    """The top examples, then those of each interval that has some, the highest interval first."""
    names = [f"{low:.3g}–{high:.3g}" for low, high in pairwise(record.interval_edges)]
    intervals = dict(zip(reversed(names), reversed(record.interval_examples), strict=True))
    return {"Top": record.top_examples} | {name: examples for name, examples in intervals.items() if examples}


def _remember(key: str) -> None:
    st.session_state[key] = True


def _token(example: sl.Example, i: int) -> None:
    """What was clicked, and the way from here to all features of the text."""
    position = example.position - example.peak + i
    where = f"{example.acts[i]:.3f} at position {position} of row {example.row}"
    where += f", from {example.title}" if example.title else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        snippets.draw(snippets.note_of(f"{snippets.token(example.tokens[i])} {snippets.escaped(where)}"))
        text = "".join(example.tokens)
        st.button(
            "Read this text",
            key="read",
            on_click=hand_over,
            args=(text,),
            type="tertiary",
            icon=":material/edit_note:",
            help="Open it on the prompt page, with every feature of every token",
        )


def _histogram(index: sl.FeatureIndex, record: sl.FeatureRecord) -> None:
    note = f"on the {count(record.n_fired)} tokens where it fires, of {count(index.n_tokens)}"
    snippets.draw(snippets.section("Activations", note))
    spec = charts.histogram(record.histogram.edges, record.histogram.counts, frame.palette())
    st.vega_lite_chart(spec=spec, key="histogram", width="stretch")


def _logits(record: sl.FeatureRecord) -> None:
    if not record.promoted and not record.suppressed:
        return
    snippets.draw(snippets.section("Direct effect on the next token", f"z = {record.logit_z:.1f}"))
    if not record.stands_out:
        snippets.draw(snippets.note("No token stands out over the vocabulary, so none is listed: it would be noise."))
        return
    promoted, suppressed = ([(e.token, e.effect) for e in side] for side in (record.promoted, record.suppressed))
    snippets.draw(snippets.effects(promoted, suppressed))
    note = "Logits per unit of activation, through the final norm's gain and the unembedding, mean removed."
    snippets.draw(snippets.note(note))


def _causal(index: sl.FeatureIndex, record: sl.FeatureRecord) -> None:
    """Taking the feature away where it fires, on demand: it needs the model."""
    known = _checks().get(_check_key(index, record.index))
    if known is not None:
        snippets.draw(card.causal_markup(known))
        return
    snippets.draw(snippets.section("Causal check"))
    try:
        sae_path = frame.run().stage("sae")
    except ArtifactError as error:
        snippets.draw(snippets.note(f"It needs the SAE and its model: {error}."))
        return
    asked = st.button(
        "Take it away where it fires",
        key="causal",
        icon=":material/science:",
        help="Runs the model on its strongest texts with and without the feature, and without another one as a control",
    )
    if not asked:
        return
    from saelab_explorer import causal, live

    ready, bar = live.ready(sae_path), st.progress(0.0, "running the model")

    def progress(n: int, total: int) -> None:
        bar.progress(n / total, f"text {n} of {total}")

    check = causal.causal_check(ready, record, progress=progress)
    _checks()[_check_key(index, record.index)] = check
    st.rerun()


def _checks() -> dict[tuple[str, str, int], CausalCheck]:
    """Causal checks of this session."""
    return st.session_state.setdefault("causal_checks", {})


def _check_key(index: sl.FeatureIndex, feature: int) -> tuple[str, str, int]:
    return (str(index.path), index.manifest.sae_sha256 or "", feature)


NEAREST = {
    "direction": Column("Cosine", "bar", help="Cosine of the decoder rows"),
    "fire together": Column(
        "Jaccard", "bar", help="Tokens on which both fire, as a share of those on which either does"
    ),
}


def _neighbours(index: sl.FeatureIndex, record: sl.FeatureRecord) -> None:
    if not record.neighbours_cosine and not record.neighbours_coactivation:
        return
    snippets.draw(snippets.section("Nearest features"))
    by = st.segmented_control(
        "Nearest by", list(NEAREST), default="direction", key="nearest", label_visibility="collapsed", required=True
    )
    nearest = record.neighbours_cosine if by == "direction" else record.neighbours_coactivation
    columns = (Column("Feature", "feature"), Column("Label", "label"), NEAREST[by or "direction"])
    rows = [
        FeatureRow(n.feature, (n.feature, label_cell(index, n.feature), share_cell(n.score, f"{n.score:.2f}")))
        for n in nearest
    ]
    clicked = feature_table(columns, rows, key="neighbours", run=frame.run().name)
    if clicked.open is not None:
        frame.open_feature(clicked.open)


show()
