"""saelab train: activations to a sparse autoencoder."""

from __future__ import annotations

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
    from saelab.activations.moments import ActivationStats
    from saelab.activations.store import ActivationStore
    from saelab.dist import Mesh
    from saelab.train.config import TrainConfig
    from saelab.train.end_to_end import OutputLoss
    from saelab.train.sources import StoreBatches


def train(
    activations: Annotated[
        Path | None, typer.Argument(help="Directory that saelab cache wrote, or its workspace.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="topk, batchtopk, relu, ...; an unknown one lists all.")] = None,
    k: Annotated[int | None, typer.Option(help="Features kept for each token (topk, batchtopk, ...).")] = None,
    d_sae: Annotated[int | None, typer.Option("--d-sae", help="Number of features.")] = None,
    expansion: Annotated[
        float | None, typer.Option(help="Number of features as a multiple of the activations' width.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens, counted with repetition.")] = None,
    hook: Annotated[
        list[str] | None,
        typer.Option(
            help="Hook point, where the activations hold several; twice for a transcoder (input, then target), "
            "once for each layer of a crosscoder."
        ),
    ] = None,
    with_: Annotated[
        Path | None, typer.Option("--with", metavar="STORE", help="A second model's activations, for a crosscoder.")
    ] = None,
    minus: Annotated[
        Path | None, typer.Option("--minus", metavar="STORE", help="Activations to subtract, for a difference SAE.")
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Train many SAEs in one pass: settings, and [[grid]] blocks of what varies."),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Run the model during training instead of reading activations; with --model, --text, --hook."
        ),
    ] = False,
    model: Annotated[str | None, typer.Option(help="With --live: hub name, local directory, or 'demo'.")] = None,
    text: Annotated[str | None, typer.Option(help="With --live: data set name, file or folder, or 'demo'.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; by default sae/ (or sweep/) beside the activations.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted training in this directory.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initial weights and token order.")] = None,
    feature_shards: Annotated[
        int,
        typer.Option(
            "--feature-shards",
            help="Under torchrun: processes over which to spread the features; the rest share tokens.",
        ),
    ] = 1,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Train a sparse autoencoder on cached activations, or many at once.

    The directory it writes opens in SAELens as it is.
    """
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.store import ActivationStore

    flags: dict[str, Any] = {
        "sae__arch": arch,
        "sae__k": k,
        "sae__d_sae": d_sae,
        "tokens": tokens,
        "hook_name": hook[0] if hook else None,
        "more_hooks": hook[1:] or None if hook else None,
        "second_store": "stacked" if with_ else "subtracted" if minus else None,
        "seed": seed,
        "live__model": model,
        "live__text__source": text,
    }
    if with_ and minus:
        raise ConfigError("--with and --minus each say what the second store is for; give one of them")
    if resume is not None:
        if any((activations, expansion, live, out, sweep, with_, minus, print_config)):
            raise ConfigError(f"--resume takes its settings from {resume}/run.json; leave out the other settings")
        asked = configs.merge(config, set_ or (), **flags)
        _resume(resume, asked, device=device, feature_shards=feature_shards, json=json)
        return
    if not live and (model or text):
        raise ConfigError("--model and --text belong to --live; cached activations already know theirs")
    store = ActivationStore.open(rundir.find(activations, "activations")) if activations else None
    other = with_ or minus
    second = ActivationStore.open(rundir.find(other, "activations")) if other else None
    if sweep is not None:
        from saelab.cli.sweep import start_sweep

        start_sweep(
            sweep,
            configs.merge(None, set_ or (), **flags),
            store,
            second,
            out,
            expansion=expansion,
            refused=bool(config or live or print_config),
            device=device,
            json=json,
        )
        return
    if live:
        flags["live__hook_names"] = hook
    mapping = configs.merge(config, set_ or (), **flags)
    if live:
        mapping.setdefault("live", {})
    if activations and mapping.get("live") is not None:
        raise ConfigError(f"activations in {activations} and live capture were both given; choose one of them")
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
    run_training(settings, store, out, resume=False, device=device, second=second, feature_shards=feature_shards)
    _report_one(out, json=json)


def _resume(path: Path, asked: dict[str, Any], *, device: str | None, feature_shards: int, json: bool) -> None:
    """Continue what was begun in ``path``, unless ``asked`` names other settings than it was begun with."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.store import ActivationStore
    from saelab.train.config import TrainConfig
    from saelab.train.loop import check_asked

    run = rundir.read_run(path)
    if run["stage"] != "sweep":
        run = rundir.read_run(path, "sae")
    check_asked(path, began=run["config"], asked=asked)
    if (path / "DONE").exists():
        raise ConfigError(
            f"{path} is finished, there is nothing to resume; to train longer start anew with more --tokens"
        )
    second = ActivationStore.open(rundir.parent(path, "second")) if "second" in rundir.parents(path) else None
    if run["stage"] == "sweep":
        from saelab.cli.sweep import run_sweep

        store = ActivationStore.open(rundir.parent(path, "activations"))
        run_sweep(None, store, path, device=device, second=second, json=json)
        return
    settings = configs.from_mapping(TrainConfig, run["config"])
    one = None if settings.live else ActivationStore.open(rundir.parent(path, "activations"))
    run_training(settings, one, path, resume=True, device=device, second=second, feature_shards=feature_shards)
    _report_one(path, json=json)


def _report_one(out: Path, *, json: bool) -> None:
    from saelab import rundir

    say(f"trained SAE in {out}; next: saelab eval {out.parent}, saelab index {out.parent}")
    if json:
        emit({"path": str(out), **rundir.read_metrics(out)[-1]})


def with_defaults(mapping: dict[str, Any], store: ActivationStore | None, expansion: float | None) -> TrainConfig:
    """The settings, with an architecture and a width where none was given: topk, eight times the width of the input."""
    from saelab import config as configs
    from saelab.train.config import TrainConfig
    from saelab.train.sources import the_hook

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


def run_training(
    settings: TrainConfig,
    store: ActivationStore | None,
    out: Path,
    *,
    resume: bool,
    device: str | None = None,
    second: ActivationStore | None = None,
    feature_shards: int = 1,
) -> None:
    """Train, together with the other processes where torchrun has started several."""
    from saelab import dist

    with dist.joined(feature_shards=feature_shards) as mesh:
        _train_in(mesh, settings, store, out, resume=resume, device=device, second=second)


def _train_in(
    mesh: Mesh,
    settings: TrainConfig,
    store: ActivationStore | None,
    out: Path,
    *,
    resume: bool,
    device: str | None,
    second: ActivationStore | None,
) -> None:
    """Open the activations (or the model that makes them), print the plan, train under a progress bar."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.loader import LiveBatches
    from saelab.models.load import checked_device, load_model
    from saelab.train.loop import train_sae
    from saelab.train.parallel import check_divisible, portion, stage_of
    from saelab.train.plan import memory_bytes
    from saelab.train.provenance import of_live_capture
    from saelab.train.sharded import layout_of
    from saelab.train.sources import batches_of, metadata_of, the_hook

    layout = layout_of(mesh, settings.sae)
    check_divisible(settings.batch_size, mesh)
    device = checked_device(device)
    if settings.live is not None:
        hook_name = the_hook(settings.live.hook_names, settings.hook_name)
        if settings.more_hooks or second:
            raise ConfigError("--live reads one hook of one model; cache the activations to train on several")
        model = load_model(settings.live.model, device=device)
        shared = {"batch_size": settings.batch_size, "seed": settings.seed, "outlier_factor": settings.outlier_factor}
        batches: StoreBatches | LiveBatches = LiveBatches(
            model,
            settings.live,
            hook_name,
            n_steps=settings.n_steps,
            **shared,  # type: ignore[arg-type]
        )
        metadata, parents = of_live_capture(settings.live, model, hook_name), {}
        source = "the model runs during training"
    else:
        assert store is not None
        parents = verified(store, second)
        batches, metadata = batches_of(settings, store, second), metadata_of(settings, store, second)
        source = source_of(batches, settings.tokens)
    output_loss = _output_loss(settings, store, metadata.hook_name, batches, device=device)
    n_bytes = memory_bytes(settings, batches.d_in) // mesh.features.size
    if device == "cpu":
        need_memory(n_bytes)

    def begun() -> rundir.StageWriter:
        if resume:
            return rundir.StageWriter.resume(out, stage="sae")
        return rundir.StageWriter.create(out, stage="sae", config=configs.to_mapping(settings), parents=parents)

    with stage_of(mesh, out, begun) as run:
        say(
            f"plan: {settings.sae.arch} with {settings.sae.d_sae:,} features on {metadata.hook_name} ({device}, "
            f"{mesh.in_words}); {settings.n_steps:,} steps of {settings.batch_size} tokens ({source}, "
            f"gamma {gamma_of(batches.statistics(settings.stats_tokens)):.2f}); {human_bytes(n_bytes)} of memory"
        )
        with progress_bar("train") as progress:
            mine = portion(batches, mesh.data)
            try:
                train_sae(
                    settings, mine, run, metadata=metadata, device=device, progress=progress, layout=layout,
                    output_loss=output_loss,
                )  # fmt: skip
            finally:
                if isinstance(batches, LiveBatches):
                    batches.close()


def _output_loss(
    settings: TrainConfig, store: ActivationStore | None, hook_name: str, batches: object, *, device: str
) -> OutputLoss | None:
    """The part of the loss that the model's output decides, where the settings ask for it."""
    if settings.end_to_end is None:
        return None
    from saelab.models.load import load_model
    from saelab.train.end_to_end import OutputLoss

    if store is None:
        raise ConfigError("end_to_end reads the tokens of cached activations, which --live has not; cache them first")
    model = load_model(store.manifest.model.name, device=device)
    limit = getattr(batches, "norm_limit", None)
    return OutputLoss.on_store(settings.end_to_end, store, model, hook_name, seed=settings.seed, norm_limit=limit)


def verified(store: ActivationStore, second: ActivationStore | None) -> dict[str, Path]:
    """The parents of a training on these stores, checked to be whole."""
    parents = {"activations": store.path} | ({"second": second.path} if second else {})
    for one in (store, second):
        if one is not None:
            one.verify()
    return parents


def source_of(batches: StoreBatches, tokens: int) -> str:
    return (
        f"{tokens / batches.n_tokens:.1f} passes over {batches.n_tokens:,} training tokens, "
        f"{batches.n_outliers} outliers left out"
    )


def gamma_of(stats: ActivationStats | tuple[ActivationStats, ...]) -> float:
    """||mean|| / spread, the largest of a token's vectors: what predicts dead features where nothing is centred."""
    return max(one.gamma for one in (stats if isinstance(stats, tuple) else (stats,)))
