"""Log-probabilities of a language model's tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Case
from benchmarks.cases.inputs import Inputs
from benchmarks.floors import Floors
from benchmarks.gates import rms_error


class Vocabulary(NamedTuple):
    """Tokens of a batch, and entries of the vocabulary that they are compared with."""

    tokens: int
    entries: int


def vocabulary(inputs: Inputs) -> Vocabulary:
    """A quarter of the tokens on a CPU, where 49,152 entries (SmolLM2's) of them take a second; 131,072 on a GPU."""
    n_tokens = inputs.shape.tokens
    if n_tokens < 256:
        return Vocabulary(n_tokens, 512)
    return Vocabulary(n_tokens, 131072) if inputs.device == "cuda" else Vocabulary(n_tokens // 4, 49152)


def token_logps(inputs: Inputs, floors: Floors) -> list[Case]:
    """Against cross_entropy of all logits, in float32 as trainers hold them."""
    from saelab_kernels.logps import reference
    from saelab_kernels.logps import token_logps as ours

    size = vocabulary(inputs)
    hidden, W_U = inputs.x[: size.tokens], inputs.normal(size.entries, inputs.shape.width) / inputs.shape.width**0.5
    targets = torch.randint(size.entries, (size.tokens,), generator=inputs.generator, device=inputs.device)
    grad = inputs.normal(size.tokens).float()
    sample = torch.linspace(0, size.tokens - 1, min(8, size.tokens), device=inputs.device).long()
    leaf = hidden[sample].double().requires_grad_()
    expected = reference.token_logps(leaf, W_U.double(), targets[sample])
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad[sample].double())
    expected = expected.detach()

    def in_torch(states: Tensor, weights: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(states, weights).float(), targets, reduction="none")

    def both(logps_of: Any) -> tuple[Tensor, Tensor, Tensor]:
        states, weights = hidden.detach().requires_grad_(), W_U.detach().requires_grad_()
        logps = logps_of(states, weights)
        return logps.detach(), *torch.autograd.grad(logps, (states, weights), grad.to(logps.dtype))

    def forward_error(logps: Tensor) -> float:
        return rms_error(logps[sample], expected)

    def error(result: Any) -> float:
        return max(forward_error(result[0]), rms_error(result[1][sample].float(), expected_grad))

    low = inputs.dtype == torch.bfloat16
    name = f"{size.entries:,} entries"
    return [
        Case(
            "token_logps",
            f"forward, {name}",
            lambda: ours(hidden, W_U, targets),
            {"linear + cross_entropy": lambda: in_torch(hidden, W_U)},
            forward_error,
            floors.logps(*size, n_products=1),
            tolerance=2e-3 if low else 1e-5,
        ),
        Case(
            "token_logps",
            f"forward + backward, {name}",
            lambda: both(lambda states, weights: ours(states, weights, targets)),
            {"linear + cross_entropy, autograd": lambda: both(in_torch)},
            error,
            floors.logps(*size, n_products=4),
            tolerance=1e-2 if low else 1e-5,
        ),
    ]
