"""Many SAEs from one reading of the activations: which ones, what they are called, and how they compare."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelab import atomic, rundir
from saelab import config as configs
from saelab.errors import ConfigError, TrainingError
from saelab.rundir import StageWriter
from saelab.sae.base import SAE, Metadata
from saelab.sae.io import load_sae_files
from saelab.train.config import TrainConfig
from saelab.train.l0 import decoder_projection
from saelab.train.loop import Job, Progress, check_settings, train_together
from saelab.train.trainer import ActivationBatches

Settings = dict[str, Any]


class Stream(NamedTuple):
    """What the members of a sweep that read the same tokens in the same order are fed with."""

    batches: ActivationBatches
    metadata: Metadata
    held_out: ActivationBatches | None
    """For the comparison; None where there is nothing to compare by."""


class Comparison(NamedTuple):
    """One line of the table at the end of a sweep. Numbers are those of the last line of the member's metrics."""

    name: str
    arch: str
    hook_name: str
    d_sae: int
    state: str
    """ "finished", or why not."""
    tokens: int | None
    l0: float | None
    reconstruction: float | None
    loss: float | None
    n_dead: int | None
    decoder_projection: float | None
    """Of held-out activations, with n a quarter of d_sae; see `saelab.train.l0.decoder_projection`."""


def read_grid(content: Settings) -> tuple[Settings, list[Settings]]:
    """The settings that all members share, and the blocks that say which vary.

    Raises:
        ConfigError: there is no block, or a block is no table.
    """
    base = dict(content)
    blocks = base.pop("grid", None)
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
        raise ConfigError(
            "a sweep needs at least one [[grid]] block that says what varies; write for example "
            '[[grid]] and below it sae = { arch = "topk", k = [16, 32, 64] }'
        )
    return base, blocks


def members_of(
    base: Settings, blocks: Sequence[Settings], resolve: Callable[[Settings], TrainConfig]
) -> dict[str, TrainConfig]:
    """Every combination of each block's lists, on top of ``base``, under a name made of what varies.

    In a block a list holds the values to try; a setting that is itself a list is written as a list of lists.
    ``resolve`` turns plain settings into a config.

    Raises:
        ConfigError: a setting is unknown or impossible, a list is empty, or two members are the same.
    """
    settings = [resolve(configs.merged(base, choice)) for block in blocks for choice in _choices(block)]
    return dict(zip(_names([configs.to_mapping(one) for one in settings]), settings, strict=True))


def streams_of(members: Mapping[str, TrainConfig]) -> list[dict[str, TrainConfig]]:
    """The members that can be trained on the same batches, together."""

    def key(config: TrainConfig) -> tuple[Any, ...]:
        return (config.hook_name, config.more_hooks, config.batch_size, config.seed, config.outlier_factor, config.live)

    groups: dict[tuple[Any, ...], dict[str, TrainConfig]] = {}
    for name, config in members.items():
        groups.setdefault(key(config), {})[name] = config
    return list(groups.values())


def begin(
    out: Path, members: Mapping[str, TrainConfig], *, parents: Mapping[str, Path], evaluation: Settings | None = None
) -> StageWriter:
    """Start the directory of a sweep; its members come to lie in it, each a stage directory like any other.

    ``evaluation``, settings for what is to follow the training, is kept for whoever resumes the sweep.
    """
    return StageWriter.create(
        out,
        stage="sweep",
        config={
            "members": {name: configs.to_mapping(config) for name, config in members.items()},
            "eval": evaluation,
        },
        parents=parents,
    )


def begun(out: Path) -> dict[str, TrainConfig]:
    """The members of the sweep that was started in ``out``."""
    members = rundir.read_run(out, "sweep")["config"]["members"]
    return {name: configs.from_mapping(TrainConfig, settings) for name, settings in members.items()}


def train_sweep(
    run: StageWriter,
    members: Mapping[str, TrainConfig],
    open_stream: Callable[[TrainConfig], Stream],
    *,
    parents: Mapping[str, Path],
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[Comparison]:
    """Train what is not finished yet, stream by stream, and compare; writes sweep.json, and DONE if nothing failed.

    Every member ends with the bytes that training it alone gives.

    Raises:
        ConfigError: a member was begun with other settings.
        Interrupted: Ctrl-C or SIGTERM; checkpoints of the last whole step have been written.
    """
    table: list[Comparison] = []
    n_steps, before = sum(_longest(group) for group in streams_of(members)), 0
    for group in streams_of(members):
        stream = open_stream(next(iter(group.values())))
        waiting = {name: config for name, config in group.items() if not (run.path / name / "DONE").exists()}
        failures: dict[str, TrainingError] = {}
        if waiting:
            jobs = [
                Job(config, _member(run.path / name, config, parents), stream.metadata)
                for name, config in waiting.items()
            ]

            def shifted(done: int, total: int, detail: str, before: int = before) -> None:
                if progress:
                    progress(before + done, n_steps, detail)

            outcomes = train_together(jobs, stream.batches, resume=run.path, device=device, progress=shifted)
            failures = {
                name: outcome
                for name, outcome in zip(waiting, outcomes, strict=True)
                if isinstance(outcome, TrainingError)
            }
        before += _longest(group)
        table += [_compared(run.path / name, config, failures.get(name), stream) for name, config in group.items()]
    order = list(members)
    table.sort(key=lambda row: order.index(row.name))
    atomic.write_json(run.path / "sweep.json", {"members": [row._asdict() for row in table]})
    if all(row.state == "finished" for row in table):
        run.finish()
    return table


def _member(path: Path, config: TrainConfig, parents: Mapping[str, Path]) -> StageWriter:
    """The directory of a member, begun or continued."""
    settings = configs.to_mapping(config)
    if not (path / "run.json").exists():
        return StageWriter.create(path, stage="sae", config=settings, parents=parents)
    check_settings(path, began=settings, now=rundir.read_run(path, "sae")["config"])
    return StageWriter.resume(path, stage="sae")


def _compared(path: Path, config: TrainConfig, failure: TrainingError | None, stream: Stream) -> Comparison:
    lines = rundir.read_metrics(path) if (path / "metrics.jsonl").exists() else []
    last = lines[-1] if lines else {}
    return Comparison(
        name=path.name,
        arch=config.sae.arch,
        hook_name=stream.metadata.hook_name,
        d_sae=config.sae.d_sae,
        state="finished" if failure is None else str(failure),
        decoder_projection=None if failure else _projection(load_sae_files(path), stream.held_out),
        **{name: last.get(name) for name in ("tokens", "l0", "reconstruction", "loss", "n_dead")},
    )


def _projection(sae: SAE, held_out: ActivationBatches | None) -> float | None:
    """The proxy for the right L0; None where a token has several vectors, for which it is not defined."""
    if held_out is None or sae.n_slots is not None or sae.W_dec.ndim != 2 or sae.d_sae < 4:
        return None
    return decoder_projection(held_out.at(0), sae.W_dec, sae.b_dec, n=sae.d_sae // 4)


def _longest(group: Mapping[str, TrainConfig]) -> int:
    return max(config.n_steps for config in group.values())


def _choices(block: Settings) -> Iterator[Settings]:
    """Every combination of the values in the lists of a block, under dotted names."""
    options = []
    for name, value in configs.flattened(block).items():
        if value == []:
            raise ConfigError(f"{name} of a [[grid]] block lists no value to try; give at least one")
        options.append([(name, one) for one in value] if isinstance(value, list) else [(name, value)])
    for choice in itertools.product(*options):
        yield dict(choice)


def _names(members: Sequence[Settings]) -> list[str]:
    """A name for each: its architecture, then the settings that other members of that architecture have otherwise.

    Raises:
        ConfigError: two are the same.
    """
    flat = [configs.flattened(member) for member in members]
    names = []
    for settings in flat:
        kin = [other for other in flat if other["sae.arch"] == settings["sae.arch"]]
        varies = [key for key in settings if any(other.get(key) != settings[key] for other in kin)]
        varies.sort(key=lambda key: (key != "hook_name", key != "sae.d_sae"))  # stable: the rest as in the config
        names.append("-".join([settings["sae.arch"], *(_part(key, settings[key]) for key in varies)]))
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the sweep holds {name} twice; take the repeated value or block out")
    return names


def _part(key: str, value: Any) -> str:
    """``k32`` for sae.k = 32; hooks stand for themselves. Nothing in it can leave the sweep's directory."""
    label = "" if key == "hook_name" else key.rpartition(".")[2]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return label + re.sub(r"[^A-Za-z0-9.+]+", "_", text)
