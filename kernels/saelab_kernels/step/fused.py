"""The training step on a GPU: one program for each feature holds a row from its gradient to the new weight.

    g_dec = sum_p acts[p] recon_grad[tokens[p]] + extra,  g_enc = sum_p pre_grad[p] centred[tokens[p]] + extra
    g_dec -= (g_dec . W_dec[f]) W_dec[f]                                     unit_norm
    g *= min(1, clip_norm / |g|)                                             clip_norm
    Adam on W_dec[f], W_enc[f], b_enc[f], then W_dec[f] /= |W_dec[f]|        unit_norm

The gradient of a matrix is never in memory: a step reads and writes weights and moments once, 24 bytes a parameter, and
gathers the rows of ``recon_grad`` and ``centred``. The norms along a row need all of it, so a row is padded to a power
of two and spread over as many warps as keep it in 16 registers of each thread. Features with more than SEGMENT pairs
find their pieces already added (saelab_kernels.grads.fused). Clipping needs the norm of the whole gradient before the
first weight may change: the same kernel runs twice, first without the update.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.decode.fused import add_rows
from saelab_kernels.grads import fused as grads
from saelab_kernels.grads.fused import add_segments
from saelab_kernels.step import reference
from saelab_kernels.step.types import AdamSettings, Layer, RowGrads, SparseGrads

ROWS = {True: 4, False: 2}  # pairs in flight when updating (32 KB for a program at d = 4096 in bfloat16) and when not,
#                             where ptxas wants half the registers and would spill with four
_ELEMENTS = 16  # of a row for each thread
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _adam(weight, mean, square, grad, mean_weight, square_decay, square_weight, correction, eps, step_size):
    """torch.optim.Adam's update, rounded as there (lerp changes its form at one half): weight, mean, square."""
    change = grad - mean
    mean = tl.where(mean_weight < 0.5, mean + mean_weight * change, grad - (1 - mean_weight) * change)
    square = square * square_decay + square_weight * grad * grad
    denominator = tl.div_rn(tl.sqrt_rn(square), correction) + eps
    return weight - step_size * tl.div_rn(mean, denominator), mean, square


@triton.jit
def _gradient(
    starts_ptr, tokens_ptr, values_ptr, vectors_ptr, parts_ptr, slots_ptr, extra_ptr, feature, columns, d,
    EXTRA: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The feature's row [WIDTH] of a matrix's gradient."""
    low, high = tl.load(starts_ptr + feature), tl.load(starts_ptr + feature + 1)
    grad = tl.zeros((WIDTH,), tl.float32)
    if high - low > SEGMENT:
        grad = add_segments(grad, parts_ptr, low, high, columns, d, SEGMENT)
    else:
        grad = add_rows(grad, values_ptr, tokens_ptr, vectors_ptr, low, high, columns, d, ROWS)
    if EXTRA:
        slot = tl.load(slots_ptr + feature).to(tl.int64)  # -1: none
        listed = (columns < d) & (slot >= 0)
        grad += tl.load(extra_ptr + slot * d + columns, mask=listed, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _step(
    starts_ptr, tokens_ptr, slots_ptr,
    acts_ptr, recon_grad_ptr, dec_parts_ptr, extra_dec_ptr, pre_ptr, centred_ptr, enc_parts_ptr, extra_enc_ptr,
    W_dec_ptr, W_dec_mean_ptr, W_dec_square_ptr, W_dec_copy_ptr,
    W_enc_ptr, W_enc_mean_ptr, W_enc_square_ptr, W_enc_copy_ptr,
    b_enc_ptr, b_enc_mean_ptr, b_enc_square_ptr, b_enc_grad_ptr, norms_ptr, scale_ptr,
    d, mean_weight, square_decay, square_weight, correction, eps, step_size,
    UPDATE: tl.constexpr, CLIP: tl.constexpr, EXTRA: tl.constexpr, UNIT_NORM: tl.constexpr, COPY: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < d
    at = feature * d + columns
    scale = 1.0
    if CLIP:
        scale = tl.load(scale_ptr)

    # one matrix after the other: both gradients at once would leave no registers for rows in flight
    grad = _gradient(
        starts_ptr, tokens_ptr, acts_ptr, recon_grad_ptr, dec_parts_ptr, slots_ptr, extra_dec_ptr, feature, columns, d,
        EXTRA, SEGMENT, ROWS, WIDTH,
    )  # fmt: skip
    weight = tl.load(W_dec_ptr + at, mask=inside, other=0.0)
    if UNIT_NORM:
        grad -= tl.sum(grad * weight, axis=0) * weight
    norm = tl.sum(grad * grad, axis=0)
    if UPDATE:
        mean = tl.load(W_dec_mean_ptr + at, mask=inside, other=0.0)
        square = tl.load(W_dec_square_ptr + at, mask=inside, other=0.0)
        weight, mean, square = _adam(
            weight, mean, square, grad * scale, mean_weight, square_decay, square_weight, correction, eps, step_size
        )
        if UNIT_NORM:
            weight = tl.where(inside, weight, 0.0)  # beyond the row 0 / 0 where eps is 0
            weight = tl.div_rn(weight, tl.maximum(tl.sqrt_rn(tl.sum(weight * weight, axis=0)), _TINY))
        tl.store(W_dec_ptr + at, weight, mask=inside)
        tl.store(W_dec_mean_ptr + at, mean, mask=inside)
        tl.store(W_dec_square_ptr + at, square, mask=inside)
        if COPY:
            tl.store(W_dec_copy_ptr + at, weight.to(W_dec_copy_ptr.dtype.element_ty), mask=inside)

    grad = _gradient(
        starts_ptr, tokens_ptr, pre_ptr, centred_ptr, enc_parts_ptr, slots_ptr, extra_enc_ptr, feature, columns, d,
        EXTRA, SEGMENT, ROWS, WIDTH,
    )  # fmt: skip
    norm += tl.sum(grad * grad, axis=0)
    if UPDATE:
        mean = tl.load(W_enc_mean_ptr + at, mask=inside, other=0.0)
        square = tl.load(W_enc_square_ptr + at, mask=inside, other=0.0)
        weight, mean, square = _adam(
            tl.load(W_enc_ptr + at, mask=inside, other=0.0), mean, square, grad * scale,
            mean_weight, square_decay, square_weight, correction, eps, step_size,
        )  # fmt: skip
        tl.store(W_enc_ptr + at, weight, mask=inside)
        tl.store(W_enc_mean_ptr + at, mean, mask=inside)
        tl.store(W_enc_square_ptr + at, square, mask=inside)
        if COPY:
            tl.store(W_enc_copy_ptr + at, weight.to(W_enc_copy_ptr.dtype.element_ty), mask=inside)

        bias, bias_mean, bias_square = _adam(
            tl.load(b_enc_ptr + feature), tl.load(b_enc_mean_ptr + feature), tl.load(b_enc_square_ptr + feature),
            tl.load(b_enc_grad_ptr + feature) * scale,
            mean_weight, square_decay, square_weight, correction, eps, step_size,
        )  # fmt: skip
        tl.store(b_enc_ptr + feature, bias)
        tl.store(b_enc_mean_ptr + feature, bias_mean)
        tl.store(b_enc_square_ptr + feature, bias_square)
    if not CLIP:
        tl.store(norms_ptr + feature, norm)


def feature_step(
    layer: Layer,
    means: Layer,
    squares: Layer,
    sparse: SparseGrads,
    adam: AdamSettings,
    *,
    copies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As the reference; ``copies`` [F, d] of W_enc and W_dec in another dtype, bfloat16 as a rule, are rewritten too.

    Layer and moments are float32; other precisions, which are for checks, take the reference.

    Raises:
        ValueError: a weight, moment or copy that is not contiguous, so that its features are no rows in memory.
    """
    if layer.W_enc.dtype != torch.float32:
        norm = reference.feature_step(layer, means, squares, sparse, adam)
        for copy, weight in zip(copies or (), layer[:2], strict=False):
            copy.copy_(weight)
        return norm
    for tensor in (*layer, *means, *squares, *(copies or ())):
        if not tensor.is_contiguous():
            raise ValueError(f"feature_step needs contiguous tensors, got shape {list(tensor.shape)} with strides "
                             f"{tensor.stride()}; keep weights feature-major")  # fmt: skip
    launch = _Launch(layer, means, squares, sparse, adam, copies)
    biases = sparse.b_enc.float().square().sum() + sparse.b_dec.float().square().sum()
    b_dec_grad = sparse.b_dec.float()
    if adam.clip_norm is None:
        norm = (launch.run(update=True, scale=None).sum() + biases).sqrt()
    else:
        norm = (launch.run(update=False, scale=None).sum() + biases).sqrt()
        scale = (adam.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        launch.run(update=True, scale=scale)
        b_dec_grad = b_dec_grad * scale
    reference.adam_(layer.b_dec, means.b_dec, squares.b_dec, b_dec_grad, adam)
    return norm


class _Launch:
    """The arguments of the kernel, prepared once for both of its runs."""

    def __init__(
        self,
        layer: Layer,
        means: Layer,
        squares: Layer,
        sparse: SparseGrads,
        adam: AdamSettings,
        copies: tuple[Tensor, Tensor] | None,
    ) -> None:
        n_features, d = layer.W_dec.shape
        order = sparse.pairs.order
        acts, pre = (values.float().flatten()[order] for values in (sparse.top_acts, sparse.pre_grad))
        recon_grad, centred = sparse.recon_grad.contiguous(), sparse.centred.contiguous()
        parts = grads.segment_sums(sparse.pairs, acts, recon_grad, pre, centred)
        self.norms = layer.b_enc.new_empty(n_features)
        W_enc_copy, W_dec_copy = copies if copies is not None else (layer.W_enc, layer.W_dec)
        slots, extra_dec, extra_enc = _extra_rows(sparse.extra, n_features, layer.W_dec)
        self.tensors = (
            sparse.pairs.starts, sparse.pairs.tokens, slots,
            acts, recon_grad, parts.first, extra_dec, pre, centred, parts.second, extra_enc,
            layer.W_dec, means.W_dec, squares.W_dec, W_dec_copy, layer.W_enc, means.W_enc, squares.W_enc, W_enc_copy,
            layer.b_enc, means.b_enc, squares.b_enc, sparse.b_enc.float().contiguous(), self.norms,
        )  # fmt: skip
        beta1, beta2 = adam.betas
        self.numbers = (
            1 - beta1, beta2, 1 - beta2, (1 - beta2**adam.step) ** 0.5, adam.eps, adam.lr / (1 - beta1**adam.step)
        )  # fmt: skip
        self.constants = {"EXTRA": sparse.extra is not None, "UNIT_NORM": adam.unit_norm, "COPY": copies is not None}
        self.shape = n_features, d

    def run(self, *, update: bool, scale: Tensor | None) -> Tensor:
        """Squared norm [F] of each feature's gradient, which a clipped update (``scale``) leaves as it was."""
        n_features, d = self.shape
        if n_features:
            width, warps = _row(d)
            _step[n_features,](
                *self.tensors, self.norms if scale is None else scale, d, *self.numbers,
                UPDATE=update, CLIP=scale is not None, **self.constants,
                SEGMENT=grads.SEGMENT, ROWS=ROWS[update], WIDTH=width, num_warps=warps,
            )  # fmt: skip
        return self.norms


def _extra_rows(extra: RowGrads | None, n_features: int, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each feature its row of ``extra`` or -1 (int32 [F]), and the rows for W_dec and W_enc."""
    if extra is None:
        return unused, unused, unused
    slots = torch.full((n_features,), -1, dtype=torch.int32, device=extra.rows.device)
    slots[extra.rows] = torch.arange(len(extra.rows), dtype=torch.int32, device=extra.rows.device)
    return slots, extra.W_dec.contiguous(), extra.W_enc.contiguous()


def _row(d: int) -> tuple[int, int]:
    """Padded length of a row and the number of warps that hold it."""
    width = triton.next_power_of_2(d)
    return width, min(16, max(1, width // (32 * _ELEMENTS)))


def variants() -> list[Variant]:
    """The ways in which the kernel is launched that need most, for the widths of models up to d = 8192."""
    found = []
    every, plain = (True, False, True, True, True), (True, False, False, True, False)
    clipped, norms = (True, True, True, True, True), (False, False, True, True, False)
    cases: list[tuple[str, int, tuple[str, ...], tuple[bool, ...]]]
    cases = [("bf16", 4096, (), every), ("bf16", 4096, ("d",), plain), ("bf16", 512, ("d",), every)]
    cases += [(dtype, 4096, ("d",), run) for dtype in ("bf16", "fp32") for run in (every, clipped, norms)]
    cases += [(dtype, 8192, ("d",), run) for dtype in ("bf16", "fp32") for run in (every, norms)]
    for dtype, width, divisible, run in cases:
        update, clip, extra, unit_norm, copy = run  # as the constants below
        other = {
            "starts_ptr": "*i64",
            "tokens_ptr": "*i64",
            "slots_ptr": "*i32" if extra else "*fp32",
            "recon_grad_ptr": f"*{dtype}",
            "centred_ptr": f"*{dtype}",
            "W_dec_copy_ptr": "*bf16" if copy else "*fp32",
            "W_enc_copy_ptr": "*bf16" if copy else "*fp32",
            "d": "i32",
        }
        constants = {"UPDATE": update, "CLIP": clip, "EXTRA": extra, "UNIT_NORM": unit_norm, "COPY": copy,
                     "SEGMENT": grads.SEGMENT, "ROWS": ROWS[update], "WIDTH": width}  # fmt: skip
        arguments = {
            name: other.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
            for name in _step.arg_names
            if name not in constants
        }
        found.append(Variant(_step, arguments, constants, divisible, {"num_warps": _row(width)[1]}))
    return found
