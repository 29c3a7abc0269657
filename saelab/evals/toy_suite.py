"""Architectures on worlds whose features are known, one table for all: what each recovers at the world's own L0."""

from __future__ import annotations

import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch

from saelab.errors import ConfigError, nearest
from saelab.evals.fitting import fit
from saelab.evals.recovery import Recovery, recovery
from saelab.evals.toy import ToyBatches, ToyConfig
from saelab.sae.architectures import CONFIG_OF, TrainableConfig, new_sae
from saelab.train.config import TrainConfig
from saelab.train.l0 import COEFFICIENTS
from saelab.train.optim import OptimConfig

Progress = Callable[[int, int, str], None]

_TEST_STEP = 10**9  # batches that no training reaches
_TEST_BATCHES = 20


@dataclass(frozen=True, kw_only=True)
class ToySuiteConfig:
    """Which architectures to try on which worlds."""

    arch: tuple[str, ...] = ()
    """Architectures. Off: all that read one activation a token."""
    d_sae: int = 320
    """Features of the SAE."""
    tokens: int = 2_000_000
    """Training tokens."""
    lr: float = 3e-3
    """Peak learning rate."""
    seeds: tuple[int, ...] = (0, 1)
    """Each seeds a world and the SAE's weights; the table shows the mean and the range over them."""
    world: ToyConfig = field(default_factory=ToyConfig)
    """The first world; the others change its exponent or kind."""

    def __post_init__(self) -> None:
        for name in self.arch:
            if name not in single_input():
                raise ConfigError(f"arch {name!r} cannot be tried on toy activations; {nearest(name, single_input())}")
        if not self.seeds:
            raise ConfigError("seeds must name at least one seed; write for example seeds = [0, 1]")


class ToyResult(NamedTuple):
    """One architecture in one world with one seed."""

    world: str
    arch: str
    seed: int
    recovery: Recovery
    l0: float
    explained_variance: float
    seconds: float


def single_input() -> list[str]:
    """Names of the architectures that can be trained on one activation a token."""
    trainable = {config.arch for config in typing.get_args(TrainableConfig)}
    return sorted(arch for arch in trainable if new_sae(CONFIG_OF[arch](d_sae=64), d_in=4).n_slots is None)


def worlds(base: ToyConfig) -> dict[str, ToyConfig]:
    """The worlds of the table by name."""
    return {
        f"exponent {base.exponent:g}": base,
        "exponent 1": replace(base, exponent=1.0),
        "hierarchical": replace(base, kind="hierarchical"),
        "correlated": replace(base, kind="correlated"),
    }


def toy_suite(config: ToySuiteConfig, *, progress: Progress | None = None) -> list[ToyResult]:
    """Every architecture in every world with every seed."""
    jobs = [
        (name, world, arch, seed)
        for name, world in worlds(config.world).items()
        for arch in config.arch or single_input()
        for seed in config.seeds
    ]
    results = []
    for number, (name, world, arch, seed) in enumerate(jobs):
        if progress:
            progress(number, len(jobs), f"{arch}, {name}")
        results.append(tried(name, replace(world, seed=seed), arch, config, seed=seed))
    if progress:
        progress(len(jobs), len(jobs), "")
    return results


def tried(name: str, world: ToyConfig, arch: str, config: ToySuiteConfig, *, seed: int) -> ToyResult:
    """One architecture trained and scored in one world."""
    batches = ToyBatches(world)
    began = time.perf_counter()
    sae = fit(training(arch, world, config, seed=seed), batches)
    seconds = time.perf_counter() - began
    samples = [batches.sample(_TEST_STEP + i) for i in range(_TEST_BATCHES)]
    acts, codes = (torch.cat([sample[part] for sample in samples]) for part in (0, 1))
    with torch.inference_mode():
        feature_acts = sae.encode(acts)
        recon = sae.decode(feature_acts)
    found = feature_acts != 0
    return ToyResult(
        name,
        arch,
        seed,
        recovery(batches.directions, sae.W_dec, codes != 0, found, signed=bool((feature_acts < 0).any())),
        float(found.sum(1).float().mean()),
        float(1 - (acts - recon).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum()),
        round(seconds, 1),
    )


def training(arch: str, world: ToyConfig, config: ToySuiteConfig, *, seed: int) -> TrainConfig:
    """Settings that aim at the world's own L0: by k, by the number of pursuits, or by steering the penalty."""
    cls = CONFIG_OF[arch]
    names = {setting.name for setting in fields(cls)}
    n_active = max(1, round(world.l0))
    counts = {name: n_active for name in ("k", "max_iterations") if name in names}
    return TrainConfig(
        sae=cls(d_sae=config.d_sae, **counts),
        tokens=max(config.tokens, world.batch_size),
        batch_size=world.batch_size,
        optim=OptimConfig(lr=config.lr, decay_share=0.3),
        target_l0=world.l0 if names & set(COEFFICIENTS) else None,
        outlier_factor=None,
        seed=seed,
    )
