"""``python -m benchmarks``: checks, then times, operations, training steps and search on this machine."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_ops, bench_quality, bench_search, bench_train, record, report, shapes
from benchmarks.gates import GateError
from benchmarks.peers import client, steps

TOPICS = ("ops", "train", "search", "quality", "report", "all")
#: Exit status where a gate refused; other errors of Python end with 1.
REFUSED = 3
_ROOT = Path(__file__).parents[1]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check, then time. Nothing is printed for an operation whose check fails, nor for interpreted "
        "kernels. Results go to OUT/TOPIC_DEVICE.json; 'report' writes benchmarks/README.md from them.",
        epilog="all: ops, train, search, quality where peers are installed, report. Exit status 3: a gate refused, or "
        "one of our results was wrong.",
    )
    top.add_argument("topic", choices=TOPICS, help="what to do")
    top.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="where (default: cuda if there is one)",
    )  # fmt: skip
    top.add_argument(
        "--shapes", type=_shapes, metavar="S[,S...]",
        help="TOKENSxWIDTHxFEATURESkK, such as 2048x576x4608k32 (default: the shapes of benchmarks/shapes.py)",
    )  # fmt: skip
    top.add_argument("--rounds", type=int, default=15, help="timed runs of each contender (default 15)")
    top.add_argument("--threads", type=int, help="threads of torch on the CPU (default: its own choice)")
    top.add_argument("--time-limit", type=float, metavar="S", help="ops: begin no operation after S seconds")
    top.add_argument("--ops", type=_ops, default=tuple(bench_ops.OPS), metavar="OP[,OP...]", help="ops: only these")
    top.add_argument(
        "--peer-python", type=Path,
        help="train, quality: Python of the environment with peers (default: .venv-peer/bin/python if there is one)",
    )  # fmt: skip
    top.add_argument(
        "--peers", type=_peers, default=tuple(steps.PEERS), metavar="P[,P...]",
        help=f"train: which of {', '.join(steps.PEERS)} (default all)",
    )  # fmt: skip
    top.add_argument(
        "--only", type=_only, metavar="C[,C...]",
        help=f"train: of torch's contenders only these: {', '.join(bench_train.IN_TORCH)}, or none (default all)",
    )  # fmt: skip
    top.add_argument("--steps", type=int, default=300, help="quality: training steps (default 300)")
    top.add_argument(
        "--seeds", type=int, default=1, help="quality: initial weights and orders of the tokens (default 1)"
    )
    top.add_argument("--lr", type=float, default=2e-3, help="quality: learning rate after the warm-up (default 2e-3)")
    top.add_argument(
        "--workspace", type=Path, default=_ROOT / "runs" / "demo", help="quality: whose activations (default runs/demo)"
    )
    top.add_argument("--tokens", type=int, default=500_000, help="search: tokens to search (default 500,000)")
    top.add_argument("--out", type=Path, help="directory of the results (default benchmarks/results)")
    top.add_argument(
        "--smoke", action="store_true", help="tiny shapes, few rounds, results to a temporary directory: does it run?"
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; REFUSED if a gate said no or one of our results was wrong."""
    wish = parser().parse_args(arguments)
    if wish.threads:
        torch.set_num_threads(wish.threads)
    if wish.peer_python is None and client.DEFAULT_PYTHON.exists():
        wish.peer_python = client.DEFAULT_PYTHON
    if wish.out is None:
        wish.out = Path(tempfile.mkdtemp(prefix="benchmarks-")) if wish.smoke else record.RESULTS
    if wish.smoke:
        wish.rounds, wish.steps, wish.tokens = 2, min(wish.steps, 4), min(wish.tokens, 600)
    correct = True
    try:
        for topic in TOPICS[:-1] if wish.topic == "all" else (wish.topic,):
            correct &= _DO[topic](wish)
    except GateError as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    return 0 if correct else REFUSED


def _do_ops(wish: argparse.Namespace) -> bool:
    deadline = time.monotonic() + wish.time_limit if wish.time_limit else None
    rows: list[dict[str, Any]] = []
    for shape in _shapes_for(wish, "ops"):
        rows += bench_ops.run(
            (shape,), device=wish.device, rounds=wish.rounds, ops=wish.ops, smoke=wish.smoke, deadline=deadline
        )
        _publish("ops", wish, rows)  # after each shape: what is done is kept, whatever comes
    return not any(map(bench_ops.failed, rows))


def _do_train(wish: argparse.Namespace) -> bool:
    rows: list[dict[str, Any]] = []
    for shape in _shapes_for(wish, "train"):
        rows += bench_train.run(
            (shape,), device=wish.device, rounds=wish.rounds, peers=wish.peers, peer_python=wish.peer_python,
            only=wish.only, smoke=wish.smoke,
        )  # fmt: skip
        _publish("train", wish, rows)
    return True


def _do_search(wish: argparse.Namespace) -> bool:
    rows = bench_search.run(_shapes_for(wish, "search"), n_tokens=wish.tokens, device=wish.device, smoke=wish.smoke)
    _publish("search", wish, rows)
    return True


def _do_quality(wish: argparse.Namespace) -> bool:
    if wish.topic == "all" and wish.peer_python is None:
        print("quality: skipped, there is no environment with peers here")
        return True
    rows: list[dict[str, Any]] = []
    for shape in _shapes_for(wish, "quality"):
        for seed in range(wish.seeds):
            rows += bench_quality.run(
                (shape,), device=wish.device, n_steps=wish.steps, lr=wish.lr, seed=seed, workspace=wish.workspace,
                peers=("sae-lens",), peer_python=wish.peer_python,
            )  # fmt: skip
            _publish("quality", wish, rows)
    return True


def _do_report(wish: argparse.Namespace) -> bool:
    if wish.smoke or wish.out != record.RESULTS:
        print("report: skipped, it is for results in earnest in benchmarks/results")
    else:
        report.write(wish.out)
    return True


_DO = {"ops": _do_ops, "train": _do_train, "search": _do_search, "quality": _do_quality, "report": _do_report}


def _shapes_for(wish: argparse.Namespace, topic: str) -> tuple[shapes.Shape, ...]:
    return wish.shapes or shapes.default(wish.device, topic, smoke=wish.smoke)


def _publish(topic: str, wish: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    record.publish(topic, wish.device, rows, out=wish.out, smoke=wish.smoke)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _shapes(text: str) -> tuple[shapes.Shape, ...]:
    try:
        return tuple(shapes.Shape.parse(part) for part in _names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _ops(text: str) -> tuple[str, ...]:
    return _among(text, tuple(bench_ops.OPS))


def _only(text: str) -> tuple[str, ...]:
    return _among(text, (*bench_train.IN_TORCH, "none"))


def _peers(text: str) -> tuple[str, ...]:
    return _among(text, tuple(steps.PEERS))


def _among(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    for name in _names(text):
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return _names(text)


if __name__ == "__main__":
    sys.exit(main())
