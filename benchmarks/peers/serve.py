"""The side of the peers: ``python -m benchmarks.peers.serve`` in their environment answers requests, one JSON a line.

    {"do": "build", "peer": NAME, "problem": {...}, "threads": 2}   -> {"version": ...}
    {"do": "step", "batch": 3, "lr": 0.001}                         -> {"seconds": ...}   one training step, timed here
    {"do": "mark_dead", "window": 100}                              -> {}
    {"do": "held_out_error"}                                        -> {"value": ...}
    {"do": "peak_bytes", "batch": 3}                                -> {"value": ...}
    {"do": "quit"}

An error is an answer too: {"error": text}. What the libraries print goes to standard error.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.memory import peak_bytes
from benchmarks.peers import steps
from benchmarks.problem import Problem
from benchmarks.timing import timer


class Server:
    """One peer's step on one problem."""

    def build(self, *, peer: str, problem: dict[str, Any], threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.problem = Problem.load(**problem)
        step_class, options = steps.PEERS[peer]
        self.peer = step_class(self.problem, **options)
        return {"version": steps.version(peer)}

    def step(self, *, batch: int, lr: float) -> dict[str, Any]:
        x = self.problem.batch(batch)
        for group in self.peer.optimizer.param_groups:
            group["lr"] = lr
        return {"seconds": timer(lambda: self.peer.step(x), self.problem.device)()}

    def mark_dead(self, *, window: int) -> dict[str, Any]:
        self.peer.mark_dead(window)
        return {}

    def held_out_error(self) -> dict[str, Any]:
        return {"value": self.peer.held_out_error()}

    def peak_bytes(self, *, batch: int) -> dict[str, Any]:
        x = self.problem.batch(batch)
        return {"value": peak_bytes(lambda: self.peer.step(x), self.problem.device)}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        wish = request.pop("do")
        if wish == "quit":
            break
        try:
            answer = getattr(server, wish)(**request)
        except Exception as error:  # of whatever library: the parent reports it and goes on without this peer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
