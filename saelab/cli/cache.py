"""saelab cache: text through a model, activations onto the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

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
    import subprocess

    from saelab.activations.settings import CacheConfig
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
    like: Annotated[
        Path | None, typer.Option(help="Read the very tokens of this store with another --model, to compare the two.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted capture in this directory.")] = None,
    join: Annotated[Path | None, typer.Option(help="Help the processes that capture into this directory.")] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Capture activations on text into checksummed shards."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.settings import CacheConfig

    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}; it counts processes")
    flags = {"model": model, "text__source": text, "hook_names": hook, "tokens": tokens}
    continued = resume or join
    if continued is not None:
        verb = "--resume" if resume else "--join"
        others = (set_, config, out, like, resume and join, join and workers > 1)
        if any(others) or any(value is not None for value in flags.values()):
            raise ConfigError(f"{verb} takes its settings from {continued}/run.json; leave out the other settings")
        out = continued
        settings = configs.from_mapping(CacheConfig, rundir.read_run(out, "activations")["config"])
    else:
        mapping = configs.merge(config, set_ or (), **flags)
        settings = configs.from_mapping(CacheConfig, mapping if like is None else alike(mapping, like))
    if print_config:
        print(configs.to_toml(settings), end="")
        return
    if out is None:
        raise ConfigError("cache needs a directory to write to; give --out, for example --out runs/mine/activations")
    if continued is None:
        rundir.refuse_taken(out)
    store = run_capture(
        settings, out, resume=resume is not None, join=join is not None, like=like, workers=workers, device=device
    )
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


def alike(mapping: dict[str, Any], like: Path) -> dict[str, Any]:
    """The settings for another model on the tokens of the store ``like``."""
    from saelab.activations.pairing import TAKEN, settings_of_pair
    from saelab.activations.store import ActivationStore

    if "model" not in mapping:
        raise ConfigError(f"--like {like} needs the other model; give --model")
    taken = [name for name in TAKEN if name in mapping]
    if taken:
        raise ConfigError(f"--like takes {taken[0]} from {like}; leave {taken[0]} out")
    return settings_of_pair(ActivationStore.open(like)) | mapping


def run_capture(
    settings: CacheConfig,
    out: Path,
    *,
    resume: bool,
    join: bool = False,
    like: Path | None = None,
    workers: int = 1,
    device: str | None = None,
) -> ActivationStore:
    """Load the model, print the plan, capture under a progress bar, alone or with helpers."""
    from saelab.activations.capture import capture
    from saelab.activations.store import ActivationStore, token_bytes
    from saelab.models.load import load_model

    crew = Helpers(out, workers - 1, device)
    crew.share_cores()
    model = load_model(settings.model, device=device)
    n_bytes = settings.tokens * token_bytes(settings.dtype, list(map(model.hook_width, settings.hook_names)))
    need_space(out, n_bytes - sum(shard.stat().st_size for shard in out.glob("shard_*.safetensors")))
    rate = measured_rate(model, settings)
    say(
        f"plan: {settings.tokens:,} tokens of {settings.text.source} through {settings.model} "
        f"at {', '.join(settings.hook_names)}; "
        f"{human_bytes(n_bytes)} on disk; about {human_seconds(settings.tokens / rate)} at {rate:,.0f} tokens/s"
        + (f" in one process, {workers} will share it" if workers > 1 else "")
    )
    try:
        with progress_bar("capture") as progress:
            return capture(
                settings,
                out,
                model=model,
                like=None if like is None else ActivationStore.open(like),
                resume=resume,
                join=join,
                founded=crew.start,
                progress=lambda done, total: progress(done, total, "tokens"),
            )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; every whole shard is kept, continue with: saelab cache --resume {out}") from None
    finally:
        crew.stop()


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


class Helpers:
    """Further processes that capture into the same directory; what one that dies has begun, the others do."""

    def __init__(self, out: Path, n: int, device: str | None) -> None:
        self._out = out
        self._n = n
        self._device = device
        self._processes: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def share_cores(self) -> None:
        """Leave each process its part of the processor's cores, unless OMP_NUM_THREADS says how many."""
        import torch

        if self._n and "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // (self._n + 1)))  # the helpers' too
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def start(self) -> None:
        import subprocess
        import sys
        import tempfile

        for number in range(1, self._n + 1):
            command = [sys.executable, "-m", "saelab", "cache", "--join", str(self._out)]
            command += ["--device", device] if (device := self._device_of(number)) else []
            log = tempfile.TemporaryFile()  # noqa: SIM115 (it is read when the helper has ended)
            self._processes.append((subprocess.Popen(command, stdout=log, stderr=log), log))

    def stop(self) -> None:
        """End those that still run, which have nothing left to do; tell of those that failed."""
        import signal

        from saelab.activations.claims import Claims

        for process, log in self._processes:
            process.terminate()  # nothing, if it has ended
            if process.wait() not in (0, 130, -signal.SIGTERM):  # 130: Ctrl-C reaches them all
                log.seek(0)
                words = log.read().decode("utf-8", "replace").strip().splitlines()
                say(f"a helper ended early: {words[-1] if words else f'killed by signal {-process.returncode}'}")
            log.close()
        if self._processes:
            Claims(self._out).close()  # of which those that were ended may have been the last holders

    def _device_of(self, number: int) -> str | None:
        """The device asked for; helpers of a machine with several GPUs take one after the other."""
        import torch

        n_gpus = torch.cuda.device_count()
        return f"cuda:{number % n_gpus}" if self._device is None and n_gpus > 1 else self._device
