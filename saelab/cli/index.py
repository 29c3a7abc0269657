"""saelab index: everything one wants to look up about each feature, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saelab.cli.console import AsJson, ConfigFile, Device, Overrides, emit, human_bytes, progress_bar, say
from saelab.cli.inputs import opened

if TYPE_CHECKING:
    from saelab.features.config import IndexConfig
    from saelab.features.index import FeatureIndex


def index(
    run: Annotated[Path, typer.Argument(help="Directory of an SAE, or its workspace.")],
    activations: Annotated[
        Path | None, typer.Option(help="Activations to index; by default those it was trained on.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Index only so many tokens.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write; by default index/ beside the SAE. An older one is replaced."),
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    json: AsJson = False,
) -> None:
    """Look at every feature: examples, tokens, logits, label."""
    from saelab import config as configs
    from saelab.features.config import IndexConfig

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
    """Load what is needed, print the plan, build the index and put it in the place of an older one."""
    from saelab import atomic, rundir
    from saelab.features.index import FeatureIndex, build_index

    sae_path = rundir.find(run, "sae")
    out = out or sae_path.parent / "index"
    rundir.check_replaceable(out, "index")
    sae, store, model = opened(sae_path, activations=activations, device=device)
    n_tokens = min(settings.max_tokens or store.n_rows * store.context, store.n_rows * store.context)
    n_pairs = n_tokens * getattr(sae.cfg, "k", 64)
    say(f"plan: {sae.cfg.d_sae:,} features over {n_tokens:,} tokens; about {human_bytes(24 * n_pairs)} of memory")
    with progress_bar("index") as progress, atomic.replacing_directory(out) as folder:
        build_index(sae, store, model, folder, config=settings, sae_path=sae_path, progress=progress)
    return FeatureIndex.open(out)
