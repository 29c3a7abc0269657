"""saelab index: everything one wants to look up about each feature, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saelab.cli.console import AsJson, ConfigFile, Device, Overrides, emit, human_bytes, progress_bar, say
from saelab.cli.inputs import opened
from saelab.errors import ArtifactError, ConfigError, Interrupted

if TYPE_CHECKING:
    from saelab.features.config import IndexConfig
    from saelab.features.index import FeatureIndex


def index(
    run: Annotated[Path | None, typer.Argument(help="Directory of an SAE, or its workspace.")] = None,
    activations: Annotated[
        Path | None, typer.Option(help="Activations to index; by default those it was trained on.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Index only so many tokens.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write; by default index/ beside the SAE. An older one is replaced."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted index of this directory.")] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    json: AsJson = False,
) -> None:
    """Look at every feature: examples, tokens, logits, label."""
    from saelab import config as configs
    from saelab.features.config import IndexConfig

    if resume is not None:
        if any((run, activations, out, config, set_)) or tokens is not None:
            raise ConfigError(f"--resume takes its settings from what {resume} was begun with; leave out the others")
        built = resume_indexing(resume, device=device)
    elif run is None:
        raise ConfigError("index needs an SAE; give its directory or workspace, for example: saelab index runs/demo")
    else:
        settings = configs.load(IndexConfig, config, set_ or (), max_tokens=tokens)
        built = run_indexing(run, settings, activations=activations, out=out, device=device)
    say(
        f"{built.n_features:,} features over {built.n_tokens:,} tokens in {built.path}; "
        f"next: saelab explore {built.path.parent}, or saelab features {built.path} --specific"
    )
    if json:
        emit({"path": str(built.path), "n_features": built.n_features, "n_tokens": built.n_tokens})


def run_indexing(
    run: Path,
    settings: IndexConfig,
    *,
    activations: Path | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> FeatureIndex:
    """Load what is needed, print the plan, build the index and put it in the place of an older one.

    Raises:
        ArtifactError: an index that was interrupted waits to be resumed.
    """
    from saelab import rundir

    sae_path = rundir.find(run, "sae")
    out = out or sae_path.parent / "index"
    if is_begun(out):
        raise ArtifactError(
            f"an index of {out} was begun and interrupted; continue it with: saelab index --resume {out}, "
            f"or remove {_workplace(out)} to start anew"
        )
    return _build(sae_path, settings, activations=activations, out=out, device=device)


def resume_indexing(out: Path, *, device: str | None = None) -> FeatureIndex:
    """Continue the interrupted index that was to become ``out``, with the settings and inputs it was begun with.

    Raises:
        ArtifactError: nothing was begun there, or an input has changed.
    """
    from saelab import config as configs
    from saelab import rundir
    from saelab.features.config import IndexConfig

    if not is_begun(out):
        state = "is finished" if (out / "DONE").exists() else "was never begun"
        raise ArtifactError(f"{out} {state}, there is nothing to resume; build an index with: saelab index --help")
    place = _workplace(out)
    settings = configs.from_mapping(IndexConfig, rundir.read_run(place, "index")["config"])
    sae_path, activations = (rundir.parent(place, name) for name in ("sae", "activations"))
    return _build(sae_path, settings, activations=activations, out=out, device=device)


def is_begun(out: Path) -> bool:
    """Whether an interrupted index waits to become ``out``."""
    return (_workplace(out) / "run.json").exists()


def _workplace(out: Path) -> Path:
    """Where ``out`` is built, beside an older one. It bears the name of something unfinished, which readers pass by."""
    return out.with_name(f"{out.name}.part-resumable")


def _build(
    sae_path: Path, settings: IndexConfig, *, activations: Path | None, out: Path, device: str | None
) -> FeatureIndex:
    from saelab import atomic, rundir
    from saelab.features import codes, scan
    from saelab.features.index import FeatureIndex, build_index

    rundir.check_replaceable(out, "index")
    sae, store, model = opened(sae_path, activations=activations, device=device)
    n_tokens = min(settings.max_tokens or store.n_rows * store.context, store.n_rows * store.context)
    n_pairs = n_tokens * getattr(sae.cfg, "k", 64)
    n_bytes = 100 * min(n_pairs, codes.BLOCK_PAIRS) + 24 * n_tokens + scan.memory_bytes(sae.d_sae, settings)
    say(
        f"plan: {sae.cfg.d_sae:,} features over {n_tokens:,} tokens; about {human_bytes(n_bytes)} of memory, "
        f"{human_bytes(8 * n_pairs)} of disk while it runs"
    )
    place = _workplace(out)
    try:
        with progress_bar("index") as progress:
            build_index(sae, store, model, place, config=settings, sae_path=sae_path, resume=True, progress=progress)
        atomic.put_directory(place, out)
    except KeyboardInterrupt:
        if not is_begun(out):
            raise
        raise Interrupted(f"stopped; continue with: saelab index --resume {out}") from None
    return FeatureIndex.open(out)
