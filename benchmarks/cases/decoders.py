"""Decoding, the loss with its gradient for the activations, and dot products with chosen rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Case
from benchmarks.cases.inputs import Inputs, exact_sums, packed
from benchmarks.floors import Floor, Floors
from benchmarks.gates import rms_error


def sparse_decode(inputs: Inputs, floors: Floors) -> list[Case]:
    """Against a dense product with scattered activations, and embedding_bag."""
    from saelab_kernels import sparse_decode as ours
    from saelab_kernels.decode import reference

    W, (acts, indices) = inputs.W_dec, inputs.top
    at, rows = packed(indices[inputs.tokens], W)
    expected = reference.sparse_decode(acts[inputs.tokens].double(), at, rows, None)

    def error(result: Any) -> float:
        return rms_error(result[inputs.tokens], expected)

    forward = Case(
        "sparse_decode",
        "forward",
        lambda: ours(acts, indices, W),
        {"dense product": lambda: _dense(acts, indices, W), "embedding_bag": lambda: _bag(acts, indices, W)},
        error,
        floors.decode(),
        tolerance=4e-3 if inputs.dtype == torch.bfloat16 else 1e-5,
    )
    return [forward, _decode_backward(inputs, floors)]


def _decode_backward(inputs: Inputs, floors: Floors) -> Case:
    from saelab_kernels import sparse_decode as ours

    acts, indices = inputs.top[0].detach().requires_grad_(), inputs.top[1]
    W = inputs.W_dec.detach().requires_grad_()

    def gradients(recon: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(recon, (acts, W), inputs.grad.to(recon.dtype))

    expected = exact_sums(indices, acts.detach(), inputs.grad, inputs.features)

    def error(result: Any) -> float:
        acts_grad, W_grad = result
        at, rows = packed(indices[inputs.tokens], inputs.W_dec)
        dots = (inputs.grad[inputs.tokens].double() @ rows.T).gather(1, at)
        return max(rms_error(W_grad[inputs.features].float(), expected), rms_error(acts_grad[inputs.tokens], dots))

    return Case(
        "sparse_decode",
        "forward + backward",
        lambda: gradients(ours(acts, indices, W)),
        {
            "dense product, autograd": lambda: gradients(_dense(acts, indices, W)),
            "embedding_bag, autograd": lambda: gradients(_bag(acts, indices, W)),
        },
        error,
        floors.decode() + floors.gather("rows of W_dec again") + floors.pairs() + floors.feature_grad(),
        tolerance=4e-3 if inputs.dtype == torch.bfloat16 else 1e-5,
    )


def decode_loss(inputs: Inputs, floors: Floors) -> list[Case]:
    """Against embedding_bag and its autograd, and the dense product and its."""
    from saelab_kernels import decode_loss as ours
    from saelab_kernels.decode_loss import reference

    (acts, indices), W, b, target = inputs.top, inputs.W_dec, inputs.b_dec, inputs.x
    tokens = inputs.tokens
    at, rows = packed(indices[tokens], W)
    sampled = (acts[tokens].double(), at, rows, b.double(), target[tokens].double())
    loss, errors, acts_grad = reference.decode_loss(*sampled, (len(rows),))

    def error(result: Any) -> float:
        found = [part[tokens] for part in result]
        wanted = (loss, errors[0], acts_grad)
        return max(rms_error(part, whole) for part, whole in zip(found, wanted, strict=True))

    def in_torch(decode: Any) -> tuple[Tensor, ...]:
        leaf = acts.detach().requires_grad_()
        residual = decode(leaf, indices, W).float() + b - target.float()
        per_token = residual.pow(2).sum(1)
        return per_token.detach(), residual.detach(), *torch.autograd.grad(per_token.sum(), leaf)

    return [
        Case(
            "decode_loss",
            "forward + backward",
            lambda: ours(acts, indices, W, b, target),
            {
                "dense product, autograd": lambda: in_torch(_dense),
                "embedding_bag, autograd": lambda: in_torch(_bag),
            },
            error,
            floors.decode() + Floor({"target": floors.tokens_ms()}),
            tolerance=4e-3 if inputs.dtype == torch.bfloat16 else 1e-5,
        )
    ]


def sampled_dot(inputs: Inputs, floors: Floors) -> list[Case]:
    """The gradient of the activations: against every public way of torch that we know."""
    from saelab_kernels import sampled_dot as ours
    from saelab_kernels.dots import reference

    vectors, W, indices = inputs.grad, inputs.W_dec, inputs.top[1]
    at, rows = packed(indices[inputs.tokens], W)
    expected = reference.sampled_dot(vectors[inputs.tokens].double(), rows, at)
    n_rows = max(1, 2**24 // (inputs.shape.k * inputs.shape.width))
    blocks = [slice(start, start + n_rows) for start in range(0, inputs.shape.tokens, n_rows)]

    def by_bag() -> Tensor:
        weights = torch.ones(indices.shape, device=inputs.device, dtype=W.dtype, requires_grad=True)
        return torch.autograd.grad(_bag(weights, indices, W), weights, vectors)[0]

    def by_bmm() -> Tensor:
        return torch.cat([torch.bmm(W[indices[block]], vectors[block, :, None])[:, :, 0] for block in blocks])

    def by_sum() -> Tensor:
        return torch.cat([(W[indices[block]] * vectors[block, None]).sum(2) for block in blocks])

    return [
        Case(
            "sampled_dot",
            "forward",
            lambda: ours(vectors, W, indices),
            {
                "dense product + gather": lambda: (vectors @ W.T).gather(1, indices),
                "embedding_bag's autograd": by_bag,
                "gathered rows, bmm": by_bmm,
                "gathered rows, product and sum": by_sum,
            },
            lambda result: rms_error(result[inputs.tokens].float(), expected),
            floors.gather("rows"),
        )
    ]


def _dense(acts: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    dense = acts.new_zeros(len(acts), len(W), dtype=W.dtype).scatter(1, indices, acts.to(W.dtype))
    return dense @ W


def _bag(acts: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return F.embedding_bag(indices, W, mode="sum", per_sample_weights=acts.to(W.dtype))
