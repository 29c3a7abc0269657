"""The evidence card of a feature: one page that needs no server, no script and no network, to keep or to send."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import saelab as sl
from saelab_explorer import snippets, theme
from saelab_explorer.causal import CausalCheck
from saelab_explorer.figures import count, percent, signed
from saelab_explorer.labels import label_line, label_parts

N_TOP, N_EACH, N_NEAREST = 8, 2, 5


def document(index: sl.FeatureIndex, record: sl.FeatureRecord, evidence: str, check: CausalCheck | None) -> str:
    """The card as an HTML file. ``evidence`` is the line under its title, as markup."""
    title = snippets.escaped(f"Feature {record.index}: {label_line(index, record.index)}")
    body = body_of(index, record, evidence, check)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'{style()}<style>:root {{ color-scheme: light dark; }} body {{ margin: 0 auto; max-width: 78rem; }}</style>'
        f"</head><body>{body}</body></html>\n"
    )  # fmt: skip


def style() -> str:
    """The style sheets of a card: those of the pages, and its own."""
    return f"{theme.page_style()}<style>{Path(__file__).with_name('card.css').read_text('utf-8')}</style>"


def body_of(index: sl.FeatureIndex, record: sl.FeatureRecord, evidence: str, check: CausalCheck | None) -> str:
    """The card without its frame, as markup."""
    quiet = record.label.kind in ("none", "dead")
    kicker = f"Feature {record.index}"
    head = snippets.feature_heading(label_parts(index, record.index), kicker=kicker, sub_markup=evidence, quiet=quiet)
    left, right = _examples(record), _histogram(record) + _logits(record) + _nearest(index, record)
    if check is not None:
        right += causal_markup(check)
    facts = snippets.facts(facts_of(record)) if record.alive else ""
    columns = f'<div class="columns"><div>{left}</div><div>{right}</div></div>'
    return f'<div class="sx-card-page">{head}{facts}{columns}{_source(index)}</div>'


def facts_of(record: sl.FeatureRecord) -> dict[str, str]:
    """The numbers under a feature's title."""
    middle, high, highest = record.quantiles
    return {
        "Density": percent(record.density),
        "Fired on": f"{count(record.n_fired)} tokens",
        "Clearly on": count(record.n_clear),
        "Largest": f"{record.max_act:.2f}",
        "Mean when on": f"{record.mean_act:.2f}",
        "Median · 90 % · 99 %": f"{middle:.2f} · {high:.2f} · {highest:.2f}",
    }


def causal_markup(check: CausalCheck) -> str:
    """What the causal check found, as markup."""
    heading = snippets.section("Causal check", "taken away where it fires most")
    if not check.texts:
        none = f"It fires on none of the {check.n_read} excerpts when they are read alone, so there is nothing to take."
        return heading + snippets.note(none)
    mean = sum(text.kl for text in check.texts) / len(check.texts)
    control = sum(text.control_kl for text in check.texts) / len(check.texts)
    facts = {"Next-token KL without it": f"{mean:.3f} nats", "Without a control": f"{control:.3f} nats"}
    advantage = check.advantage
    if advantage is not None:
        facts["Difference"] = f"{signed(advantage.value)} ({signed(advantage.low)} to {signed(advantage.high)})"
    lost, won = (
        ", ".join(f"{snippets.token(token)} {percent(value)}" for token, value in side)
        for side in (check.supported, check.held_back)
    )
    moved = f"Less likely without it: {lost or 'no token by 0.01 %'}. Likelier: {won or 'no token by 0.01 %'}."
    how = (
        f"Mean over {len(check.texts)} of {check.n_read} top excerpts, at the token after the peak; the control is the "
        "feature of nearest activation there. 95 % interval over excerpts."
    )
    return heading + snippets.facts(facts) + snippets.note_of(moved) + snippets.note(how)


def _examples(record: sl.FeatureRecord) -> str:
    if not record.alive:
        return snippets.empty("This feature never fired", "Not once in the text of the index.")
    parts = [snippets.section("Text it fires on", "strongest first")]
    parts += [snippets.strip(e.tokens, e.acts, e.peak, record.max_act) for e in record.top_examples[:N_TOP]]
    for (low, high), examples in reversed(
        list(zip(pairwise(record.interval_edges), record.interval_examples, strict=True))
    ):
        if examples:
            parts.append(snippets.section(f"Between {low:.3g} and {high:.3g}", "a sample"))
            parts += [snippets.strip(e.tokens, e.acts, e.peak, record.max_act) for e in examples[:N_EACH]]
    return "".join(parts)


def _histogram(record: sl.FeatureRecord) -> str:
    """Firings by activation; bins of equal ratio, heights logarithmic."""
    counts, edges = record.histogram.counts, record.histogram.edges
    filled = [i for i, n in enumerate(counts) if n]
    if not filled:
        return ""
    first, last = filled[0], filled[-1]
    top, wide = math.log1p(max(counts)), 380 / (last - first + 1)
    bars = "".join(
        f'<rect x="{10 + (i - first) * wide:.1f}" width="{max(wide - 0.8, 0.6):.1f}" '
        f'y="{100 - 92 * math.log1p(counts[i]) / top:.1f}" height="{92 * math.log1p(counts[i]) / top:.1f}">'
        f"<title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {counts[i]}</title></rect>"
        for i in filled
    )
    ends = (
        f'<text x="10" y="116">{edges[first]:.3g}</text>'
        f'<text x="390" y="116" text-anchor="end">{edges[last + 1]:.3g}</text>'
    )
    picture = f'<svg viewBox="0 0 400 122" role="img" aria-label="histogram of activations">{bars}{ends}</svg>'
    return snippets.section("Activations", "both axes logarithmic") + picture


def _logits(record: sl.FeatureRecord) -> str:
    if not record.promoted and not record.suppressed:
        return ""
    heading = snippets.section("Direct effect on the next token", f"z = {record.logit_z:.1f}")
    if not record.stands_out:
        return heading + snippets.note("No token stands out over the vocabulary, so none is listed.")
    promoted, suppressed = ([(e.token, e.effect) for e in side] for side in (record.promoted, record.suppressed))
    return heading + snippets.effects(promoted, suppressed)


def _nearest(index: sl.FeatureIndex, record: sl.FeatureRecord) -> str:
    near = record.neighbours_cosine[:N_NEAREST]
    if not near:
        return ""
    lines = "".join(
        snippets.note_of(
            f"{n.feature} &#183; {n.score:.2f} &#183; {snippets.label_markup(label_parts(index, n.feature))}"
        )
        for n in near
    )
    return snippets.section("Nearest features", "by decoder cosine") + lines


def _source(index: sl.FeatureIndex) -> str:
    made, n_tokens = index.manifest, count(index.n_tokens)
    sae = f", SAE {made.sae_sha256[:10]}" if made.sae_sha256 else ""
    return snippets.note(f"{made.model_name} at {made.hook_name}{sae}, over {n_tokens} tokens of text; saelab.")
