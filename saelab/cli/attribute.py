"""saelab attribute: which features of an SAE, at which tokens, move an answer; and how much of it they recover."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saelab.cli.console import AsJson, Device, emit, progress_bar, say, table
from saelab.cli.inputs import model_of
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.interp.attribution import Attribution
    from saelab.interp.attribution_graph import AttributionGraph
    from saelab.interp.faithfulness import CurvePoint, Curves
    from saelab.interp.patch_metrics import Metric
    from saelab.interp.picture_page import Page
    from saelab.models.load import Model
    from saelab.sae.base import SAE


def attribute(
    runs: Annotated[
        list[Path], typer.Argument(help="Directory of an SAE, or its workspace; several of one model make a graph.")
    ],
    text: Annotated[str | None, typer.Option(help="Text that the answer follows.")] = None,
    answer: Annotated[str | None, typer.Option(help="What should follow: one token, with its space, ' Paris'.")] = None,
    wrong: Annotated[
        str | None,
        typer.Option(help="Another token: the metric is then the logit difference, else the answer's log-probability."),
    ] = None,
    corrupt: Annotated[
        str | None,
        typer.Option(help="Baseline: a text of as many tokens with another answer (default: no features, no error)."),
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="Baseline: the mean over the tokens of this text; repeat for several.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a text: a JSONL file of clean, corrupt, answer and wrong; the share of the effect that "
            "the top features recover over all of them, beside random and largest ones."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Features to show; of several SAEs the nodes of each.")] = 12,
    edges: Annotated[int, typer.Option(min=1, help="Edges of a graph to show.")] = 60,
    steps: Annotated[int, typer.Option(min=1, help="Steps from the baseline to the text.")] = 16,
    draws: Annotated[int, typer.Option(min=1, help="pairs: draws of random features.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="Picture to write: .html, .svg or (one SAE, one text) .png, beside a .json; or .json alone."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the model; bfloat16 rounds logits more than most features move them.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the random features.")] = 0,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Divide up an answer's logit difference or log-probability among the features at each token.

    With several SAEs: a graph of how the features of one layer make those of the next. With --pairs: how much of the
    effect the top features recover, put into the corrupt text's run and taken out of the clean one's.
    """
    from saelab.interp.picture_page import check_suffix, write_page

    if (text is None) == (pairs is None):
        raise ConfigError("attribute needs --text with --answer, or --pairs, and not both; give one of them")
    if text is not None and answer is None:
        raise ConfigError("--text needs --answer, the token that should follow it, with its space; add it")
    if pairs is not None and (answer or wrong or corrupt or reference or len(runs) > 1):
        raise ConfigError(
            "--pairs bring texts, answers and baselines with them and go with one SAE; leave out the rest"
        )
    if out is not None:
        check_suffix(out)
        if out.suffix == ".png" and (pairs is not None or len(runs) > 1):
            raise ConfigError(f"{out} would be a PNG, but graphs and curves are drawn as .svg or .html; end it in one")
    saes, model = _opened(runs, device=device, dtype=dtype)
    if pairs is not None:
        page, lines = _curves(model, saes[0], pairs, steps=steps, draws=draws, seed=seed)
    else:
        assert text is not None
        assert answer is not None
        metric, name = _metric(model, answer=answer, wrong=wrong)
        page, lines = _one_text(
            model,
            saes,
            text,
            metric,
            name=name,
            corrupt=corrupt,
            reference=reference,
            top=top,
            edges=edges,
            steps=steps,
        )
    files = [] if out is None else write_page(page, out)
    if json:
        emit({**page.numbers, "files": [str(file) for file in files]})
        return
    print("\n".join([*page.sentences, *lines]))
    if files:
        say(f"written to {' and '.join(map(str, files))}")


def _opened(runs: list[Path], *, device: str | None, dtype: str) -> tuple[list[SAE], Model]:
    """The SAEs and the model that all of them were trained on.

    Raises:
        ConfigError: they were trained on different models.
    """
    from saelab.sae.io import load_sae

    saes = [load_sae(run) for run in runs]
    names = {(sae.metadata.model_name, sae.metadata.model_sha256) for sae in saes}
    if len(names) > 1:
        raise ConfigError(
            f"the SAEs were trained on different models ({', '.join(sorted(name for name, _ in names))}); a graph is "
            "drawn in one"
        )
    model = model_of(saes[0], device=device, dtype=dtype)
    return [sae.to(model.device) for sae in saes], model


def _metric(model: Model, *, answer: str, wrong: str | None) -> tuple[Metric, str]:
    from saelab.interp.patch_metrics import log_probability, logit_difference, one_token

    right = one_token(model, answer)
    if wrong is None:
        return log_probability(right), f"log-probability of {answer!r}"
    return logit_difference(right, one_token(model, wrong)), f"logit difference of {answer!r} and {wrong!r}"


def _one_text(
    model: Model,
    saes: list[SAE],
    text: str,
    metric: Metric,
    *,
    name: str,
    corrupt: str | None,
    reference: list[str] | None,
    top: int,
    edges: int,
    steps: int,
) -> tuple[Page, list[str]]:
    from saelab.interp.attribution import attribute as attributed
    from saelab.interp.attribution_graph import attribution_graph
    from saelab.interp.attribution_plot import attribution_page, graph_page

    texts = reference or None
    if len(saes) == 1:
        found = attributed(model, saes[0], text, metric, corrupt=corrupt, reference=texts, steps=steps)
        return attribution_page(found, metric=name, n=top), [as_table(found, top)]
    with progress_bar("attribute") as progress:
        graph = attribution_graph(
            model,
            saes,
            text,
            metric,
            corrupt=corrupt,
            reference=texts,
            n_nodes=top,
            n_edges=edges,
            steps=steps,
            progress=progress,
        )
    return graph_page(graph, metric=name), [as_edges(graph)]


def _curves(model: Model, sae: SAE, path: Path, *, steps: int, draws: int, seed: int) -> tuple[Page, list[str]]:
    from saelab.interp.attribution_plot import curves_page
    from saelab.interp.faithfulness import curves
    from saelab.interp.traced_pairs import read_pairs, recoveries

    pairs = read_pairs(path)
    with progress_bar("attribute") as progress:
        found = recoveries(model, sae, pairs, draws=draws, steps=steps, seed=seed, progress=progress)
    shown = curves(found)
    return curves_page(shown, metric="logit difference"), [as_curves(shown)]


def as_table(found: Attribution, n: int) -> str:
    """The parts of largest attribution."""
    rows = [
        [
            f"{part.position}: {found.tokens[part.position]}",
            "error" if part.feature is None else str(part.feature),
            f"{part.act:.2f}",
            f"{part.baseline_act:.2f}",
            f"{part.attribution:+.3f}",
        ]
        for part in found.top(n)
    ]
    return (
        table(rows, header=["token", "feature", "activation", "in the baseline", "attribution"])
        + f"\neffect {found.effect:+.3f}, of which the error's share is {float(found.error.sum()):+.3f}"
    )


def as_edges(graph: AttributionGraph, n: int = 30) -> str:
    """The strongest edges, source and target as hook:token:feature."""
    rows = [[edge.source, edge.target, f"{edge.weight:+.3f}"] for edge in graph.edges[:n]]
    return table(rows, header=["from", "to", "weight"]) + f"\n{len(rows)} of {len(graph.edges)} edges"


def as_curves(shown: Curves) -> str:
    parts = []
    for title, points in (
        ("share recovered when put into the baseline", shown.faithfulness),
        ("share lost when taken out of the text", shown.completeness),
    ):
        parts.append(f"\n{title}\n" + table([_row(point) for point in points], header=_HEADER))
    return "\n".join(parts)


_HEADER = ["features", "attribution", "random", "largest", "over random", "over largest"]


def _row(point: CurvePoint) -> list[str]:
    intervals = (point.attribution, point.random, point.largest, point.over_random, point.over_largest)
    return [str(point.n_features), *(f"{i.value:.2f} ({i.low:.2f} to {i.high:.2f})" for i in intervals)]
