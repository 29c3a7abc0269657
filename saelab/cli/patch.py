"""saelab patch: which activations carry the difference between two prompts, or matter to one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from saelab.cli.console import AsJson, Device, Progress, emit, progress_bar, say, table
from saelab.cli.inputs import model_and_sae
from saelab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from saelab.interp.patch_agreement import Agreement
    from saelab.interp.patch_metrics import Metric
    from saelab.interp.patching import PatchGrid
    from saelab.models.load import Model
    from saelab.sae.base import SAE, Feature

METRICS = ("logit_difference", "probability", "log_probability", "kl")

#: Documents of a text source from which means are taken and resamples drawn.
_N_TEXTS = 32
#: Features that are chosen where none are named.
_N_FEATURES = 10


def patch(
    clean: Annotated[str, typer.Argument(help="Prompt that leads to the answer.")],
    corrupt: Annotated[
        str | None, typer.Argument(help="Prompt of as many tokens that leads elsewhere; left out with --ablate.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="What should follow the clean prompt: one token, with its space, ' Paris'.")
    ] = None,
    wrong: Annotated[str | None, typer.Option(help="What follows the corrupt prompt instead, one token.")] = None,
    metric: Annotated[
        str, typer.Option(help="logit_difference, probability, log_probability, or kl (from the clean prompt).")
    ] = "logit_difference",
    at: Annotated[
        str,
        typer.Option(help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, head, position or feature."),
    ] = "resid_post",
    method: Annotated[
        str,
        typer.Option(
            help="exact, or an approximation by gradients: attribution (one pass), ig (one pass of --steps rows a "
            "layer), ig_inputs (one pass of --steps rows)."
        ),
    ] = "exact",
    direction: Annotated[
        str | None,
        typer.Option(
            help="denoise (default: clean values into the corrupt run) or noise (corrupt values into the clean run)."
        ),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            help="Count only what reaches this receiver directly: logits, mlp.9, q.9.3, k.9.1, v.9.1; may be repeated."
        ),
    ] = None,
    ablate: Annotated[
        str | None, typer.Option(help="Instead of a corrupt prompt: zero, mean or resample, over --texts.")
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="mean, resample: a text file, folder or data set (default: the demo text).")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Layer to patch; repeat for several (default: all).")] = None,
    position: Annotated[
        list[int] | None, typer.Option(help="Token position to patch, from 1; repeat for several (default: all).")
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="feature: directory of an SAE, or its workspace.")] = None,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="feature: which; repeat for several (default: the ten of largest attribution)."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the integrated gradients.")] = 10,
    check: Annotated[
        bool, typer.Option("--check", help="Also patch exactly, and print how well the approximation agrees.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Heat map to write: .png, .svg or .html, with a .json beside it, or .json alone."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name, directory or hub name (default: demo, or the model of the SAE).")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the model; bfloat16 rounds logits more than most cells move them.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Replace activations of one prompt's run by those of another, or by none, and see what becomes of the answer."""
    if (corrupt is None) == (ablate is None):
        raise ConfigError("patch needs a corrupt prompt or --ablate, and not both; give one of them")
    if ablate is not None and (direction is not None or to):
        raise ConfigError("--direction and --to are for two prompts; leave them out with --ablate")
    if texts is not None and ablate not in ("mean", "resample"):
        raise ConfigError("--texts are what --ablate mean and --ablate resample take values from; leave them out")
    if (at == "feature") != (sae is not None) or (feature and sae is None):
        raise ConfigError("--sae and --feature go with --at feature, which needs --sae; add or leave out")
    if check and (method == "exact" or to):
        raise ConfigError(
            "--check compares an approximation with exact patching; give it with --method ig, for example"
        )
    if to and method != "exact":
        raise ConfigError(f"--to is patched exactly, not by {method}; leave out --method")
    if out is not None:
        from saelab.interp.picture_page import check_suffix

        check_suffix(out)
    request = _Request(
        clean=clean,
        corrupt=corrupt,
        answer=answer,
        wrong=wrong,
        metric=metric,
        at=at,
        method=method,
        direction=direction or "denoise",
        to=tuple(to or ()),
        ablate=ablate,
        texts=texts,
        layers=tuple(layer) if layer else None,
        positions=tuple(position) if position else None,
        sae=sae,
        features=tuple(feature or ()),
        steps=steps,
        seed=seed,
        check=check,
    )
    found = _carried_out(request, model=model, dtype=dtype, device=device)
    _report(found, out=out, json=json)


class _Request(NamedTuple):
    """What was asked for, checked to go together."""

    clean: str
    corrupt: str | None
    answer: str | None
    wrong: str | None
    metric: str
    at: str
    method: str
    direction: str
    to: tuple[str, ...]
    ablate: str | None
    texts: str | None
    layers: tuple[int, ...] | None
    positions: tuple[int, ...] | None
    sae: Path | None
    features: tuple[int, ...]
    steps: int
    seed: int
    check: bool


class _Found(NamedTuple):
    grid: PatchGrid
    agreement: Agreement | None


def _carried_out(request: _Request, *, model: str | None, dtype: str, device: str | None) -> _Found:
    from saelab.interp.patch_agreement import agreement
    from saelab.interp.patch_sites import Granularity, check_word
    from saelab.interp.patching import Direction, Method
    from saelab.interp.replacements import Ablation

    check_word(request.at, Granularity, "--at")
    check_word(request.method, Method, "--method")
    check_word(request.direction, Direction, "--direction")
    if request.ablate is not None:
        check_word(request.ablate, Ablation, "--ablate")
    loaded, sae = model_and_sae(model, request.sae, device=device, dtype=dtype)
    metric = metric_of(request.metric, loaded, request.clean, answer=request.answer, wrong=request.wrong)
    features = () if sae is None else _features(request, loaded, sae, metric)
    with progress_bar("patch") as progress:
        grid = _grid(request, loaded, metric, features, method=request.method, progress=progress)
    if not request.check:
        return _Found(grid, None)
    with progress_bar("check") as progress:
        exact = _grid(request, loaded, metric, features, method="exact", progress=progress)
    return _Found(grid, agreement([exact], [grid]))


def _grid(
    request: _Request, model: Model, metric: Metric, features: Iterable[Feature], *, method: str, progress: Progress
) -> PatchGrid:
    from saelab.interp.patching import ablate, patch
    from saelab.interp.path_patching import path_patch

    how: dict[str, Any] = {"method": method, "steps": request.steps}
    where: dict[str, Any] = {
        "metric": metric,
        "at": request.at,
        "layers": request.layers,
        "positions": request.positions,
        "features": tuple(features),
        "progress": progress,
    }
    if request.corrupt is None:
        by: Any = request.ablate
        texts = () if by == "zero" else _texts(request.texts or "demo")
        return ablate(model, request.clean, by=by, texts=texts, seed=request.seed, **how, **where)
    between: dict[str, Any] = {"direction": request.direction, **where}
    if request.to:
        return path_patch(model, request.clean, request.corrupt, to=request.to, **between)
    return patch(model, request.clean, request.corrupt, **how, **between)


def metric_of(name: str, model: Model, clean: str, *, answer: str | None, wrong: str | None) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: there is none, or it takes other answers.
        TextError: an answer is not one token.
    """
    from saelab.interp import patch_metrics

    if name not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {name!r}; {nearest(name, METRICS)}")
    needs = {"logit_difference": (True, True), "kl": (False, False)}.get(name, (True, False))
    if (answer is not None, wrong is not None) != needs:
        wanted = {
            (True, True): "--answer and --wrong",
            (True, False): "--answer",
            (False, False): "neither --answer nor --wrong",
        }[needs]
        raise ConfigError(f"the metric {name} takes {wanted}; add or leave out --answer and --wrong")
    if answer is None:
        return patch_metrics.divergence_from(model.logits(model.to_tokens(clean).ids))
    right = patch_metrics.one_token(model, answer)
    if wrong is not None:
        return patch_metrics.logit_difference(right, patch_metrics.one_token(model, wrong))
    return patch_metrics.probability(right) if name == "probability" else patch_metrics.log_probability(right)


def _features(request: _Request, model: Model, sae: SAE, metric: Metric) -> list[Feature]:
    """The features that were named, or those to which most of the metric is attributed."""
    if request.features:
        return [sae.feature(i) for i in request.features]
    from saelab.interp.attribution import attribute

    found = attribute(model, sae, request.clean, metric, corrupt=request.corrupt)
    ranked = dict.fromkeys(part.feature for part in found.top(20 * _N_FEATURES, errors=False))
    chosen = [sae.feature(i) for i in islice((i for i in ranked if i is not None), _N_FEATURES)]
    if not chosen:
        raise ConfigError("no feature of the SAE differs between the two; name some with --feature")
    return chosen


def _texts(source: str) -> tuple[str, ...]:
    from saelab.activations.text import TextConfig, open_text

    return tuple(document.text for document in islice(open_text(TextConfig(source=source)), _N_TEXTS))


def _report(found: _Found, *, out: Path | None, json: bool) -> None:
    from saelab.interp.patch_plot import as_json, sentences, write_grid

    files = [] if out is None else write_grid(found.grid, out)
    check = found.agreement
    if json:
        agreed = check and {"pearson": check.by_pair[0], "slope": check.slope, "n_cells": check.n_cells}
        emit({**as_json(found.grid), "agreement": agreed, "files": [str(file) for file in files]})
        return
    for sentence in sentences(found.grid):
        print(sentence)
    print(as_table(found.grid))
    if check is not None:
        print(
            f"{found.grid.method} against exact patching over {check.n_cells} cells: Pearson {check.by_pair[0]:.3f}, "
            f"slope {check.slope:.2f}"
        )
    if files:
        say(f"written to {' and '.join(map(str, files))}")


def as_table(grid: PatchGrid, n: int = 12) -> str:
    """The cells of largest effect."""
    n_columns = len(grid.columns)
    shares = grid.shares.flatten() if grid.has_shares else None
    effects = grid.effects.flatten()
    order = effects.abs().argsort(descending=True, stable=True)[:n].tolist()
    rows = [
        [
            grid.rows[i // n_columns],
            grid.columns[i % n_columns],
            f"{float(effects[i]):+.3f}",
            *([] if shares is None else [f"{float(shares[i]):+.2f}"]),
        ]
        for i in order
    ]
    header = ["row", "column", "effect", *([] if shares is None else ["share"])]
    return table(rows, header=header) + f"\n{len(rows)} of {effects.numel()} cells, those of largest effect"
