"""saelab eval: how good is an SAE on text it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import AsJson, ConfigFile, Device, Overrides, emit, progress_bar, say, table
from saelab.cli.inputs import opened

if TYPE_CHECKING:
    from saelab.evals.reconstruction import EvalConfig


def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of an SAE, or its workspace.")],
    activations: Annotated[
        Path | None, typer.Option(help="Activations whose held-out text to use; by default those it was trained on.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens to evaluate on.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; by default eval/ beside the SAE. An older one is replaced.")
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    json: AsJson = False,
) -> None:
    """Measure an SAE on held-out text, with intervals.

    Reconstruction, sparsity, dead features, and what the model predicts with the SAE spliced in.
    """
    from saelab import config as configs
    from saelab.evals.reconstruction import EvalConfig

    settings = configs.load(EvalConfig, config, set_ or (), tokens=tokens)
    result = run_evaluation(run, settings, activations=activations, out=out, device=device)
    if json:
        emit(result)
    else:
        print(as_table(result))


def run_evaluation(
    run: Path,
    settings: EvalConfig,
    *,
    activations: Path | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Evaluate, publish eval.json, and return its content."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.evals.reconstruction import evaluate, report

    sae_path = rundir.find(run, "sae")
    out = out or sae_path.parent / "eval"
    rundir.check_replaceable(out, "eval")
    sae, store, model = opened(sae_path, activations=activations, device=device)
    with progress_bar("eval") as progress:
        evaluation = evaluate(sae, store, model, settings, progress=progress)
    result = report(evaluation)
    parents = {"sae": sae_path, "activations": store.path}
    rundir.replace_result(out, result, stage="eval", config=configs.to_mapping(settings), parents=parents)
    say(f"written to {out}")
    return result


def as_table(result: dict[str, Any]) -> str:
    """The metrics with their intervals, and what they were measured on."""
    from saelab.metrics import METRICS

    names = [name for name in METRICS if name in result["metrics"]]
    rows = [
        [name, *(f"{result['metrics'][name][part]:.4f}" for part in ("value", "low", "high")), METRICS[name].unit]
        for name in names
    ]
    return (
        table(rows, header=["metric", "value", "95% low", "high", "unit"])
        + f"\n{result['n_tokens']:,} held-out tokens in {result['n_sequences']} sequences, "
        f"{result['n_outliers']} of outlying norm"
    )
