"""What the kernel tests share: repeatable random numbers, the device, poisoned memory, one measure of error.

Tests marked ``fused`` run Triton kernels: compiled on a GPU, or interpreted on the CPU in a process that was started
with TRITON_INTERPRET=1, because Triton reads it when it is imported (``make test-kernels``).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saelab_kernels
from saelab_kernels import compiled

#: Largest relative RMS error of a fused result against the reference in float64, by the dtype that it is stored in.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

if importlib.util.find_spec("hypothesis") is None:  # a machine with a GPU has torch, triton, numpy and pytest alone
    here = Path(__file__).parent
    collect_ignore = [path.name for path in here.glob("test_*.py") if "from hypothesis" in path.read_text("utf-8")]

#: What fresh integers hold; int8 and bool included, it is nobody's default.
INTEGER_POISON = 77


def _leave_kernels_unwrapped() -> None:
    """Keep the import hook that checks annotations off modules with kernels, whose functions Triton needs unwrapped.

    A wrapped one has the globals of the wrapper, where the compiler finds no ``tl``.
    """
    package = Path(saelab_kernels.__file__).parent
    with_kernels = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in package.rglob("*.py")
        if "@triton.jit" in path.read_text("utf-8")
    }
    for finder in sys.meta_path:
        if instruments := getattr(finder, "should_instrument", None):
            finder.should_instrument = lambda name, asked=instruments: name not in with_kernels and asked(name)


_leave_kernels_unwrapped()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests marked ``gpu`` need a GPU that computes; those marked ``fused`` take that path, in poisoned memory."""
    if request.node.get_closest_marker("gpu") and (compiled.INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device and kernels that are compiled (make test-gpu)")
    if request.node.get_closest_marker("fused"):
        request.getfixturevalue("device")
        request.getfixturevalue("poisoned")
        monkeypatch.setenv("SAELAB_KERNELS", "fused")


@pytest.fixture
def device() -> str:
    """Where Triton kernels run in this process: interpreted ones on the CPU, whatever else the machine has."""
    if compiled.INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return pytest.skip("there is no CUDA device, and Triton kernels are interpreted only by `make test-kernels`")


@pytest.fixture
def tolerance() -> dict[torch.dtype, float]:
    return TOLERANCES


@pytest.fixture
def relative_rms() -> Callable[[Tensor, Tensor], float]:
    """``relative_rms(actual, expected)``: RMS of the difference over RMS of ``expected``, in float64 on the CPU.

    NaN and infinities must stand at the same places, and count as equal there; elsewhere they make the result NaN.
    """

    def relative_rms(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape, f"{list(actual.shape)} is not the shape {list(expected.shape)}"
        actual, expected = (tensor.detach().cpu().double() for tensor in (actual, expected))
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        difference = (actual - expected).masked_fill(same, 0.0)
        scale = expected[expected.isfinite()].pow(2).sum()
        if not difference.any():  # also where there is nothing to compare, or all of it is 0
            return 0.0
        return (difference.pow(2).sum() / scale).sqrt().item()

    return relative_rms


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty and its kin arrives full of NaN, or of ``INTEGER_POISON``: what is not written shows."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocated(*args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else INTEGER_POISON)
        return tensor

    return allocated
