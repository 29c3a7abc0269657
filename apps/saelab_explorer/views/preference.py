"""Preference lab: what preferring some answers does to a density, and what too much of it does to what was meant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import streamlit as st

import saelab as sl
from saelab.stats import interval_of_mean
from saelab_explorer import curves, frame, snippets
from saelab_explorer.address import BETAS, PAIRS, LabSettings, ProxyKind
from saelab_explorer.figures import percent, signed
from saelab_explorer.snippets import Card

N_SEEDS = 10

#: So weak a wish that the policy is the reference: where the curves begin.
NO_WISH = 1e6

PROXIES: dict[ProxyKind, str] = {"linear": "linear", "well_specified": "right form"}


def show() -> None:
    settings = LabSettings.from_query(st.query_params.to_dict())
    frame.show_address(settings.query())
    sub = "Preferences pull a policy away from its reference; beta pulls it back. Nothing here runs a language model."
    snippets.draw(snippets.heading("Preference lab", kicker="Train", sub=sub))
    _beta(settings)
    left, right = st.columns(2, gap="large")
    with left:
        _density(settings)
    with right:
        _overoptimisation(settings)


def _beta(settings: LabSettings) -> None:
    st.session_state["lab_beta"] = settings.beta
    st.select_slider(
        "beta: strength of the pull to the reference",
        BETAS,
        key="lab_beta",
        format_func=lambda beta: f"{beta:g}",
        on_change=_changed,
        help="From a policy close to its reference (left) to one that follows its reward alone (right). "
        "In units of the reward on the left, and of the proxy's standard deviation on the right.",
    )


def _changed() -> None:
    state = st.session_state
    chosen = LabSettings(
        beta=state["lab_beta"],
        good=state["lab_good"],
        bad=state["lab_bad"],
        pairs=state["lab_pairs"],
        proxy=state["lab_proxy"],
    )
    frame.change_address({"proxy": None, **chosen.query()})


def _density(settings: LabSettings) -> None:
    snippets.draw(snippets.section("Direct preference optimisation on a line", "the exact optimum"))
    st.session_state["lab_good"], st.session_state["lab_bad"] = settings.good, settings.bad
    one, other = st.columns(2, gap="medium")
    one.slider("Chosen answers lie near", -4.0, 4.0, step=0.1, key="lab_good", format="%.1f", on_change=_changed)
    other.slider("Rejected answers lie near", -4.0, 4.0, step=0.1, key="lab_bad", format="%.1f", on_change=_changed)
    landscape = sl.preferred_density(good=settings.good, bad=settings.bad, beta=settings.beta)
    spec = curves.preference(landscape, good=settings.good, bad=settings.bad, palette=frame.palette())
    st.vega_lite_chart(spec=spec, key="density", width="stretch")
    mass = float(landscape.policy[landscape.reward > 0.1].sum() * (landscape.x[1] - landscape.x[0]))
    before = float(landscape.reference[landscape.reward > 0.1].sum() * (landscape.x[1] - landscape.x[0]))
    cards = [
        Card("KL(policy ‖ reference)", f"{landscape.kl:.2f}", "nats", help="Distance that the policy has gone"),
        Card("Mean reward", signed(landscape.mean_reward), help="The reward is 1 at the chosen place, −1 at the other"),
        Card("Answers like the chosen", percent(mass), range=f"{percent(before)} under the reference"),
    ]
    snippets.draw(snippets.cards(cards))
    snippets.draw(snippets.note(_in_words(settings.beta, landscape.kl, mass)))


def _in_words(beta: float, kl: float, mass: float) -> str:
    if kl < 0.1:
        return f"At beta {beta:g} the policy hardly leaves its reference: the preferences move {kl:.2f} nats."
    if mass < 0.9:
        return f"At beta {beta:g} the policy leans towards the chosen answers, {kl:.2f} nats from its reference."
    return (
        f"At beta {beta:g} the policy gives almost nothing but chosen answers, {kl:.2f} nats from its reference: "
        "the other ways to answer are gone."
    )


def _overoptimisation(settings: LabSettings) -> None:
    snippets.draw(snippets.section("Over-optimisation", "a proxy learned from noisy pairs, against what it stands for"))
    st.session_state["lab_pairs"], st.session_state["lab_proxy"] = settings.pairs, settings.proxy
    one, other = st.columns(2, gap="medium")
    one.select_slider("Pairs behind the proxy", PAIRS, key="lab_pairs", format_func=str, on_change=_changed)
    other.segmented_control(
        "The proxy",
        list(PROXIES),
        key="lab_proxy",
        format_func=PROXIES.__getitem__,
        on_change=_changed,
        required=True,
        help="The gold reward likes a token only up to three times. A linear proxy cannot say so; "
        "one of the right form can, and is the control.",
    )
    with st.spinner("Training proxies…"):
        seeds = _curves(settings.pairs, settings.proxy)
    spec = curves.overoptimisation(seeds, settings.beta, frame.palette())
    st.vega_lite_chart(spec=spec, key="overoptimisation", width="stretch")
    now = next(point for point in seeds[0].exact.points if point.setting == settings.beta)
    start = seeds[0].exact.points[0]
    peaks = interval_of_mean(np.array([seed.exact.peak.distance for seed in seeds]))
    drops = interval_of_mean(np.array([seed.exact.drop for seed in seeds]))
    cards = [
        Card("Gold at this beta", signed(now.gold - start.gold), help="Gain over the reference, in its own units"),
        Card("Gold peaks at √KL", f"{peaks.value:.2f}", range=f"{peaks.low:.2f} – {peaks.high:.2f}"),
        Card("Lost after the peak", f"{drops.value:.2f}", range=f"{drops.low:.2f} – {drops.high:.2f}"),
    ]
    snippets.draw(snippets.cards(cards))
    accuracy = interval_of_mean(np.array([seed.proxy_accuracy for seed in seeds]))
    note = (
        f"Dots: beta {settings.beta:g}, where the proxy has gained {now.proxy - start.proxy:.2f} standard deviations. "
        f"Exact policies over {len(BETAS)} betas; {N_SEEDS} seeds of the pairs (thin), seed 0 bold. "
        f"The proxies agree with the gold reward on {percent(accuracy.value)} of pairs "
        f"({percent(accuracy.low)} – {percent(accuracy.high)}); 95 % intervals over seeds."
    )
    snippets.draw(snippets.note(note))


@st.cache_resource(show_spinner=False, max_entries=24)
def _curves(pairs: int, proxy: ProxyKind) -> Sequence[sl.Overoptimisation]:
    betas = (NO_WISH, *BETAS)
    return [
        sl.overoptimise(sl.OveroptConfig(n_pairs=pairs, proxy=proxy, betas=betas, best_of=(1,), seed=seed))
        for seed in range(N_SEEDS)
    ]


show()
