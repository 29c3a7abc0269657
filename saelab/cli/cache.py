"""saelab cache: text through a model, activations onto the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saelab.cli.console import (
    AsJson,
    ConfigFile,
    Device,
    Overrides,
    PrintConfig,
    emit,
    human_bytes,
    human_seconds,
    need_space,
    progress_bar,
    say,
)
from saelab.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from saelab.activations.capture import CacheConfig
    from saelab.activations.store import ActivationStore
    from saelab.models.load import Model


def cache(
    model: Annotated[str | None, typer.Option(help="Hub name, local directory, or 'demo'.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Data set name, .txt/.jsonl/.parquet file or folder, or 'demo'.")
    ] = None,
    hook: Annotated[
        list[str] | None, typer.Option(help="Hook point, e.g. blocks.10.hook_resid_post; repeat for several.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to capture.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write, e.g. runs/mine/activations.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted capture in this directory.")] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Capture activations on text into checksummed shards."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.capture import CacheConfig

    flags = {"model": model, "text__source": text, "hook_names": hook, "tokens": tokens}
    if resume is not None:
        if set_ or config or out or any(value is not None for value in flags.values()):
            raise ConfigError(f"--resume takes its settings from {resume}/run.json; leave out the other settings")
        out = resume
        settings = configs.from_mapping(CacheConfig, rundir.read_run(resume, "activations")["config"])
    else:
        settings = configs.load(CacheConfig, config, set_ or (), **flags)
    if print_config:
        print(configs.to_toml(settings), end="")
        return
    if out is None:
        raise ConfigError("cache needs a directory to write to; give --out, for example --out runs/mine/activations")
    if resume is None:
        rundir.refuse_taken(out)
    store = run_capture(settings, out, resume=resume is not None, device=device)
    workspace = out.parent if out.name == "activations" else out
    say(f"{store.n_rows * store.context:,} tokens in {out}; next: saelab train {workspace}")
    if json:
        emit(
            {
                "path": str(out),
                "tokens": store.n_rows * store.context,
                "rows": store.n_rows,
                "hook_names": list(store.hook_names),
            }
        )


def run_capture(settings: CacheConfig, out: Path, *, resume: bool, device: str | None = None) -> ActivationStore:
    """Load the model, print the plan, capture under a progress bar."""
    from saelab.activations.capture import capture
    from saelab.models.load import load_model

    model = load_model(settings.model, device=device)
    width = sum(model.hook_width(name) for name in settings.hook_names)
    n_bytes = settings.tokens * (width * (4 if settings.dtype == "float32" else 2) + 8)
    need_space(out, n_bytes - sum(shard.stat().st_size for shard in out.glob("shard_*.safetensors")))
    rate = measured_rate(model, settings)
    say(
        f"plan: {settings.tokens:,} tokens of {settings.text.source} through {settings.model} "
        f"at {', '.join(settings.hook_names)}; "
        f"{human_bytes(n_bytes)} on disk; about {human_seconds(settings.tokens / rate)} at {rate:,.0f} tokens/s"
    )
    try:
        with progress_bar("capture") as progress:
            return capture(
                settings,
                out,
                model=model,
                resume=resume,
                progress=lambda done, total: progress(done, total, "tokens"),
            )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; every whole shard is kept, continue with: saelab cache --resume {out}") from None


def measured_rate(model: Model, settings: CacheConfig) -> float:
    """Tokens a second of one forward pass to the hook, after one to warm up."""
    import time

    import torch

    ids = torch.randint(
        0, model.d_vocab, (settings.batch_rows, settings.context), generator=torch.Generator().manual_seed(0)
    )
    model.capture(ids[:1], settings.hook_names)
    start = time.perf_counter()
    model.capture(ids, settings.hook_names)
    return ids.numel() / (time.perf_counter() - start)
