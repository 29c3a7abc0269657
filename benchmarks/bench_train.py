"""A whole training step of a TopK SAE with AuxK, 5 % of the features dead: all contenders in alternating rounds.

The same initial weights, tokens, dead features and optimiser settings for all. Peers run in a process of their own and
time their own step; they are asked for one at a time, so every contender meets the same moments of the machine.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import eager, gates
from benchmarks.floors import Floors, measured_ceilings
from benchmarks.memory import peak_bytes
from benchmarks.ours import Kernels, Loop
from benchmarks.peers.client import Peer, PeerError
from benchmarks.problem import Problem, planted_problem
from benchmarks.shapes import Shape
from benchmarks.timing import Timer, side_by_side, timer

#: Largest relative difference of the weights from those of the dense float32 step, one step after the same weights.
#: A step of Adam changes weights by about lr whatever the gradient, so this is far below the step itself (1e-2).
LARGEST_DIFFERENCE = {"cpu": 1e-4, "cuda": 1e-3}


class Step(Protocol):
    """A contender in this process."""

    @property
    def weights(self) -> eager.Weights: ...

    def step(self, x: Tensor) -> None: ...


def _compiled(problem: Problem, precision: torch.dtype) -> Step:
    if reason := eager.why_not_compiled(problem.device):
        raise NotImplementedError(reason)
    return eager.Dense(problem, precision, compiled=True)


#: Our step: as saelab's loop makes it where saelab is installed, and from the kernels alone.
OURS: dict[str, Callable[[Problem], Step]] = {
    "saelab": Loop,
    "saelab_kernels": Kernels,
    "saelab_kernels unclipped": lambda problem: Kernels(problem, clip_norm=None),
}
#: The step in plain torch.
IN_TORCH: dict[str, Callable[[Problem], Step]] = {
    "torch dense float32": eager.Dense,
    "torch dense bfloat16": lambda problem: eager.Dense(problem, torch.bfloat16),
    "torch.compile dense float32": lambda problem: _compiled(problem, torch.float32),
    "torch.compile dense bfloat16": lambda problem: _compiled(problem, torch.bfloat16),
    "torch sparse float32": eager.Sparse,
    "torch sparse bfloat16": lambda problem: eager.Sparse(problem, torch.bfloat16),
}


def run(
    shapes: tuple[Shape, ...],
    *,
    device: str,
    rounds: int,
    peers: tuple[str, ...] = (),
    peer_python: Path | None = None,
    only: tuple[str, ...] | None = None,
    smoke: bool = False,
) -> list[dict[str, Any]]:
    """One row a shape.

    Raises:
        GateError: interpreted kernels, no such device, or none of our steps agrees with the dense one.
    """
    gates.refuse_interpreted()
    gates.refuse_unknown_device(device)
    return [
        _row(shape, device, rounds=rounds, peers=peers, peer_python=peer_python, only=only, smoke=smoke)
        for shape in shapes
    ]


def _row(
    shape: Shape,
    device: str,
    *,
    rounds: int,
    peers: tuple[str, ...],
    peer_python: Path | None,
    only: tuple[str, ...] | None,
    smoke: bool,
) -> dict[str, Any]:
    problem = planted_problem(shape, device)
    ceilings = measured_ceilings(shape, device, smoke=smoke)
    floor = Floors(shape, ceilings, weight_bytes=2 if device == "cuda" else 4).whole_step()
    in_torch = {name: build for name, build in IN_TORCH.items() if only is None or name in only}
    steps, notes, differences = admitted(problem, {**OURS, **in_torch})
    with contextlib.ExitStack() as stack:
        remote = _started(peers, peer_python, problem, stack, notes)
        timers = {name: _on_batches(problem, step) for name, step in steps.items()}
        timers |= {name: _remote_on_batches(peer) for name, peer in remote.items()}
        timings = side_by_side(timers, rounds=rounds)
        contenders: dict[str, dict[str, Any]] = {}
        for name, timing in timings.items():
            contenders[name] = {
                **timing._asdict(),
                "tokens_per_second": round(1000 * shape.tokens / timing.median_ms),
                "over_floor": round(timing.median_ms / floor.ms, 2),
                "difference_after_one_step": differences.get(name),
                **(_of_step(steps[name], problem) if name in steps else _of_peer(remote[name])),
            }
    for name, numbers in contenders.items():
        print(f"{shape}  {name:30} {numbers['median_ms']:9.1f} ms  {numbers['over_floor']:6.2f} x floor")
    for name, note in notes.items():
        print(f"{shape}  {name:30} not timed: {note}")
    return {
        "shape": shape._asdict(),
        "n_dead": shape.n_dead,
        "ceilings": ceilings._asdict(),
        "floor_ms": round(floor.ms, 3),
        "floor_terms_ms": {name: round(ms, 3) for name, ms in floor.terms.items()},
        "contenders": contenders,
        "not_timed": notes,
    }


def _started(
    names: tuple[str, ...],
    python: Path | None,
    problem: Problem,
    stack: contextlib.ExitStack,
    notes: dict[str, str],
) -> dict[str, Peer]:
    """The peers that can make a step; ``notes`` says why the others cannot."""
    started = {}
    for name in names:
        try:
            if python is None:
                raise PeerError("no environment with peers here; make bench-peers makes one")
            peer = stack.enter_context(Peer(name, problem, python))
            peer.seconds(0)
            started[name] = peer
        except PeerError as error:
            notes[name] = str(error)
    return started


def _of_step(step: Step, problem: Problem) -> dict[str, Any]:
    peak = peak_bytes(functools.partial(step.step, problem.batch(0)), problem.device)
    return {"peak_bytes": peak, "held_out_error": eager.held_out_error(step.weights, problem), "version": None}


def _of_peer(peer: Peer) -> dict[str, Any]:
    return {"peak_bytes": peer.peak_bytes(0), "held_out_error": peer.held_out_error(), "version": peer.version}


def admitted(
    problem: Problem, wanted: Mapping[str, Callable[[Problem], Step]]
) -> tuple[dict[str, Step], dict[str, str], dict[str, float]]:
    """The contenders that may be timed, why the others may not, and how far each is from the dense step.

    Ours must agree with the dense step in float32. The others are only asked to run: a step with a bfloat16 product
    chooses other features now and then, and what it learns is told by its held-out error.

    Raises:
        GateError: none of ours agrees.
    """
    x = problem.batch(0)
    dense = eager.Dense(problem)
    dense.step(x)
    expected = [weight.detach().clone() for weight in dense.weights]
    del dense
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    differences: dict[str, float] = {}
    for name, build in wanted.items():
        try:
            step = build(problem)
            step.step(x)
        except (ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
            notes[name] = str(error).splitlines()[0]
            _release(problem.device)
            continue
        differences[name] = _difference(step.weights, expected)
        if name in OURS and not differences[name] <= LARGEST_DIFFERENCE[problem.device]:
            notes[name] = f"its weights differ by {differences[name]:.1e} from the dense step's after one step"
            continue
        steps[name] = step
    if not any(name in OURS for name in steps):
        reasons = "; ".join(f"{name}: {note}" for name, note in notes.items() if name in OURS)
        raise gates.GateError(f"{problem.shape}: none of our steps may be timed ({reasons})")
    return steps, notes, differences


@torch.no_grad()
def _difference(weights: eager.Weights, expected: list[Tensor]) -> float:
    square = sum(float((found - wanted).double().pow(2).sum()) for found, wanted in zip(weights, expected, strict=True))
    norm = sum(float(wanted.double().pow(2).sum()) for wanted in expected)
    ratio = math.sqrt(square / norm)
    return ratio if math.isfinite(ratio) else math.inf


def _on_batches(problem: Problem, step: Step) -> Timer:
    """Times a step on the next batch; reading the batch is not part of it."""
    index = 0

    def seconds() -> float:
        nonlocal index
        x = problem.batch(index)
        index += 1
        return timer(lambda: step.step(x), problem.device)()

    return seconds


def _remote_on_batches(peer: Peer) -> Timer:
    index = 0

    def seconds() -> float:
        nonlocal index
        index += 1
        return peer.seconds(index - 1)

    return seconds


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
