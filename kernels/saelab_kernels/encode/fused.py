"""Encoding on a GPU: candidates by a product in 16 bits, then float32 dot products of the candidates alone.

    route A   cuBLAS some features at a time, the running largest of each chunk from L2        (encode.stream)
    route B   one Triton product whose epilogue appends what beats a sampled threshold         (encode.emit)
    both      rescored, sorted, and proven or searched again                                   (encode.settle)

So the routes give the same bits: the k largest of float32 dot products in a fixed order, ties to the lower index. A
call waits for the device once, to learn which rows (about one in a thousand) are left to search again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels import compiled
from saelab_kernels.dispatch import Choice
from saelab_kernels.dots.fused import sampled_dot
from saelab_kernels.encode import emit, reference, settle, stream
from saelab_kernels.encode.above import encode_above
from saelab_kernels.select import fused as select

__all__ = ["candidates", "encode_above", "encode_topk", "route_for"]

# The rule between the routes, in units of one product by cuBLAS (2 N F d flops at 790 TFLOP/s). What A pays beside it
# is one write and one read of N F values of 16 bits in L2, at 5.5 TB/s. B pays for a product in Triton, and for a
# sample of features. Both shares are estimates: measure them on the device at hand, they decide the route alone.
L2_PASS = 4 / 5.5e12 * 790e12 / 2  # divided by d: 0.37 of a product at 768, 0.12 at 2304, 0.07 at 4096
TRITON_SHARE = 0.8  # of cuBLAS' speed, with the epilogue

# Route B's threshold is the SAMPLE_RANK-th largest of a sample of features, its size such that AIM * keep features are
# expected above. That number is then about gamma-distributed with shape 16: less than a quarter of AIM * keep in 5 rows
# of a million, more than three times as much in 3 of 10^8.
SAMPLE_RANK = 16
AIM = 4
ROOM = 12

_FLOAT32_VALUES = 2**27  # of pre-activations or weights at a time, where rows are searched again
_EXHAUSTIVE_PAIRS = 2**24


def route_for(n_tokens: int, d: int, n_features: int, k: int, dtype: torch.dtype) -> Choice:
    """ "A" or "B" for x [n_tokens, d], W [n_features, d], sought in ``dtype``: what the arithmetic above favours."""
    keep = candidates(k, n_features)
    if dtype == torch.float32:
        return Choice("A", "a float32 product is left to cuBLAS: Triton's uses no tensor cores")
    if 2 * AIM * keep > n_features:
        return Choice("A", f"{AIM} times {keep} candidates would be most of {n_features} features")
    tiles = -(-n_tokens // emit.WIDE.rows) * -(-n_features // emit.WIDE.columns)
    if tiles < 1000:
        return Choice("A", f"{tiles} tiles of a fused product would not fill the device evenly")
    a, b = 1 + L2_PASS / d, 1 / TRITON_SHARE + _sample_size(keep, n_features) / n_features
    name = "A" if a <= b else "B"
    return Choice(name, f"expected times of one product: {a:.2f} in chunks, {b:.2f} fused")


def candidates(k: int, n_features: int) -> int:
    """How many features are rescored: half of k more, measured in kernels/README.md."""
    return min(n_features, k + max(8, k // 2))


def encode_topk(
    x: Tensor, W: Tensor, b: Tensor, k: int, *, route: str | None = None, W_low: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [N, d], W [F, d], b [F] -> float32 [N, k] the k largest pre-activations, before any ReLU, and their indices.

    ``route`` overrides the rule. ``W_low`` is W in the dtype in which candidates are sought, for callers that keep such
    a copy; else 16 bits are taken as they are and float32 is sought in bfloat16. Where k is above 682 the pre-
    activations are all written out, in float32.

    Raises:
        ValueError: ``route`` is neither "A" nor "B".
    """
    if route not in (None, "A", "B"):
        raise ValueError(f'route must be "A", "B" or None, got {route!r}')
    x, W, b = x.detach(), W.detach(), b.detach().float()
    keep = candidates(k, len(W))
    if keep > select.MAX_K:
        return _written_out(x, W, b, k)
    W_low = W.to(stream.search_dtype(W)) if W_low is None else W_low.detach()
    name = route or route_for(min(len(x), stream.ROWS), x.shape[1], len(W), k, W_low.dtype).name
    settled = [_block(part, W, b, k, W_low, name, strict=route == "B") for part in x.split(stream.ROWS)]
    values, indices, proven = (torch.cat(parts) for parts in zip(*settled, strict=True))
    left = (~proven).nonzero().flatten()  # the one wait for the device
    for rows in left.split(max(1, _FLOAT32_VALUES // len(W))):
        values[rows], indices[rows] = _again(x[rows], W, b, k)
    return values, indices


def _block(
    x: Tensor, W: Tensor, b: Tensor, k: int, W_low: Tensor, name: str, *, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and whether they are proven, for at most ``stream.ROWS`` tokens."""
    keep, x_low = candidates(k, len(W)), x.to(W_low.dtype)
    count, pair = (
        stream.running_largest(x_low, W_low, b, keep)
        if name == "A"
        else compiled.or_else(
            "encode_emit",
            lambda: _emitted(x_low, W_low, b, keep),
            lambda: stream.running_largest(x_low, W_low, b, keep),
            strict=strict,
        )
    )
    found = select.select_topk(pair, count, keep)
    settled = settle.settle(x, W, b, found.values, found.indices, k)
    held = (count >= keep) & (count <= pair.shape[1])
    return settled.values, settled.indices, settled.proven & held


def _emitted(x: Tensor, W: Tensor, b: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Route B's candidates: count [N], which the caller must compare with the room, and pair [N, room]."""
    n_features = len(W)
    size = _sample_size(keep, n_features)
    row_thr = None
    if size < n_features:
        sample = slice(None, size * (n_features // size), n_features // size)
        count, pair = stream.running_largest(x, W[sample], b[sample].contiguous(), SAMPLE_RANK)
        row_thr = select.select_topk(pair, count, SAMPLE_RANK).kth
    return emit.encode_emit(x, W, b, row_thr, None, min(n_features, ROOM * keep))


def _sample_size(keep: int, n_features: int) -> int:
    return max(SAMPLE_RANK, -(-SAMPLE_RANK * n_features // (AIM * keep)))


def _again(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Candidates from a float32 product of all features; where they prove nothing either, every feature rescored."""
    keep = candidates(k, len(W))
    pre_acts = torch.empty(len(x), len(W), device=x.device)
    for part in torch.arange(len(W)).split(max(1, _FLOAT32_VALUES // W.shape[1])):
        features = slice(int(part[0]), int(part[-1]) + 1)
        torch.addmm(b[features], x.float(), W[features].float().T, out=pre_acts[:, features])
    found = pre_acts.topk(keep, dim=1)
    values, indices, proven = settle.settle(x, W, b, found.values, found.indices, k)
    for rows in (~proven).nonzero().flatten().split(max(1, _EXHAUSTIVE_PAIRS // len(W))):
        every = torch.arange(len(W), device=x.device).expand(len(rows), -1)
        exact = sampled_dot(x[rows], W, every) + b
        ranked = exact.sort(dim=1, descending=True, stable=True)  # NaN first, and among NaN the lower index too
        values[rows], indices[rows] = ranked.values[:, :k], ranked.indices[:, :k]
    return values, indices


def _written_out(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    parts = [
        reference.encode_topk(part.float(), W.float(), b, k) for part in x.split(max(1, _FLOAT32_VALUES // len(W)))
    ]
    values, indices = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(indices)
