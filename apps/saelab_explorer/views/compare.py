"""Compare: the features of two SAEs, or of two layers, each beside the nearest one of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st

import saelab as sl
from saelab.errors import ConfigError
from saelab.stats import interval_of_mean
from saelab_explorer import address, charts, frame, live, pair_charts, pairing, snippets
from saelab_explorer.address import CompareSettings, PairAxis, Similarity
from saelab_explorer.components.table import Column, FeatureRow, feature_table
from saelab_explorer.components.tokens import TokenRow, token_strip
from saelab_explorer.dictionaries import Dictionary, find_dictionaries
from saelab_explorer.figures import count, percent
from saelab_explorer.labels import label_cell, label_parts, share_cell
from saelab_explorer.pairing import Pairing
from saelab_explorer.runs import find_runs
from saelab_explorer.snippets import Card

NAMES: Mapping[Similarity, str] = {"direction": "direction", "activation": "activation"}
WHAT: Mapping[Similarity, str] = {"direction": "cosine of decoder rows", "activation": "correlation of activations"}
AXES: Mapping[PairAxis, str] = {"density": "density", "norm": "decoder norm", "max": "largest activation"}
ORDERS = {"most": "most alike", "least": "least alike"}

#: Similarity from which two features count as the same (Paulo and Belrose 2025, arXiv 2501.16615).
SAME = 0.7
N_ROWS, N_EXAMPLES, N_KEPT = 25, 4, 6


@dataclass(frozen=True)
class Side:
    """One of the two SAEs."""

    dictionary: Dictionary
    index: sl.FeatureIndex


def show() -> None:
    known = find_dictionaries(find_runs(frame.root()))
    own = [name for name, dictionary in known.items() if dictionary.run == frame.run().name]
    settings = CompareSettings.from_query(st.query_params.to_dict())
    if not own:
        frame.show_address()
        frame.index()  # without one the page ends here
        why = "Its index does not record which SAE it describes, so there are no decoder rows to compare."
        frame.gap("The SAE of this run is not known", why, frame.run().command("index"))
    _check(settings, known, own)
    first = settings.first or own[0]
    others = [name for name in known if name != first]
    head = snippets.heading("Compare", kicker=frame.run().name, sub="Each feature beside its nearest in another SAE")
    if not others:
        frame.show_address()
        snippets.draw(head)
        path, other = frame.run().path, frame.run().path.with_name(f"{frame.run().name}-seed1")
        why = "One indexed SAE is here, and a comparison needs two. These commands train and index another one."
        commands = f"saelab train {path} --seed 1 --out {other / 'sae'}\nsaelab index {other}"
        frame.gap("There is nothing to compare with yet", why, commands)
    second = settings.second or others[0]
    snippets.draw(head)
    _controls(settings, own, others, first, second)  # first, so that another one can be chosen if this one is broken
    sides = tuple(Side(known[name], frame.cached_index(str(known[name].index))) for name in (first, second))
    feature = _feature_of_address(sides[0].index)
    chosen = {"feature": str(feature)} if feature is not None else {}
    frame.show_address({**settings.query(), "first": first if len(own) > 1 else "", "second": second, **chosen})
    found = _paired(sides[0], sides[1], settings)
    _summary(found, settings)
    _pictures(sides[0], sides[1], found, settings)
    if feature is not None:
        _pair(sides[0], sides[1], found, feature, settings)
    _table(sides[0], sides[1], found, feature)


def _check(settings: CompareSettings, known: Mapping[str, Dictionary], own: list[str]) -> None:
    """An address that names no indexed SAE ends the page with a way on."""
    for name, allowed in ((settings.first, own), (settings.second, list(known))):
        if name and name not in allowed:
            sentence = f"There is no indexed SAE {name[:60]!r} under {frame.root()}"
            frame.dead_end(sentence, frame.COMPARE, f"Compare {frame.run().name}", {"run": frame.run().name})
    if settings.second and settings.second == (settings.first or own[0]):
        sentence = f"{settings.second} cannot be compared with itself"
        frame.dead_end(sentence, frame.COMPARE, "Choose another one", {"run": frame.run().name})


def _feature_of_address(index: sl.FeatureIndex) -> int | None:
    text = st.query_params.get("feature")
    if text is None:
        return None
    try:
        return address.whole_number(text, below=index.n_features, what="The feature")
    except ConfigError as error:
        frame.dead_end(str(error), frame.COMPARE, "Compare without it", {"run": frame.run().name})


def _controls(settings: CompareSettings, own: list[str], others: list[str], first: str, second: str) -> None:
    state = st.session_state
    state["pair_first"], state["pair_second"] = first, second
    state["pair_by"], state["pair_tokens"], state["pair_axis"] = settings.by, settings.tokens, settings.axis
    columns = iter(st.columns([3, 3, 3, 3] if len(own) > 1 else [4, 3, 3], gap="medium", vertical_alignment="top"))
    if len(own) > 1:
        next(columns).selectbox("First SAE", own, key="pair_first", on_change=_changed)
    next(columns).selectbox("Compare with", others, key="pair_second", on_change=_changed)
    next(columns).segmented_control(
        "Nearest by",
        list(NAMES),
        key="pair_by",
        format_func=NAMES.__getitem__,
        on_change=_changed,
        required=True,
        help="Direction: cosine of decoder rows. Activation: correlation of activations on the same tokens",
    )
    if settings.by == "activation":
        next(columns).select_slider(
            "Held-out tokens",
            address.TOKENS,
            key="pair_tokens",
            format_func=count,
            on_change=_changed,
            help="Read again by the model; more tokens let rarer features take part",
        )


def _changed() -> None:
    state, now = st.session_state, CompareSettings.from_query(st.query_params.to_dict())
    changed = CompareSettings(
        first=state.get("pair_first", now.first),
        second=state["pair_second"],
        by=state["pair_by"],
        tokens=state.get("pair_tokens", now.tokens),
        axis=state.get("pair_axis", now.axis),
    )
    if changed.second == changed.first:  # the first became what it was compared with
        changed = CompareSettings(first=changed.first, by=changed.by, tokens=changed.tokens, axis=changed.axis)
    left_out = dict.fromkeys(("first", "second", "by", "tokens", "axis"))
    other_first = changed.first != now.first and now.first
    frame.change_address({**left_out, **({"feature": None} if other_first else {}), **changed.query()})


def _paired(one: Side, other: Side, settings: CompareSettings) -> Pairing:
    """Nearest features, computed once for all sessions; what takes longer than a second shows its progress."""
    kept = _kept()
    n_tokens = settings.tokens if settings.by == "activation" else 0
    key = (one.dictionary.fingerprint, other.dictionary.fingerprint, settings.by, n_tokens)
    if key not in kept:
        if settings.by == "activation":
            kept[key] = _by_activation(one, other, settings.tokens)
        else:
            with st.spinner("Comparing directions…"):
                kept[key] = _by_direction(one, other)
        while len(kept) > N_KEPT:
            kept.pop(next(iter(kept)))
    return kept[key]


@st.cache_resource(show_spinner=False)
def _kept() -> dict[Any, Pairing]:
    return {}


def _by_direction(one: Side, other: Side) -> Pairing:
    rows = [_decoder(side) for side in (one, other)]
    alive = [side.index.column("density") > 0 for side in (one, other)]
    return pairing.by_direction(rows[0], rows[1], alive[0], alive[1])


def _by_activation(one: Side, other: Side, n_tokens: int) -> Pairing:
    first, second = (live.ready(side.dictionary.sae()) for side in (one, other))
    if first.model.weights_sha256 == second.model.weights_sha256:
        second = live.Live(first.model, second.sae)  # one pass serves both
    elif one.index.vocabulary != other.index.vocabulary:
        raise ConfigError("the two models have other vocabularies, so they read no token alike; compare by direction")
    store = sl.ActivationStore.open(one.dictionary.activations())
    rows = store.rows("held_out")
    rows = rows if len(rows) else store.rows("train")
    ids = store.tokens(rows[: -(-n_tokens // store.context)]).numpy()
    bar, stop = st.progress(0.0, "reading"), st.empty()
    stop.button("Stop", key="pair_stop", icon=":material/stop:")  # any click ends this run of the page
    acts = pairing.activations(first, second, ids, progress=bar.progress)
    bar.progress(1.0, "correlating")
    found = pairing.by_activation(*acts)
    bar.empty(), stop.empty()
    return found


def _decoder(side: Side) -> np.ndarray:
    path = side.dictionary.sae()
    return _open_decoder(str(path), side.dictionary.fingerprint)


@st.cache_resource(show_spinner=False, max_entries=4)
def _open_decoder(path: str, fingerprint: str) -> np.ndarray:
    return pairing.decoder(sl.load_sae(path))


def _summary(found: Pairing, settings: CompareSettings) -> None:
    known = found.known
    similarity, control = found.nearest.similarity[known], found.control[~np.isnan(found.control)]
    mean, same = interval_of_mean(similarity), interval_of_mean((similarity >= SAME).astype(float))
    mutual = interval_of_mean(found.mutual[known].astype(float))
    cards = [
        Card(
            f"Mean {WHAT[settings.by].split()[0]}",
            f"{mean.value:.3f}",
            "",
            f"{mean.low:.3f} – {mean.high:.3f}",
            (mean.low, mean.value, mean.high),
            f"Mean over features of the {WHAT[settings.by]} with the nearest one",
        ),
        Card("By chance", f"{control.mean():.3f}", help="The same where nothing can match"),
        Card(f"At least {SAME:g}", percent(same.value), "", f"{percent(same.low)} – {percent(same.high)}"),
        Card(
            "Each other's nearest",
            percent(mutual.value),
            "",
            f"{percent(mutual.low)} – {percent(mutual.high)}",
            help="The feature is also the nearest one of its partner",
        ),
    ]
    snippets.draw(snippets.cards(cards))
    of = f"{count(len(known))} of {count(len(found.mutual))} features"
    if settings.by == "direction":
        note = f"{of}: those that fired on their indexed text. By chance: coordinates of the other decoder permuted."
    else:
        note = (
            f"{of}: those that fire on {pairing.MIN_FIRINGS} or more of {count(found.n_tokens)} held-out tokens, "
            "together with some feature of the other. By chance: the other's tokens moved on by half of them."
        )
    snippets.draw(snippets.note(f"{note} 95 % intervals over features."))


def _pictures(one: Side, other: Side, found: Pairing, settings: CompareSettings) -> None:
    known, palette = found.known, frame.palette()
    left, right = st.columns([2, 3], gap="large")
    with left:
        snippets.draw(snippets.section("How alike", "bars; dashed: by chance"))
        control = found.control[~np.isnan(found.control)]
        spec = pair_charts.similarities(found.nearest.similarity[known], control, WHAT[settings.by], palette)
        st.vega_lite_chart(spec=spec, key="similarities", width="stretch")
    with right:
        snippets.draw(snippets.section("Pairs", "blue: each other's nearest; click one to see both"))
        st.segmented_control(
            "Axes",
            list(AXES),
            key="pair_axis",
            format_func=AXES.__getitem__,
            on_change=_changed,
            label_visibility="collapsed",
            required=True,
        )
        partner = found.nearest.partner[known]
        scatter = pair_charts.partners(
            known,
            partner,
            found.nearest.similarity[known],
            found.mutual[known],
            (_place(one, settings.axis)[known], _place(other, settings.axis)[partner]),
            one.index.column("label").tolist(),
            AXES[settings.axis],
            (one.dictionary.name, other.dictionary.name),
            palette,
        )
        if scatter is None:
            snippets.draw(snippets.note(f"No pair has a {AXES[settings.axis]} above 0 on both sides."))
            return
        st.vega_lite_chart(spec=scatter, key="pairs", on_select=_dot_chosen, width="stretch")


def _dot_chosen() -> None:
    feature = charts.selected_feature(dict(st.session_state["pairs"]).get("selection"))
    if feature is not None:
        frame.change_address({"feature": str(feature)})


def _place(side: Side, axis: PairAxis) -> np.ndarray:
    if axis == "norm":
        return np.linalg.norm(_decoder(side), axis=1)
    return side.index.column(axis).astype(float)


def _pair(one: Side, other: Side, found: Pairing, feature: int, settings: CompareSettings) -> None:
    """Both features of a pair, text beside text."""
    partner = int(found.nearest.partner[feature])
    snippets.draw(snippets.section(f"Feature {feature} and its nearest", _how_alike(found, feature, settings)))
    columns = st.columns(2, gap="large")
    for column, side, number in zip(columns, (one, other), (feature, partner), strict=True):
        with column:
            if number < 0:
                snippets.draw(snippets.empty("No partner is known", "It fires too rarely for a comparison."))
                continue
            _one_of_pair(side, number)


def _how_alike(found: Pairing, feature: int, settings: CompareSettings) -> str:
    if found.nearest.partner[feature] < 0:
        return ""
    mutual = "each other's nearest" if found.mutual[feature] else "the partner has a nearer one"
    return f"{WHAT[settings.by]} {found.nearest.similarity[feature]:.3f}, {mutual}"


def _one_of_pair(side: Side, feature: int) -> None:
    record = side.index.feature(feature)
    label = snippets.label_markup(label_parts(side.index, feature))
    kicker = f"{side.dictionary.name} · feature {feature}"
    snippets.draw(snippets.small_heading(label, kicker=kicker))
    facts = {"Density": percent(record.density), "Largest": f"{record.max_act:.2f}"}
    snippets.draw(snippets.facts(facts | {"Norm": f"{np.linalg.norm(_decoder(side)[feature]):.2f}"}))
    rows = [
        TokenRow(e.tokens, e.acts, e.peak, e.position - e.peak, f"{e.act:.2f}", e.title)
        for e in record.top_examples[:N_EXAMPLES]
    ]
    token_strip(rows, key=f"pair_{side.dictionary.name}_{feature}", max_act=record.max_act)
    st.page_link(
        frame.FEATURE,
        label=f"Open feature {feature} of {side.dictionary.name}",
        icon=":material/arrow_forward:",
        query_params=address.feature_query(side.dictionary.run, feature),
    )


def _table(one: Side, other: Side, found: Pairing, feature: int | None) -> None:
    snippets.draw(snippets.section("Features and their nearest", "click a row to see both"))
    order = st.segmented_control(
        "Order", list(ORDERS), default="most", format_func=ORDERS.__getitem__, key="pair_order",
        label_visibility="collapsed", required=True, persist_state="session",
    )  # fmt: skip
    known = found.known[::-1] if order == "least" else found.known
    rows = []
    for i in known[:N_ROWS].tolist():
        partner, similarity = int(found.nearest.partner[i]), float(found.nearest.similarity[i])
        bar = share_cell(max(similarity, 0.0), f"{similarity:.2f}")
        mutual = "yes" if found.mutual[i] else "no"
        cells = (i, label_cell(one.index, i), bar, mutual, str(partner), label_cell(other.index, partner))
        rows.append(FeatureRow(i, cells))
    columns = (
        Column("Feature", "feature"),
        Column(f"Label in {one.dictionary.name}", "label"),
        Column("Alike", "bar"),
        Column("Mutual", "quiet", priority=3, help="Each other's nearest"),
        Column("Nearest", "number"),
        Column(f"Label in {other.dictionary.name}", "label", priority=2),
    )
    run = one.dictionary.run
    frame.follow(feature_table(columns, rows, key="pair_table", run=run, pick=True, chosen=feature))


show()
