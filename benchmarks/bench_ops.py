"""Every operation by itself: checked against its reference, then timed beside torch's natural alternatives."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gates
from benchmarks.cases import decoders, encoders, gradients, language
from benchmarks.cases.case import ALTERNATIVE, Case
from benchmarks.cases.inputs import Inputs
from benchmarks.floors import Ceilings, Floors, measured_ceilings
from benchmarks.memory import peak_bytes
from benchmarks.shapes import Shape
from benchmarks.timing import side_by_side, timer

#: Reasons to leave a row without times that are no fault of the operation.
OUT_OF_MEMORY, OUT_OF_TIME = "out of memory", "out of time"

#: name on the command line -> the cases of an operation
OPS: dict[str, Callable[[Inputs, Floors], list[Case]]] = {
    "encode_topk": encoders.encode_topk,
    "encode_batchtopk": encoders.encode_batchtopk,
    "encode_jumprelu": encoders.encode_jumprelu,
    "sparse_decode": decoders.sparse_decode,
    "decode_loss": decoders.decode_loss,
    "sampled_dot": decoders.sampled_dot,
    "pairs_by_feature": gradients.pairs_by_feature,
    "feature_grad": gradients.feature_grad,
    "feature_step": gradients.feature_step,
    "aux_dead": gradients.aux_dead,
    "token_logps": language.token_logps,
}


def run(
    shapes: tuple[Shape, ...],
    *,
    device: str,
    rounds: int,
    ops: tuple[str, ...] = tuple(OPS),
    smoke: bool = False,
    deadline: float | None = None,
) -> list[dict[str, Any]]:
    """One row for each operation, direction and shape; a row without times says why.

    No operation is begun after ``deadline``, a time of time.monotonic.

    Raises:
        GateError: interpreted kernels, or no such device.
    """
    gates.refuse_interpreted()
    gates.refuse_unknown_device(device)
    rows = []
    for shape in shapes:
        try:
            inputs = Inputs(shape, device)
            ceilings = measured_ceilings(shape, device, smoke=smoke)
            floors = Floors(shape, ceilings, weight_bytes=inputs.W_dec.element_size())
        except torch.OutOfMemoryError:
            rows += [_refused(op, "", shape, OUT_OF_MEMORY) for op in ops]
            continue
        for op in ops:
            if deadline is not None and time.monotonic() > deadline:
                rows.append(_refused(op, "", shape, OUT_OF_TIME))
                continue
            rows += _rows_of(op, inputs, floors, rounds=rounds)
            _release(device)
        del inputs
        _release(device)
    return rows


def _rows_of(op: str, inputs: Inputs, floors: Floors, *, rounds: int) -> list[dict[str, Any]]:
    try:
        cases = OPS[op](inputs, floors)
    except torch.OutOfMemoryError:
        return [_refused(op, "", inputs.shape, OUT_OF_MEMORY)]
    return [row(case, inputs.shape, inputs.device, floors.ceilings, rounds=rounds) for case in cases]


def row(case: Case, shape: Shape, device: str, ceilings: Ceilings, *, rounds: int) -> dict[str, Any]:
    """Check and time one case. Nothing is timed if our result is wrong; an alternative that fails is left out."""
    contenders: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, run_once in {"saelab": case.ours, **case.alternatives}.items():
        tolerance = case.tolerance if name == "saelab" else max(ALTERNATIVE, case.tolerance)
        try:
            errors[name] = checked(case, run_once)
        except torch.OutOfMemoryError:
            notes[name] = OUT_OF_MEMORY
            _release(device)
        except Exception as error:  # a check that breaks has failed: the row says how, and the others go on
            notes[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        else:
            if errors[name] <= tolerance:
                contenders[name] = run_once
            else:
                notes[name] = f"wrong: error {errors[name]:.1e}, at most {tolerance:.0e} is allowed"
    if "saelab" not in contenders:
        return _refused(case.op, case.what, shape, notes["saelab"])
    timers = {name: timer(run_once, device) for name, run_once in contenders.items()}
    try:
        timings = side_by_side(timers, rounds=rounds)
    except torch.OutOfMemoryError:
        return _refused(case.op, case.what, shape, OUT_OF_MEMORY)
    numbers = {
        name: {
            **timing._asdict(),
            "peak_bytes": peak_bytes(contenders[name], device),
            "over_floor": round(timing.median_ms / case.floor.ms, 2) if case.floor.ms else None,
            "error": errors[name],
        }
        for name, timing in timings.items()
    }
    for name, values in numbers.items():
        print(f"{shape}  {case.op:17} {case.what:34} {name:34} {values['median_ms']:10.3f} ms")
    for name, note in notes.items():
        print(f"{shape}  {case.op:17} {case.what:34} {name:34} not timed: {note}")
    return {
        "op": case.op,
        "what": case.what,
        "shape": shape._asdict(),
        "ceilings": ceilings._asdict(),
        "floor_ms": round(case.floor.ms, 4),
        "floor_terms_ms": {name: round(ms, 4) for name, ms in case.floor.terms.items()},
        "contenders": numbers,
        "not_timed": notes,
    }


def failed(row: dict[str, Any]) -> bool:
    """Whether our own result was wrong or broke."""
    return row["not_timed"].get("saelab", OUT_OF_TIME) not in (OUT_OF_MEMORY, OUT_OF_TIME)


def checked(case: Case, run_once: Callable[[], Any]) -> float:
    """Error of one run against the reference."""
    case.reset()
    return case.error(run_once())


def _refused(op: str, what: str, shape: Shape, reason: str) -> dict[str, Any]:
    print(f"{shape}  {op:17} {what:34} no speed: {reason}")
    return {"op": op, "what": what, "shape": shape._asdict(), "contenders": {}, "not_timed": {"saelab": reason}}


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
