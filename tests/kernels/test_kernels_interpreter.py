"""Canaries: what Triton's interpreter gets wrong, and that UPCAST gets it right. When one dies, UPCAST may go."""

from __future__ import annotations

import pytest
import torch

from saelab_kernels import compiled

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.fused
SIZE = 16


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, OPERATION: tl.constexpr, UPCAST: tl.constexpr):
    """A sum, a row sum or a matrix product of two [SIZE, SIZE] matrices."""
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    if UPCAST:
        x, y = x.to(tl.float32), y.to(tl.float32)
    if OPERATION == "add":
        out = (x + y).to(tl.float32)
    elif OPERATION == "sum":
        out = tl.sum(x, axis=1).to(tl.float32)[:, None] + tl.zeros((SIZE, SIZE), tl.float32)
    else:
        out = tl.dot(x, y)
    tl.store(out_ptr + places, out)


@triton.jit
def _copy(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out_ptr + places, tl.load(x_ptr + places).to(tl.float32))


def result(operation: str, device: str, *, upcast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes from two bfloat16 matrices, and what is right."""
    x, y = torch.randn(2, SIZE, SIZE).to(torch.bfloat16)
    out = torch.empty(SIZE, SIZE, device=device)
    _arithmetic[(1,)](x.to(device), y.to(device), out, SIZE=SIZE, OPERATION=operation, UPCAST=upcast)
    x, y = x.double(), y.double()
    right = {"add": x + y, "sum": x.sum(1, keepdim=True).expand(-1, SIZE), "dot": x @ y}[operation]
    return out, right


@pytest.mark.parametrize("operation", ["add", "sum", "dot"])
def test_with_upcast_bfloat16_arithmetic_is_right(operation, device, relative_rms):
    assert relative_rms(*result(operation, device, upcast=True)) < 1e-6


@pytest.mark.skipif(not compiled.INTERPRETED, reason="about the interpreter")
@pytest.mark.parametrize("operation", ["add", "sum", "dot"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # bit patterns taken for integers overflow
def test_without_upcast_the_interpreter_gets_bfloat16_wrong(operation, device, relative_rms):
    error = relative_rms(*result(operation, device, upcast=False))
    assert not error < 0.1, f"this Triton interprets {operation} of bfloat16 correctly: UPCAST may no longer be needed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_and_casts_are_right_without_upcast(dtype, device):
    x = torch.randn(SIZE).to(dtype).to(device)
    out = torch.empty(SIZE, device=device)
    _copy[(1,)](x, out, SIZE=SIZE)
    assert torch.equal(out, x.float())


def test_memory_that_a_kernel_does_not_write_shows(device):
    out = torch.empty(SIZE + 1, device=device)
    _copy[(1,)](torch.ones(SIZE, device=device), out, SIZE=SIZE)
    assert out.isnan().tolist() == [False] * SIZE + [True]
    assert (torch.empty(3, dtype=torch.int32, device=device) == 77).all()
    assert torch.ones(2, device=device).new_empty(3).isnan().all()
