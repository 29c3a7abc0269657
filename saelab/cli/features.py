"""saelab features: look features up by what they fire on, by token, by density or by number."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import AsJson, Device, emit, say, table
from saelab.cli.inputs import model_of
from saelab.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saelab.features.index import FeatureIndex
    from saelab.features.records import Example, FeatureRecord, SearchHit

#: Tokens that --like --by use reads, spread over the index's text.
_USE_TOKENS = 20_000

_COLOURS = (
    "Colours tell the kind of label: blue token, orange token before, green pair, pink promotes, light blue weak, grey "
    "none, red dead. Point at a dot to read its label."
)


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
    meaning: Annotated[
        str | None, typer.Option(help="Find features by what their labels and examples mean; needs --encoder.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Sentence encoder for --meaning (sentence-transformers): directory or hub name.")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="With a FEATURE: the features of this other SAE (a layer, a seed) that resemble it."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="--like by direction (cosine of decoder rows) or by use (firing on the same tokens).")
    ] = "direction",
    map_: Annotated[
        Path | None, typer.Option("--map", help="Write a map of all features to this file (.html, .svg or .json).")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="The map's: pca, or umap; by default umap where it is installed.")
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
    asked = [option is not None for option in (feature, text, label, token, density, meaning, map_)]
    if sum(asked) + specific != 1:
        raise ConfigError(
            "features needs one thing to look up: a feature's number, --text, --label, --token, --density, --meaning, "
            "--map or --specific"
        )
    if like is not None and feature is None:
        raise ConfigError(
            "--like compares one feature; give its number, for example: saelab features RUN 2080 --like SAE"
        )
    if (meaning is None) != (encoder is None):
        raise ConfigError("--meaning and --encoder go together; --label searches without an encoder")
    if map_ is not None:
        found = write_map(index, map_, method)
        if json:
            emit(found)
        return
    if feature is not None and like is not None:
        rows = similar_features(index, feature, like, by=by, n=top, device=device)
        if json:
            emit(rows)
        else:
            say(f"the best of features that have nothing to do with it reaches {rows['chance']:.3f} (95 % quantile)")
            print(
                table([[str(f), f"{score:.3f}"] for f, score in rows["features"]], header=["feature there", f"by {by}"])
            )
        return
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
    elif meaning is not None and encoder is not None:
        hits = _by_meaning(index, meaning, encoder, top, device)
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


def similar_features(
    index: FeatureIndex, feature: int, other_path: Path, *, by: str, n: int, device: str | None
) -> dict[str, Any]:
    """The features of another SAE that resemble one of this index's SAE, with what chance would give."""
    from saelab import rundir
    from saelab.activations.store import ActivationStore
    from saelab.features.similar import by_direction, by_use
    from saelab.sae.io import load_sae

    if by not in ("direction", "use"):
        raise ConfigError(f"--by must be direction or use, got {by!r}; choose one of them")
    rundir.check_parents(index.path)
    sae, other = load_sae(rundir.parent(index.path, "sae")), load_sae(rundir.find(other_path, "sae"))
    if by == "direction":
        found = by_direction(sae, feature, other, n=n)
    else:
        store = ActivationStore.open(rundir.parent(index.path, "activations"))
        rows = store.rows("all")
        rows = rows[:: max(1, len(rows) * store.context // _USE_TOKENS)]
        model = model_of(sae, device=device)
        trained_on = other.metadata.model_sha256
        if trained_on is not None and trained_on != model.weights_sha256:
            raise ArtifactError(f"{other_path} was trained on another model than {index.path}; compare by direction")
        sae, other = sae.to(model.device), other.to(model.device)
        found = by_use(sae, feature, other, model, store.tokens(rows).int().numpy(), n=n)
    pairs = list(zip(found.features.tolist(), found.scores.tolist(), strict=True))
    return {"by": by, "chance": found.chance, "features": [[int(f), float(score)] for f, score in pairs]}


def write_map(index: FeatureIndex, file: Path, method: str | None) -> dict[str, Any]:
    """Write the map of the decoder directions, and return what it is worth."""
    import json as jsonlib

    from saelab import atomic, rundir
    from saelab.evals.report import Section, as_html
    from saelab.features.decoder_map import decoder_map, map_svg
    from saelab.sae.io import load_sae

    if file.suffix not in (".html", ".svg", ".json"):
        raise ConfigError(f"a map is written as .html, .svg or .json, got {file.name!r}; choose one of these endings")
    rundir.check_parents(index.path)
    sae = load_sae(rundir.parent(index.path, "sae"))
    found = decoder_map(sae.W_dec.detach().float().flatten(1).numpy(), method=method)
    worth = (
        f"{found.method.upper()}: of each feature's ten nearest in direction {found.kept:.1%} are among its ten "
        f"nearest on the map; {found.kept_at_random:.1%} where places are shuffled."
    )
    if file.suffix == ".json":
        places = {"method": found.method, "kept": found.kept, "kept_at_random": found.kept_at_random}
        content = jsonlib.dumps({**places, "places": found.places.round(4).tolist()})
    elif file.suffix == ".svg":
        content = map_svg(found, index).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    else:
        section = Section(f"Map of {index.path}", sentences=(worth, _COLOURS), pictures=(map_svg(found, index),))
        content = as_html([section], title=f"Map of {index.path}")
    atomic.write_bytes(file, content.encode())
    say(f"{worth} Written to {file}")
    return {"file": str(file), "method": found.method, "kept": found.kept, "kept_at_random": found.kept_at_random}


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


def _by_meaning(index: FeatureIndex, meaning: str, encoder: str, n: int, device: str | None) -> list[SearchHit]:
    from saelab.features.encoders import SentenceEncoder
    from saelab.features.search import search_by_meaning

    return search_by_meaning(index, SentenceEncoder(encoder, device=device), meaning, n=n)


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
