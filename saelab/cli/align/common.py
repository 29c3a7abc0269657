"""What the verbs of saelab align share: options, and carrying out a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import emit, progress_bar, say, speaks, table

if TYPE_CHECKING:
    from saelab.align.recipes import Recipe
    from saelab.align.run import Outcome
    from saelab.rundir import StageWriter

Data = Annotated[str | None, typer.Argument(help="Records to train on: .jsonl, .json, .parquet, or hf://owner/name.")]
Model = Annotated[str | None, typer.Option(help="Hub name, directory, 'demo', or an earlier alignment run.")]
HeldOut = Annotated[str | None, typer.Option(help="Records only to measure on; by default a share of the prompts.")]
Steps = Annotated[int | None, typer.Option(help="Updates of the weights.")]
BatchSize = Annotated[int | None, typer.Option(help="Records in a step.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Rank = Annotated[int | None, typer.Option(help="Rank of the LoRA adapter; 0 trains all weights.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the adapter, the order and the sampling.")]
Out = Annotated[Path | None, typer.Option(help="Directory to write.")]


def flags_of(
    *,
    data: str | None,
    held_out: str | None,
    model: str | None,
    steps: int | None,
    batch_size: int | None,
    lr: float | None,
    rank: int | None,
    seed: int | None,
    **more: Any,
) -> dict[str, Any]:
    """The flags under the names of the settings that they change."""
    return {
        "data__train": data,
        "data__held_out": held_out,
        "policy__model": model,
        "policy__lora__rank": rank or None,
        "policy__lora__seed": seed if rank != 0 else None,
        "training__steps": steps,
        "training__batch_size": batch_size,
        "training__optim__lr": lr,
        "training__seed": seed,
        **more,
    }


def carry_out(
    method: str,
    flags: dict[str, Any],
    *,
    rank: int | None,
    config: Path | None,
    overrides: list[str] | None,
    print_config: bool,
    out: Path | None,
    device: str | None,
    json: bool,
) -> None:
    """Read the settings, train (with all processes that torchrun started), and show what was measured."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.align.run import METHODS
    from saelab.errors import ConfigError

    mapping = configs.merge(config, overrides or (), **flags)
    if rank == 0:
        mapping.setdefault("policy", {})["lora"] = None
    recipe: Recipe = configs.from_mapping(METHODS[method], mapping)
    if print_config:
        print(configs.to_toml(recipe), end="")
        return
    if out is None:
        raise ConfigError(f"align {method} needs a directory to write to; give --out, for example --out runs/{method}")
    place = out

    def begin() -> StageWriter:
        rundir.refuse_taken(place)
        return rundir.StageWriter.create(
            place, stage="model", config={"method": method, **configs.to_mapping(recipe)}, parents=_parents(recipe)
        )

    run_recipe(recipe, place, begin, device=device, json=json)


def run_recipe(recipe: Recipe, path: Path, begin: Callable[[], StageWriter], *, device: str | None, json: bool) -> None:
    """Train in ``path``, which the first process opens by ``begin``, then print the table of held-out measures."""
    from saelab import dist, rundir
    from saelab.align.run import SHARED, align, method_of

    if method_of(recipe) not in SHARED:
        dist.refuse_several(f"align {method_of(recipe)}")
    with dist.joined() as mesh:
        run = dist.on_first(mesh, begin) or rundir.StageWriter(path, "model")
        with progress_bar("align") as progress:
            outcome = align(recipe, run, device=device, mesh=mesh, say=say, progress=progress)
        if json:
            emit({"path": str(path), "before": outcome.before, "after": outcome.after})
        elif speaks():
            print(as_table(outcome))
        say(f"model in {path}; next: saelab cache --model {path}, or saelab align with --model {path}")


def as_table(outcome: Outcome) -> str:
    """Held-out measures before and after, with their 95 % intervals."""
    rows = [[name, _cell(outcome.before.get(name)), _cell(value)] for name, value in outcome.after.items()]
    return table(rows, header=["held out", "before", "after"])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _parents(recipe: Recipe) -> dict[str, Path]:
    """Earlier runs that this one builds on; a model from elsewhere is named in the settings alone."""
    from saelab.align.run import base_of

    parents = {}
    for name, path in (("model", base_of(recipe)), ("reward", getattr(recipe, "reward", ""))):
        if (Path(path) / "model.json").exists():
            parents[name] = Path(path)
    return parents
