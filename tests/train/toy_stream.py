"""Activations of a known dictionary, as batches that are a function of the step; and what is in a run's directory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab import atomic, rundir
from saelab import config as configs
from saelab.activations.moments import ActivationStats, moments
from saelab.metrics import TIMINGS
from saelab.rundir import StageWriter
from saelab.train.config import TrainConfig


class Mixtures:
    """Each token is three of 40 unit directions in 16 dimensions, plus an offset; ``poisoned`` steps hold a NaN."""

    d_in = 16

    def __init__(self, *, batch_size: int = 64, offset: float = 0.0, poisoned: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch_size, self.poisoned = batch_size, poisoned
        self.directions = torch.nn.functional.normalize(torch.randn(40, self.d_in, generator=generator))
        self.offset = offset * torch.randn(self.d_in, generator=generator)
        self.asked: list[int] = []

    def at(self, step: int) -> Float[Tensor, "batch d_in"]:
        self.asked.append(step)
        generator = torch.Generator().manual_seed(1000 + step)
        size = torch.rand(self.batch_size, 40, generator=generator)
        acts = (size * (size >= size.topk(3).values[:, -1:])) @ self.directions + self.offset
        if step in self.poisoned:
            acts[3, 0] = math.nan
        return acts

    def positions(self, step: int) -> Int64[np.ndarray, " batch"]:
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size)

    def statistics(self, max_tokens: int) -> ActivationStats:
        return moments(self.at(10**6 + i) for i in range(-(-max_tokens // self.batch_size)))


def run_in(path: Path, config: TrainConfig) -> StageWriter:
    return StageWriter.create(path, stage="sae", config=configs.to_mapping(config))


def contents(path: Path) -> dict[str, str]:
    """Hash of every file, without the clock: timings in the metrics, env.json."""
    hashes = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "env.json"):
        name = str(file.relative_to(path))
        if file.name == "metrics.jsonl":
            lines = rundir.read_metrics(file.parent)
            hashes[name] = json.dumps([{k: v for k, v in line.items() if k not in TIMINGS} for line in lines])
        else:
            hashes[name] = atomic.sha256(file)
    return hashes
