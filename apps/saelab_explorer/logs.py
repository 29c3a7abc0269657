"""Training logs: which stages under the root wrote one, what it holds, and how the settings of several differ.

Unlike the pages of features, which open one run, this looks at every stage: an alignment run may lie directly under the
root, and a sweep holds its members. A log is found by name in a registry, never by a path from outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab import config as configs
from saelab import rundir
from saelab.errors import ArtifactError
from saelab_explorer.runs import read_json, stage_directories, stage_of

#: Metrics that are looked at first, where a log has them.
FIRST_METRICS = (
    "reconstruction", "l0", "n_dead", "loss",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "objective/scores", "objective/kl", "objective/rlhf_reward", "val/length",
)  # fmt: skip

#: What a line is about, rather than what it measures.
CLOCKS = ("step", "tokens")


@dataclass(frozen=True)
class Log:
    """A stage directory with a metrics.jsonl."""

    name: str
    """Its place under the root: ``demo/sae``, ``sweep/topk-k32``, ``dpo``."""
    path: Path
    stage: str
    kind: str
    """Architecture of the SAE, or method of the alignment."""
    finished: bool
    started: str
    config: Mapping[str, Any]
    """Settings under dotted names."""

    def lines(self) -> list[dict[str, Any]]:
        """Lines of the log so far.

        Raises:
            ArtifactError: a line in the middle is no JSON.
        """
        try:
            return [line for line in rundir.read_metrics(self.path) if isinstance(line, dict)]
        except ValueError as error:
            raise ArtifactError(
                f"{self.path / 'metrics.jsonl'} is damaged ({error}); take the line out, or train again"
            ) from error


@dataclass(frozen=True)
class Sweep:
    """The comparison at the end of a sweep."""

    name: str
    members: Sequence[Mapping[str, Any]]
    """Rows of sweep.json: name, arch, hook_name, d_sae, state, tokens, l0, reconstruction, loss, n_dead, ..."""


def find_logs(root: Path) -> dict[str, Log]:
    """Every log under ``root``, by name. Links that lead out of ``root`` are not followed."""
    found = ((path, name) for path, name in _stages(root) if (path / "metrics.jsonl").is_file())
    return {name: log for path, name in found if (log := _read(path, name)) is not None}


def find_sweeps(root: Path) -> dict[str, Sweep]:
    """Every sweep under ``root`` that has its table.

    Raises:
        ArtifactError: a sweep.json is damaged.
    """
    tables = ((path / "sweep.json", name) for path, name in _stages(root) if stage_of(path) == "sweep")
    return {
        name: Sweep(name, [row for row in read_json(file).get("members", []) if isinstance(row, dict)])
        for file, name in tables
        if file.is_file()
    }


def metric_names(logs: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Metrics that at least one of the logs holds, those that one looks at first in front."""
    held = {
        name: None for lines in logs for line in (lines[:1] + lines[-1:]) for name in line if _is_number(line[name])
    }
    first = [name for name in FIRST_METRICS if name in held]
    return first + [name for name in held if name not in first and name not in CLOCKS]


def common_clock(logs: Sequence[list[dict[str, Any]]]) -> str:
    """What the curves run over: tokens where every log counts them, else steps."""
    return "tokens" if all(lines and "tokens" in lines[-1] for lines in logs) else "step"


def points(
    lines: Sequence[Mapping[str, Any]], metric: str, clock: str, *, most: int = 240
) -> list[tuple[float, float]]:
    """(clock, value) of the lines that hold both, thinned out to ``most``, the last one kept."""
    known = [
        (float(line[clock]), float(line[metric]))
        for line in lines
        if _is_number(line.get(metric)) and _is_number(line.get(clock))
    ]
    stride = max(1, -(-len(known) // most))
    return known[::stride] + ([known[-1]] if known and (len(known) - 1) % stride else [])


def differing(logs: Sequence[Log]) -> dict[str, list[str]]:
    """Settings that are not the same in all ``logs``: what each has, a dash where it has none."""
    names = {name: None for log in logs for name in log.config}
    written = {name: [_written(log.config.get(name)) for log in logs] for name in names}
    return {name: values for name, values in written.items() if len(set(values)) > 1}


def _stages(root: Path) -> Iterator[tuple[Path, str]]:
    """Directories that are stages: directly under the root, inside a workspace, and inside a sweep."""
    root = root.resolve()

    def below(folder: Path, depth: int) -> Iterator[Path]:
        for path in stage_directories(folder):
            if path.resolve().is_relative_to(root):
                stage = stage_of(path)
                if stage is not None:
                    yield path
                # a workspace lies directly under the root; the only stage that holds others is a sweep
                if stage == "sweep" or (stage is None and depth == 1):
                    yield from below(path, depth + 1)

    return ((path, path.relative_to(root).as_posix()) for path in below(root, 1))


def _read(path: Path, name: str) -> Log | None:
    """The log in ``path``; None for one whose records are damaged: one bad run hides no other."""
    try:
        settings, env = (read_json(path / file) if (path / file).exists() else {} for file in ("run.json", "env.json"))
    except ArtifactError:
        return None
    config = configs.flattened(settings.get("config") or {})
    return Log(
        name=name,
        path=path,
        stage=stage_of(path) or "",
        kind=str(config.get("sae.arch") or config.get("method") or ""),
        finished=(path / "DONE").exists(),
        started=str(env.get("started", "")),
        config=config,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _written(value: object) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
