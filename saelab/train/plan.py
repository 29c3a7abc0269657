"""What a capture or a training will take, before it begins: memory, disk, tokens, time, and what would be cheaper.

Memory and disk are sums of named parts, each a formula of the settings; time comes from a few steps and forward passes
on this machine. With activations of width d, F features, batch B and k active features, all in float32 (4 bytes):

    weights       2 d F + d + F, and whatever the architecture adds, counted on its own parameters
    Adam          twice the weights;  weight average: once;  gradients: once, where they are not kept in factors
    step          sparse kernels: B F / 4 for the search, weights / 2 for copies in bfloat16, 9 B d, 5 B k;
                  dense: several [B, F] (``_DENSE``) and 9 B d
    closing       several [B, F] (``_CLOSING``) to count how often each feature fires: with sparse kernels the peak
    loader        10 bytes for each activation in the store, before the first step
    reviving      not counted: AuxK adds up to one [B, dead features]

Measured on five architectures in processes of their own, the sum is within a fifth of the peak; the constants in it are
those of the CPU's kernels and allocator.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.moments import ActivationStats, moments
from saelab.activations.settings import CacheConfig
from saelab.activations.store import token_bytes
from saelab.activations.text import open_text
from saelab.errors import ConfigError
from saelab.models.load import Model
from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE
from saelab.train.config import TrainConfig
from saelab.train.trainer import Trainer
from saelab_kernels import choose

_FLOAT = 4

# Tensors of [batch, d_sae] alive at once in a dense step, autograd's included.
_DENSE = {"relu": 4, "panneal": 8, "gated": 8, "abstopk": 4}
_DENSE_OF_OTHERS = 6

# Tensors of [batch, d_sae] that counting the firings of a batch makes.
_CLOSING = {"topk": 3, "abstopk": 2, "transcoder": 3, "relu": 3, "panneal": 3, "gated": 4}
_CLOSING_OF_OTHERS = 5

#: What Python, torch and saelab take before anything is made, what they load with the first step, and with a model.
PROCESS_BYTES = 150_000_000
LIBRARY_BYTES = 75_000_000
MODEL_LIBRARY_BYTES = 250_000_000

_CHUNK_ROWS = 1024  # of LiveBatches
_METRICS_LINE_BYTES = 300
_SHARD_HEADER_BYTES = 500
_MANIFEST_SHARD_BYTES = 180


class Part(NamedTuple):
    """One thing that takes memory or disk."""

    name: str
    n_bytes: int


class Timing(NamedTuple):
    """Seconds of one step or of one token, measured here."""

    median: float
    low: float
    high: float
    n: int

    def times(self, count: int | float) -> Timing:
        """Of ``count`` of them, one after the other."""
        return Timing(self.median * count, self.low * count, self.high * count, self.n)

    def plus(self, other: Timing) -> Timing:
        """Of both, one after the other."""
        return Timing(self.median + other.median, self.low + other.low, self.high + other.high, min(self.n, other.n))


class ModelCost(NamedTuple):
    """What a language model takes while it reads text."""

    token: Timing
    weights_bytes: int
    forward_bytes: int
    """Of one forward pass, and what the libraries load for it."""


class Cheaper(NamedTuple):
    """Another way to the same end."""

    change: str
    memory_bytes: int | None = None
    """Instead of the plan's; None where it stays."""
    disk_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take."""

    what: str
    n_tokens: int
    n_steps: int | None
    """Training steps; None for a capture."""
    passes: float | None
    """How often training sees each token."""
    memory: tuple[Part, ...]
    """At the highest point."""
    mapped_bytes: int
    """Pages of the store that are read on top; the system takes them back when it needs them."""
    disk: tuple[Part, ...]
    """What stays when the run is finished."""
    seconds: Timing | None
    """None where nothing was measured."""
    cheaper: tuple[Cheaper, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return sum(part.n_bytes for part in self.memory)

    @property
    def disk_bytes(self) -> int:
        return sum(part.n_bytes for part in self.disk)


# --- training


def plan_training(
    config: TrainConfig,
    d_in: int,
    *,
    n_tokens: int | None = None,
    store_bytes: int = 0,
    step: Timing | None = None,
    running: ModelCost | None = None,
    device: str = "cpu",
) -> Plan:
    """The plan of ``config`` on activations of width ``d_in``, of which the data hold ``n_tokens``.

    ``step`` is the time of a training step (`measured_step`); ``running`` is what the model takes (`measured_model`)
    where it runs during training.
    """
    memory = training_memory(config, d_in, n_tokens=n_tokens or 0, running=running, device=device)
    seconds = None if step is None else step.times(config.n_steps)
    if seconds is not None and running is not None and config.live is not None:
        read = running.token.times(config.n_steps * config.batch_size * config.live.context / (config.live.context - 1))
        seconds = seconds.plus(read)
    smaller = _of_half_width(config)
    cheaper: tuple[Cheaper, ...] = ()
    if smaller is not None:
        less = training_memory(smaller, d_in, n_tokens=n_tokens or 0, running=running, device=device)
        cheaper = (
            Cheaper(
                f"--d-sae {smaller.sae.d_sae} (half as many features)",
                sum(part.n_bytes for part in less),
                sum(part.n_bytes for part in training_disk(smaller, d_in)),
                None if seconds is None else seconds.median / 2,
            ),
        )
    return Plan(
        what=f"training {config.sae.arch} with {config.sae.d_sae:,} features on width {d_in}",
        n_tokens=config.n_steps * config.batch_size,
        n_steps=config.n_steps,
        passes=None if not n_tokens else config.n_steps * config.batch_size / n_tokens,
        memory=memory,
        mapped_bytes=store_bytes,
        disk=training_disk(config, d_in),
        seconds=seconds,
        cheaper=cheaper,
    )


def memory_bytes(config: TrainConfig, d_in: int) -> int:
    """Peak memory of a training process; see `training_memory` for its parts."""
    return sum(part.n_bytes for part in training_memory(config, d_in))


def memory_bytes_together(configs: Iterable[TrainConfig], d_in: int) -> int:
    """Peak memory of a process that trains all of ``configs`` at once: its libraries count once."""
    process = PROCESS_BYTES + LIBRARY_BYTES
    return process + sum(memory_bytes(config, d_in) - process for config in configs)


def training_memory(
    config: TrainConfig,
    d_in: int,
    *,
    n_tokens: int = 0,
    running: ModelCost | None = None,
    device: str = "cpu",
) -> tuple[Part, ...]:
    """The parts of a training process's memory when it is largest: opening the data, at a step, or at the end."""
    sae = _shape_of(config, d_in)
    weights = _weights_bytes(sae)
    sparse = _has_sparse_step(config, sae, device)
    batch, width, slots = config.batch_size, sae.d_sae, sae.n_slots or 1
    vectors = _FLOAT * batch * d_in * slots
    features = _FLOAT * batch * width
    kept = [Part("weights", weights), Part("Adam's two moments", 2 * weights)]
    if config.ema_decay is not None:
        kept.append(Part("weight average", weights))
    if sparse:
        k = getattr(config.sae, "k", 0)
        working = features // 4 + weights // 2 + 9 * vectors + 5 * _FLOAT * batch * k
        at_step = [Part("step (sparse kernels)", working)]
    else:
        working = _DENSE.get(config.sae.arch, _DENSE_OF_OTHERS) * features + 9 * vectors
        at_step = [Part("gradients", weights), Part("step (dense)", working)]
    batches = [Part("batches read ahead", 3 * vectors)]
    if running is not None:
        batches += _parts_of(running)
    if config.live is not None:
        tokens = _CHUNK_ROWS * config.live.context
        batches = [Part("chunk of live activations", 3 * _FLOAT * tokens * d_in), *batches]
    # what a sparse step has taken stays with the process; a dense one gives its large tensors back
    held = at_step if sparse else []
    phases = [
        [] if config.live is not None else [Part("norms of all activations", 10 * n_tokens)],
        [*kept, *at_step, *batches],
        [*kept, *held, Part("counting firings", _closing_bytes(sae, features)), *batches],
    ]
    largest = max(phases, key=lambda parts: sum(part.n_bytes for part in parts))
    return (Part("Python and libraries", PROCESS_BYTES + LIBRARY_BYTES), *largest)


def training_disk(config: TrainConfig, d_in: int) -> tuple[Part, ...]:
    """What a finished training leaves on the disk; while a checkpoint is written there is one more of them."""
    sae = _shape_of(config, d_in)
    weights = _weights_bytes(sae)
    averages = 0 if config.ema_decay is None else 1
    checkpoint = (3 + averages) * weights + 8 * sae.d_sae + 4096
    saved = range(config.checkpoint_every, config.n_steps + 1, config.checkpoint_every)
    kept = {*saved[-2:], *(step for step in saved if config.keep_every and step % config.keep_every == 0)}
    return (
        *((Part(f"{len(kept)} checkpoints", len(kept) * checkpoint),) if kept else ()),
        Part("the SAE", weights + _FLOAT * sae.d_sae + 4096),
        Part("metrics", _METRICS_LINE_BYTES * -(-config.n_steps // config.log_every)),
    )


def measured_step(config: TrainConfig, d_in: int, *, device: str, budget_s: float = 10.0) -> Timing:
    """Seconds of a real training step at this shape, on random activations: the spread is that of single steps.

    Dead features, of which there are none yet, make a step of an architecture that revives them slower.
    """
    batches = _Noise(config, d_in)
    trainer = Trainer(replace(config, stats_tokens=1, live=None, end_to_end=None), batches, device)
    for number in range(2):
        trainer.advance(batches.at(number).to(device))
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < budget_s and len(seconds) < 20):
        acts = batches.at(len(seconds)).to(device)
        _synchronise(device)
        start = time.perf_counter()
        trainer.advance(acts)
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
        if trainer.finished:
            break
    return _timing(seconds)


# --- capture


def plan_capture(
    config: CacheConfig,
    widths: Sequence[int],
    *,
    n_tokens: int | None = None,
    running: ModelCost | None = None,
) -> Plan:
    """The plan of ``config`` at hooks of these ``widths``; ``n_tokens`` is what the text has, if it is known."""
    tokens = min(config.tokens, n_tokens or config.tokens) // config.context * config.context
    cheaper = [
        Cheaper("saelab train --live: no activations on disk, the model runs once for each pass", disk_bytes=0),
    ]
    if config.dtype not in ("int8", "float8_e4m3fn"):
        small = replace(config, dtype="int8")
        cheaper.insert(0, Cheaper("--set dtype=int8", disk_bytes=_store_bytes(small, widths, tokens)))
    shard_tokens = min(tokens, config.rows_per_shard * config.context)
    return Plan(
        what=f"capturing {tokens:,} tokens of {config.text.source} at {', '.join(config.hook_names)}",
        n_tokens=tokens,
        n_steps=None,
        passes=None,
        memory=(
            Part("Python and libraries", PROCESS_BYTES),
            *(() if running is None else _parts_of(running)),
            Part("a shard being filled", shard_tokens * token_bytes(config.dtype, widths)),
        ),
        mapped_bytes=0,
        disk=(Part(f"activations in {config.dtype}", _store_bytes(config, widths, tokens)),),
        seconds=None if running is None else running.token.times(tokens),
        cheaper=tuple(cheaper),
    )


def measured_model(model: Model, config: CacheConfig, *, n: int = 5) -> ModelCost:
    """What ``model`` takes on its way to the hooks, in forward passes of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.d_vocab, (config.batch_rows, config.context), generator=generator)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.bridge.original_model.parameters())
    seconds = []
    with _Watch() as watch:
        model.capture(ids, config.hook_names)
        for _ in range(n):
            start = time.perf_counter()
            model.capture(ids, config.hook_names)
            _synchronise(str(model.device))
            seconds.append((time.perf_counter() - start) / ids.numel())
    return ModelCost(_timing(seconds), weights, watch.n_bytes)


class TextSize(NamedTuple):
    n_tokens: int
    """Estimated from the tokens per character of the first documents."""
    exhausted: bool
    """False where there is more text than was asked for, or than there was time to look at."""


def text_size(config: CacheConfig, model: Model, *, budget_s: float = 10.0) -> TextSize:
    """How many tokens the text of ``config`` has, up to those it asks for."""
    n_read, n_estimated, characters = 0, 0.0, 0
    limit = config.text.max_tokens_per_document or config.tokens
    deadline = time.perf_counter() + budget_s
    for document in open_text(config.text):
        if characters < 500_000:
            encoded = len(model.encode(document.text))
            n_read, characters = n_read + encoded, characters + len(document.text)
        n_estimated += min(limit, len(document.text) * n_read / max(1, characters))
        # BOS begins every row
        if n_estimated * config.context / (config.context - 1) >= config.tokens or time.perf_counter() > deadline:
            return TextSize(round(n_estimated * config.context / (config.context - 1)), exhausted=False)
    return TextSize(round(n_estimated * config.context / (config.context - 1)), exhausted=True)


# --- parts


def _shape_of(config: TrainConfig, d_in: int) -> SAE:
    """The SAE without memory for its weights."""
    with torch.device("meta"):
        return new_sae(config.sae, d_in=d_in)


def _weights_bytes(sae: SAE) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in sae.parameters())


def _has_sparse_step(config: TrainConfig, sae: SAE, device: str) -> bool:
    """Whether gradients stay in factors, so that there are no tensors of the weights' shape for them."""
    if type(sae).training_gradient is SAE.training_gradient or config.end_to_end is not None:
        return False
    k = getattr(config.sae, "k", config.sae.d_sae)
    return choose(torch.device(device), n_features=config.sae.d_sae, k=k).name != "reference"


def _closing_bytes(sae: SAE, features: int) -> int:
    """Encoding a batch densely: pre-activations, activations, and for thresholds the comparison and its product."""
    return _CLOSING.get(sae.cfg.arch, _CLOSING_OF_OTHERS) * features


def _of_half_width(config: TrainConfig) -> TrainConfig | None:
    """The same with half the features; None where the architecture's other settings do not allow it."""
    try:
        return replace(config, sae=replace(config.sae, d_sae=config.sae.d_sae // 2))
    except ConfigError:
        return None


def _store_bytes(config: CacheConfig, widths: Sequence[int], n_tokens: int) -> int:
    n_shards = -(-n_tokens // (config.rows_per_shard * config.context))
    n_rows = n_tokens // config.context
    return (
        n_tokens * token_bytes(config.dtype, widths) + n_rows + n_shards * (_SHARD_HEADER_BYTES + _MANIFEST_SHARD_BYTES)
    )


# --- time


class _Noise:
    """Random activations of the shape that training will see."""

    def __init__(self, config: TrainConfig, d_in: int) -> None:
        self.d_in = d_in
        slots = _shape_of(config, d_in).n_slots
        self._shape = (config.batch_size, d_in) if slots is None else (config.batch_size, slots, d_in)
        self._slots = slots

    def at(self, step: int) -> Float[Tensor, "batch *slots d_in"]:
        return torch.randn(self._shape, generator=torch.Generator().manual_seed(step))

    def statistics(self, max_tokens: int) -> ActivationStats | tuple[ActivationStats, ...]:
        one = moments([torch.randn(1024, self.d_in, generator=torch.Generator().manual_seed(0))])
        return one if self._slots is None else (one,) * self._slots


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class _Watch:
    """How much the memory of this process rises within a block; 0 where the system does not tell."""

    def __enter__(self) -> _Watch:
        self._before = self._highest = resident_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def n_bytes(self) -> int:
        return self._highest - self._before

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self._highest = max(self._highest, resident_bytes())


def _parts_of(running: ModelCost) -> tuple[Part, Part, Part]:
    return (
        Part("transformers and the bridge", MODEL_LIBRARY_BYTES),
        Part("the model", running.weights_bytes),
        Part("forward passes", running.forward_bytes),
    )


def resident_bytes() -> int:
    """Memory of this process that is no file's; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
