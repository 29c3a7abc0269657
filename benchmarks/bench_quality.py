"""Equal loss: our training step and a peer's from the same weights, on the same tokens in the same order.

A step that is fast because it learns less would be no gain. Learning rates are the same, step by step, and gradients
are clipped to the same norm in the same unit. Both sides count as dead what has not fired in the last third of the
steps, and revive it in their own way. The sides take turns step by step, so that noise of the machine meets both; a
seed is another order of the tokens and other initial weights.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import eager, gates
from benchmarks.data import planted
from benchmarks.ours import Loop
from benchmarks.peers.client import Peer, PeerError
from benchmarks.problem import CLIP_NORM, Problem
from benchmarks.shapes import Shape
from benchmarks.timing import timer

# The default learning rate, 2e-3, is the one of 4e-4, 1e-3 and 2e-3 at which both sides end lowest after 300 steps.
# Below it the peer, whose decoder rows may grow, is ahead for longer: by 1.1 % after 300 steps at 1e-3.

#: Our held-out error over the peer's may be so much at most.
LARGEST_RATIO = 1.01
_WARMUP_SHARE = 0.05
_N_HELD_OUT = 16_384


def run(
    shapes: tuple[Shape, ...],
    *,
    device: str,
    n_steps: int,
    lr: float,
    seed: int,
    workspace: Path,
    peers: tuple[str, ...],
    peer_python: Path | None,
) -> list[dict[str, Any]]:
    """One row a shape.

    Raises:
        GateError: interpreted kernels, no such device, or no peer to compare with.
    """
    gates.refuse_interpreted()
    gates.refuse_unknown_device(device)
    if peer_python is None:
        raise gates.GateError("there is no environment with peers to compare with; make bench-peers makes one")
    rows = []
    for shape in shapes:
        problem, source = tokens_for(shape, device, n_steps=n_steps, lr=lr, workspace=workspace, seed=seed)
        rows.append({"seed": seed} | _row(problem, source, n_steps, peers, peer_python))
    return rows


def tokens_for(
    shape: Shape, device: str, *, n_steps: int, lr: float, workspace: Path, seed: int = 0
) -> tuple[Problem, str]:
    """The problem, and where its tokens come from: the workspace's activations if they have the width, else planted."""
    stored = _stored(shape, n_steps, workspace, seed)
    source = f"activations of {workspace.name}" if stored else "a planted dictionary"
    batches, held_out = stored or _planted(shape, n_steps, seed)
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(shape.features, shape.width, generator=generator), dim=1)
    nothing = torch.zeros(shape.features)
    return Problem(shape, directions, nothing, batches, held_out, nothing.bool(), lr, device), source


def _stored(shape: Shape, n_steps: int, workspace: Path, seed: int) -> tuple[Tensor, Tensor] | None:
    """Batches and held-out tokens as saelab's training sees them: shuffled, centred, scaled."""
    if not (workspace / "activations" / "DONE").exists():
        return None
    from saelab.activations.loader import Batches
    from saelab.activations.store import ActivationStore
    from saelab.train.normaliser import Normaliser

    store = ActivationStore.open(workspace)
    (hook_name, *_) = store.hook_names
    if store.d_in(hook_name) != shape.width:
        return None
    reader = Batches(store, hook_name, batch_size=shape.tokens, seed=seed)
    normalise = Normaliser.fitted(reader.statistics(100_000), centre=True)
    batches = torch.empty(n_steps, shape.tokens, shape.width, dtype=torch.bfloat16)
    for step in range(n_steps):
        batches[step] = normalise(reader.at(step))
    held_out = Batches(store, hook_name, batch_size=_N_HELD_OUT, seed=0, split="held_out").at(0)
    return batches, normalise(held_out).to(torch.bfloat16)


def _planted(shape: Shape, n_steps: int, seed: int) -> tuple[Tensor, Tensor]:
    def draw(n_tokens: int, number: int) -> Tensor:
        return planted(n_tokens, shape.width, n_directions=2 * shape.width, active=16, seed=seed, draw=number)

    batches = torch.empty(n_steps, shape.tokens, shape.width, dtype=torch.bfloat16)
    for step in range(n_steps):
        batches[step] = draw(shape.tokens, step + 1)
    return batches, draw(_N_HELD_OUT, 0).to(torch.bfloat16)


def _row(problem: Problem, source: str, n_steps: int, peers: tuple[str, ...], peer_python: Path) -> dict[str, Any]:
    window, notes = max(1, n_steps // 3), {}
    curves: dict[str, list[float]] = {"saelab": []}
    seconds = {"saelab": 0.0}
    # the peer's loss is the sum over d entries and ours their mean; Adam does not care, but clipping does
    clip_norm = CLIP_NORM / problem.shape.width
    loop = Loop(problem, clip_norm=clip_norm, dead_window=window * problem.shape.tokens)
    with contextlib.ExitStack() as stack:
        remote: dict[str, Peer] = {}
        for name in peers:
            try:
                remote[name] = stack.enter_context(Peer(name, problem, peer_python))
                curves[name], seconds[name] = [], 0.0
            except PeerError as error:
                notes[name] = str(error)
        if not remote:
            raise gates.GateError(f"no peer to compare with: {'; '.join(notes.values())}")
        for step in range(n_steps):
            lr = problem.lr * min(1.0, (step + 1) / max(1, round(_WARMUP_SHARE * n_steps)))
            loop.lr = lr
            x = problem.batch(step)
            seconds["saelab"] += timer(lambda x=x: loop.step(x), problem.device)()
            loop.mark_dead()
            for name, peer in remote.items():
                peer.lr = lr
                seconds[name] += peer.seconds(step)
                peer.mark_dead(window=window)
            if (step + 1) % window == 0 or step + 1 == n_steps:
                curves["saelab"].append(eager.held_out_error(loop.weights, problem))
                for name, peer in remote.items():
                    curves[name].append(peer.held_out_error())
                print(f"{problem.shape} step {step + 1}: " + ", ".join(f"{n} {c[-1]:.5f}" for n, c in curves.items()))
        versions = {name: peer.version for name, peer in remote.items()}
    variance = _variance(problem.held_out)
    ratios = {name: curves["saelab"][-1] / curves[name][-1] for name in remote}
    return {
        "shape": problem.shape._asdict(),
        "tokens_from": source,
        "n_steps": n_steps,
        "n_held_out": len(problem.held_out),
        "lr": problem.lr,
        "contenders": {
            name: {
                "held_out_error": curve[-1],
                "explained_variance": 1 - curve[-1] / variance,
                "seconds": seconds[name],
                "curve": curve,
                "version": versions.get(name),
            }
            for name, curve in curves.items()
        },
        "our_error_over_theirs": ratios,
        "equal": {name: ratio <= LARGEST_RATIO for name, ratio in ratios.items()},
        "not_timed": notes,
    }


def _variance(held_out: Tensor) -> float:
    """Mean squared distance of an entry from the tokens' mean."""
    tokens = held_out.double()
    return float((tokens - tokens.mean(0)).pow(2).mean())
