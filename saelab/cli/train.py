"""saelab train: activations to a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import (
    AsJson,
    ConfigFile,
    Device,
    Overrides,
    PrintConfig,
    emit,
    human_bytes,
    need_memory,
    progress_bar,
    say,
)
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.train.config import TrainConfig


def train(
    activations: Annotated[
        Path | None, typer.Argument(help="Directory that saelab cache wrote, or its workspace.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="topk, batchtopk or relu.")] = None,
    k: Annotated[int | None, typer.Option(help="Features kept for each token (topk, batchtopk).")] = None,
    d_sae: Annotated[int | None, typer.Option("--d-sae", help="Number of features.")] = None,
    expansion: Annotated[
        float | None, typer.Option(help="Number of features as a multiple of the activations' width.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens, counted with repetition.")] = None,
    hook: Annotated[str | None, typer.Option(help="Hook point, where the activations hold several.")] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Run the model during training instead of reading activations; with --model, --text, --hook."
        ),
    ] = False,
    model: Annotated[str | None, typer.Option(help="With --live: hub name, local directory, or 'demo'.")] = None,
    text: Annotated[str | None, typer.Option(help="With --live: data set name, file or folder, or 'demo'.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; by default sae/ beside the activations.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted training in this directory.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initial weights and token order.")] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Train a sparse autoencoder on cached activations.

    The directory it writes opens in SAELens as it is.
    """
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.store import ActivationStore
    from saelab.train.config import TrainConfig

    flags: dict[str, Any] = {
        "sae__arch": arch,
        "sae__k": k,
        "sae__d_sae": d_sae,
        "tokens": tokens,
        "hook_name": hook,
        "seed": seed,
        "live__model": model,
        "live__text__source": text,
    }
    if resume is not None:
        other = (set_, config, activations, expansion, live, out)
        if any(other) or any(value is not None for value in flags.values()):
            raise ConfigError(f"--resume takes its settings from {resume}/run.json; leave out the other settings")
        settings = configs.from_mapping(TrainConfig, rundir.read_run(resume, "sae")["config"])
        if (resume / "DONE").exists():
            raise ConfigError(
                f"{resume} is finished, there is nothing to resume; to train longer start anew with more --tokens"
            )
        store = None if settings.live else ActivationStore.open(rundir.parent(resume, "activations"))
        run_training(settings, store, resume, resume=True, device=device)
        out = resume
    else:
        if not live and (model or text):
            raise ConfigError("--model and --text belong to --live; cached activations already know theirs")
        if live:
            flags["live__hook_names"] = [hook] if hook else None
        mapping = configs.merge(config, set_ or (), **flags)
        if live:
            mapping.setdefault("live", {})
        if activations and mapping.get("live") is not None:
            raise ConfigError(f"activations in {activations} and live capture were both given; choose one of them")
        store = ActivationStore.open(rundir.find(activations, "activations")) if activations else None
        settings = with_defaults(mapping, store, expansion)
        if print_config:
            print(configs.to_toml(settings), end="")
            return
        if store is None and settings.live is None:
            raise ConfigError(
                "train needs activations; make some with saelab cache, then: saelab train runs/mine (or use --live)"
            )
        if out is None and store is None:
            raise ConfigError("--live needs a directory to write to; give --out, for example --out runs/mine/sae")
        out = out or store.path.parent / "sae"  # type: ignore[union-attr]
        rundir.refuse_taken(out)
        run_training(settings, store, out, resume=False, device=device)
    say(f"trained SAE in {out}; next: saelab eval {out.parent}, saelab index {out.parent}")
    if json:
        emit({"path": str(out), **rundir.read_metrics(out)[-1]})


def with_defaults(mapping: dict[str, Any], store: ActivationStore | None, expansion: float | None) -> TrainConfig:
    """The settings, with an architecture and a width where none was given: topk, eight times the width of the input."""
    from saelab import config as configs
    from saelab.train.config import TrainConfig

    sae = mapping.setdefault("sae", {})
    if not isinstance(sae, dict):
        raise ConfigError(f"sae must be a table of settings, got {sae!r}; write for example --set sae.arch=topk")
    if expansion is not None and "d_sae" in sae:
        raise ConfigError(f"--expansion and d_sae={sae['d_sae']} both set the width; give one of them")
    if expansion is not None and not 0 < expansion < float("inf"):
        raise ConfigError(f"--expansion must be a positive number, got {expansion}; 8 is usual")
    sae.setdefault("arch", "topk")
    if "d_sae" not in sae:
        if store is None:
            raise ConfigError("the number of features is not known without activations; give --d-sae")
        sae["d_sae"] = round(
            (8 if expansion is None else expansion) * store.d_in(the_hook(store.hook_names, mapping.get("hook_name")))
        )
    return configs.from_mapping(TrainConfig, mapping)


def the_hook(hook_names: Sequence[str], name: str | None) -> str:
    """The hook to train on: the one asked for, or the only one there is."""
    if name is None and len(hook_names) > 1:
        raise ConfigError(f"the activations are those of {', '.join(hook_names)}; choose one with --hook")
    if name is not None and name not in hook_names:
        raise ConfigError(
            f"the activations are not those of {name}, but of {', '.join(hook_names)}; choose one of these"
        )
    return name or hook_names[0]


def run_training(
    settings: TrainConfig, store: ActivationStore | None, out: Path, *, resume: bool, device: str | None = None
) -> None:
    """Open the activations (or the model that makes them), print the plan, train under a progress bar."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.loader import Batches, LiveBatches
    from saelab.models.load import checked_device, load_model
    from saelab.train.loop import memory_bytes, train_sae
    from saelab.train.provenance import of_live_capture, of_store

    device = checked_device(device)
    shared = {"batch_size": settings.batch_size, "seed": settings.seed, "outlier_factor": settings.outlier_factor}
    if settings.live is not None:
        hook_name = the_hook(settings.live.hook_names, settings.hook_name)
        model = load_model(settings.live.model, device=device)
        batches: Batches | LiveBatches = LiveBatches(model, settings.live, hook_name, **shared)  # type: ignore[arg-type]
        metadata, parents, source = (
            of_live_capture(settings.live, model, hook_name),
            {},
            "the model runs during training",
        )
    else:
        assert store is not None
        hook_name = the_hook(store.hook_names, settings.hook_name)
        store.verify()
        batches = Batches(store, hook_name, **shared)  # type: ignore[arg-type]
        metadata, parents = of_store(store, hook_name), {"activations": store.path}
        n_passes = settings.tokens / batches.n_tokens
        source = (
            f"{n_passes:.1f} passes over {batches.n_tokens:,} training tokens, {batches.n_outliers} outliers left out"
        )
    n_bytes = memory_bytes(settings, batches.d_in)
    if device == "cpu":
        need_memory(n_bytes)
    if resume:
        run = rundir.StageWriter.resume(out, stage="sae")
    else:
        run = rundir.StageWriter.create(out, stage="sae", config=configs.to_mapping(settings), parents=parents)
    say(
        f"plan: {settings.sae.arch} with {settings.sae.d_sae:,} features on {hook_name} ({device}); "
        f"{settings.n_steps:,} steps of {settings.batch_size} tokens ({source}); "
        f"{human_bytes(n_bytes)} of memory"
    )
    with progress_bar("train") as progress:
        train_sae(settings, batches, run, metadata=metadata, device=device, progress=progress)
