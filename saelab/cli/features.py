"""saelab features: look features up by what they fire on, by token, by density or by number."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saelab.cli.console import AsJson, Device, emit, say, table
from saelab.cli.inputs import model_of
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.features.index import FeatureIndex
    from saelab.features.records import Example, FeatureRecord, SearchHit


def features(
    run: Annotated[Path, typer.Argument(help="Directory of an index, or its workspace.")],
    feature: Annotated[int | None, typer.Argument(help="Show this feature.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Run the model on this text and find the features that fire on it.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Find features by the words of their labels and tokens; needs no model.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Find the features most specific to this token.")] = None,
    density: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Features that fire on a share of tokens in this range.")
    ] = None,
    specific: Annotated[
        bool, typer.Option("--specific", help="The features whose token rule has the highest held-out precision.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many to list.")] = 10,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Search the feature index, or show one feature with its evidence."""
    from saelab.features.index import FeatureIndex

    index = FeatureIndex.open(run)
    asked = [option is not None for option in (feature, text, label, token, density)]
    if sum(asked) + specific != 1:
        raise ConfigError(
            "features needs one thing to look up: a feature's number, --text, --label, --token, --density or --specific"
        )
    if feature is not None:
        record = index.feature(feature)
        if json:
            emit(asdict(record))
        else:
            print(as_card(record))
        return
    if text is not None:
        hits = _by_inference(index, text, top, device)
    elif label is not None:
        hits = index.search(label, n=top)
    elif token is not None:
        hits = index.search_token(token, n=top)
    elif density is not None:
        hits = _listed(index, [int(i) for i in index.by_density(*_range(density))[:top]])
    else:
        hits = _listed(index, index.most_token_specific(top))
    if json:
        emit([asdict(hit) for hit in hits])
    elif not hits:
        say("nothing matches")
    else:
        print(
            table(
                [[str(h.feature), f"{h.score:.3f}", f"{h.density:.4%}", h.label, h.why] for h in hits],
                header=["feature", "score", "density", "label", "why"],
            )
        )


def as_card(record: FeatureRecord, *, n_examples: int = 5) -> str:
    """A feature on one screen: label and its score, numbers, examples, logits, neighbours."""
    label = record.label
    lines = [f"feature {record.index}: {label.text}  [{label.kind}]"]
    if label.precision is not None and label.recall is not None:
        lines.append(
            f"  the rule on held-out text: precision {label.precision:.2f}, recall {label.recall:.2f} "
            f"({label.n_held_out} positions)"
        )
    lines.append(
        f"  fires on {record.density:.4%} of tokens ({record.n_fired:,}), "
        f"max {record.max_act:.2f}, median {record.quantiles.q50:.2f}"
    )
    lines += [f"  {example.act:8.2f}  {as_line(example)}" for example in record.top_examples[:n_examples]]
    if record.stands_out:
        for name, effects in (("promotes", record.promoted), ("suppresses", record.suppressed)):
            lines.append(f"  {name}: " + ", ".join(f"{e.token!r} {e.effect:+.2f}" for e in effects[:6]))
    else:
        lines.append("  no direct effect on the output stands out from that of random directions")
    nearest = ", ".join(f"{n.feature} ({n.score:.2f})" for n in record.neighbours_cosine[:5])
    return "\n".join([*lines, f"  nearest by cosine: {nearest}"])


def as_line(example: Example, *, before: int = 12, after: int = 6) -> str:
    """The text around the peak, with the tokens on which the feature fires in brackets."""
    start = max(0, example.peak - before)
    pieces = [f"[{t}]" if a > 0 else t for t, a in zip(example.tokens, example.acts, strict=True)]
    return "".join(pieces[start : example.peak + after + 1]).replace("\n", "↵")


def _by_inference(index: FeatureIndex, text: str, n: int, device: str | None) -> list[SearchHit]:
    from saelab import rundir
    from saelab.features.search import features_in_text
    from saelab.sae.io import load_sae

    rundir.check_parents(index.path)  # an index of an earlier SAE would name other features
    sae = load_sae(rundir.parent(index.path, "sae"))
    return features_in_text(model_of(sae, device=device), sae, index, text, n=n)


def _listed(index: FeatureIndex, chosen: list[int]) -> list[SearchHit]:
    from saelab.features.records import SearchHit

    labels = [index.label(i) for i in chosen]
    return [
        SearchHit(
            i,
            label.precision or 0.0,
            label.text,
            float(index.column("density")[i]),
            f"{label.kind} rule, held-out precision {label.precision:.2f}, recall {label.recall:.2f}"
            if label.precision is not None
            else label.kind,
        )
        for i, label in zip(chosen, labels, strict=True)
    ]


def _range(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        bounds = float(low or 0), float(high or 1)
    except ValueError:
        colon = ""
    if not colon or not bounds[0] <= bounds[1]:
        raise ConfigError(
            f"--density needs LOW:HIGH, shares between 0 and 1, got {text!r}; write for example 0.001:0.01"
        )
    return bounds
