"""Encoders: the k largest of each token, the k N largest of a batch, all above a threshold."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Case
from benchmarks.cases.inputs import Inputs, exact_pre_acts, exact_sums
from benchmarks.floors import Floors
from benchmarks.gates import rms_error


def encode_topk(inputs: Inputs, floors: Floors) -> list[Case]:
    """Against a product and torch.topk over all features, in both precisions; and torch.topk alone, for the record."""
    from saelab_kernels import encode_topk as ours
    from saelab_kernels.encode import reference

    x, W, b, k = inputs.x, inputs.W_enc, inputs.b_enc, inputs.shape.k
    exact_acts = exact_pre_acts(x[inputs.tokens], W, b)
    expected = exact_acts.gather(1, reference.largest(exact_acts, k)).relu()

    def error(result: Any) -> float:
        acts, indices = (part[inputs.tokens] for part in result[:2])
        at_indices = exact_acts.gather(1, indices).relu()
        return max(rms_error(acts, expected), rms_error(acts, at_indices))

    def in_torch(precision: torch.dtype) -> tuple[Tensor, Tensor]:
        top = F.linear(x.to(precision), W.to(precision), b.to(precision)).topk(k, dim=1)
        return top.values.float().relu(), top.indices

    forward = Case(
        "encode_topk",
        "forward",
        lambda: ours(x, W, b, k),
        {
            "linear + topk float32": lambda: in_torch(torch.float32),
            "linear + topk bfloat16": lambda: in_torch(torch.bfloat16),
        },
        error,
        floors.encode(),
    )
    return [forward, _topk_backward(inputs, floors, error)]


def _topk_backward(inputs: Inputs, floors: Floors, forward_error: Any) -> Case:
    from saelab_kernels import encode_topk as ours

    W, b = inputs.W_enc.detach().requires_grad_(), inputs.b_enc.detach().requires_grad_()

    def gradients(acts: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        return acts.detach(), indices, *torch.autograd.grad(acts, (W, b), inputs.acts_grad.to(acts.dtype))

    def in_torch() -> tuple[Tensor, ...]:
        top = F.linear(inputs.x, W, b.to(W.dtype)).topk(inputs.shape.k, dim=1)
        return gradients(top.values.relu(), top.indices)

    def error(result: Any) -> float:
        acts, indices, W_grad, _ = result
        coefficients = inputs.acts_grad * (acts > 0)
        expected = exact_sums(indices, coefficients, inputs.x, inputs.features)
        return max(forward_error((acts.float(), indices)), rms_error(W_grad[inputs.features].float(), expected))

    name = str(inputs.dtype).removeprefix("torch.")
    return Case(
        "encode_topk",
        "forward + backward",
        lambda: gradients(*ours(inputs.x, W, b, inputs.shape.k)),
        {f"linear + topk {name}, autograd": in_torch},
        error,
        floors.encode() + floors.pairs() + floors.feature_grad(),
        # a gradient of 16-bit weights is rounded to their precision
        tolerance=4e-3 if inputs.dtype == torch.bfloat16 else 1e-5,
    )


def encode_batchtopk(inputs: Inputs, floors: Floors) -> list[Case]:
    """Against flatten().topk(k N), which is how it is defined."""
    from saelab_kernels import encode_batchtopk as ours

    x, W, b, k = inputs.x, inputs.W_enc, inputs.b_enc, inputs.shape.k
    n_kept = k * inputs.shape.tokens
    exact_acts = exact_pre_acts(x[inputs.tokens], W, b)

    def in_torch(precision: torch.dtype) -> tuple[Tensor, Tensor]:
        acts = F.linear(x.to(precision), W.to(precision), b.to(precision)).relu()
        kept = torch.zeros_like(acts.flatten())
        top = acts.flatten().topk(n_kept, sorted=False)
        return kept.scatter_(0, top.indices, top.values).view_as(acts), top.values.min()

    def error(result: Any) -> float:
        if isinstance(result, tuple) and len(result) == 2:  # torch's: dense activations, the smallest kept
            dense, smallest = result
            found, n_found = dense[inputs.tokens], n_kept
        else:
            found, n_found, smallest = _dense_rows(result, inputs), len(result.acts), result.acts.min()
        expected = exact_acts.masked_fill(exact_acts < float(smallest) * (1 - 1e-6), 0).relu()
        too_few = n_found < n_kept or n_found > n_kept + max(8, n_kept // 1000)
        return math.inf if too_few else rms_error(found, expected)

    return [
        Case(
            "encode_batchtopk",
            "forward",
            lambda: ours(x, W, b, k),
            {
                "linear + flatten().topk float32": lambda: in_torch(torch.float32),
                "linear + flatten().topk bfloat16": lambda: in_torch(torch.bfloat16),
            },
            error,
            floors.encode(),
        )
    ]


def encode_jumprelu(inputs: Inputs, floors: Floors) -> list[Case]:
    """Against a product, a comparison and nonzero; the thresholds let about k features a token through."""
    from saelab_kernels import encode_jumprelu as ours

    x, W, b = inputs.x, inputs.W_enc, inputs.b_enc
    threshold = inputs.top[0][:, -1].median().clamp_min(1e-3).expand(len(W)).contiguous()
    exact_acts = exact_pre_acts(x[inputs.tokens], W, b)
    expected = exact_acts.masked_fill(exact_acts <= threshold.double(), 0)

    def in_torch(precision: torch.dtype) -> Tensor:
        acts = F.linear(x.to(precision), W.to(precision), b.to(precision))
        acts = acts.masked_fill(acts <= threshold.to(precision), 0)
        acts.nonzero()  # the sparse form, which ours is
        return acts

    def error(result: Any) -> float:
        found = result[inputs.tokens] if isinstance(result, Tensor) else _dense_rows(result.active, inputs)
        # a pre-activation within rounding of the threshold may fall on either side
        close = (exact_acts - threshold.double()).abs() < 1e-5 * exact_acts.abs().max()
        return rms_error(found.double().masked_fill(close, 0), expected.masked_fill(close, 0))

    return [
        Case(
            "encode_jumprelu",
            "forward",
            lambda: ours(x, W, b, threshold),
            {
                "linear + nonzero float32": lambda: in_torch(torch.float32),
                "linear + nonzero bfloat16": lambda: in_torch(torch.bfloat16),
            },
            error,
            floors.encode(),
        )
    ]


def _dense_rows(active: Any, inputs: Inputs) -> Tensor:
    """The sampled tokens of a ragged batch as dense rows."""
    rows = []
    for token in inputs.tokens.tolist():
        start, stop = active.offsets[token : token + 2].tolist()
        row = torch.zeros(inputs.shape.features, device=inputs.device, dtype=active.acts.dtype)
        rows.append(row.index_put_((active.features[start:stop],), active.acts[start:stop]))
    return torch.stack(rows)
