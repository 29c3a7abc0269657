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
from saelab_kernels.compiled import Variant
from saelab_kernels.dispatch import Choice
from saelab_kernels.dots.fused import ragged_dot, sampled_dot
from saelab_kernels.encode import emit, reference, settle, stream, surplus
from saelab_kernels.ragged import Ragged
from saelab_kernels.select import fused as select

#: Tokens at a time: with 16 MB chunks a product then has 1024 features, enough tiles for 132 processors.
ROWS = 8192

# The rule between the routes, in units of one product by cuBLAS (2 N F d flops at 790 TFLOP/s). What A pays beside it
# is one write and one read of N F values of 16 bits in L2, at 5.5 TB/s. B pays for a product in Triton, and for a sample
# of features. Both shares are estimates: measure them on the device at hand, they decide the route alone.
L2_PASS = 4 / 5.5e12 * 790e12 / 2  # divided by d: 0.37 of a product at 768, 0.12 at 2304, 0.07 at 4096
TRITON_SHARE = 0.8  # of cuBLAS' speed, with the epilogue

# Route B's threshold is the SAMPLE_RANK-th largest of a sample of features, its size such that AIM * keep features are
# expected above. That number is then about gamma-distributed with shape 16: fewer than a quarter of AIM * keep in 5 of a
# million rows, more than three times as many in 1 of 10^10.
SAMPLE_RANK = 16
AIM = 4
ROOM = 12

_FLOAT32_VALUES = 2**27  # of pre-activations or weights at a time, where rows are searched again
_EXHAUSTIVE_PAIRS = 2**24


def route_for(n_tokens: int, d: int, n_features: int, k: int, dtype: torch.dtype) -> Choice:
    """ "A" or "B" for x [n_tokens, d], W [n_features, d], sought in ``dtype``: which one the arithmetic above favours."""
    keep = candidates(k, n_features)
    if dtype == torch.float32:
        return Choice("A", "a float32 product is left to cuBLAS: Triton's uses no tensor cores")
    if 2 * _sample_size(keep, n_features) > n_features:
        return Choice("A", f"{keep} candidates of {n_features} features leave no cheap sample for a threshold")
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
    W_low = W.to(_search_dtype(W)) if W_low is None else W_low.detach()
    name = route or route_for(min(len(x), ROWS), x.shape[1], len(W), k, W_low.dtype).name
    settled = [_block(part, W, b, k, W_low, name, strict=route == "B") for part in x.split(ROWS)]
    values, indices, proven = (torch.cat(parts) for parts in zip(*settled, strict=True))
    left = (~proven).nonzero().flatten()  # the one wait for the device
    for rows in left.split(max(1, _FLOAT32_VALUES // len(W))):
        values[rows], indices[rows] = _again(x[rows], W, b, k)
    return values, indices


def encode_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor, *, cap: int = 1024) -> Ragged:
    """x [N, d], W [F, d], b [F], floor [F] -> the pre-activations above their feature's floor; NaN counts as above.

    Float32 dot products in a fixed order decide. What was left out is proven by the errors of what was not: twice the
    largest error among the candidates must stay below the slack with which they were found, else the search is done
    again with a slack that always suffices. Waits for the device several times: the size of the result depends on data.
    """
    x, W, b, floor = x.detach(), W.detach(), b.detach().float(), floor.detach().float()
    W_low = W.to(_search_dtype(W))
    w_norm = _norms(W)
    parts = [_block_above(part, W, b, floor, W_low, w_norm, cap) for part in x.split(ROWS)]
    starts = torch.tensor([0, *(len(part.acts) for part in parts)]).cumsum(0).tolist()
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    end = torch.tensor([starts[-1]], device=x.device)
    return Ragged(torch.cat([p.acts for p in parts]), torch.cat([p.features for p in parts]), torch.cat([*offsets, end]))


def _block_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor, W_low: Tensor, w_norm: Tensor, cap: int) -> Ragged:
    x_low, norms = x.to(W_low.dtype), (_norms(x), w_norm)
    expected, certain = _spread(x, W_low)
    for spread in (expected, certain):
        found = surplus.emit_above(x_low, W_low, b, floor, norms=norms, spread=spread, cap=cap)
        dots = ragged_dot(x, W, found.offsets, found.features)
        exact = dots + b[found.features]
        if spread == certain or bool(_within(found, dots, exact, norms, spread / settle.SAFETY, x_low.dtype)):
            break
    kept = ~(exact <= floor[found.features])
    before = torch.zeros(len(kept) + 1, dtype=torch.int64, device=x.device)
    before[1:] = kept.cumsum(0)
    return Ragged(exact[kept], found.features[kept], before[found.offsets])


def _spread(x: Tensor, W_low: Tensor) -> tuple[float, float]:
    """Error of a product relative to |x| |W[f]|: eight times what roundings of random sign add up to, and the most."""
    d = x.shape[1]
    rounding = 0.0 if x.dtype == W_low.dtype else torch.finfo(W_low.dtype).eps / 2
    summing = 4 * 2.0**-24 * d**0.5
    return 8 * rounding / d**0.5 + summing, 2.02 * rounding + max(summing, 2.0**-23 * d)


def _norms(rows: Tensor) -> Tensor:
    """Length of each row; summed in float64, where no square of a float32 overflows or vanishes."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).float()


def _within(
    found: Ragged, dots: Tensor, exact: Tensor, norms: tuple[Tensor, Tensor], spread: float, dtype: torch.dtype
) -> Tensor:
    """Whether no finite candidate's error, beyond the rounding of the product itself, exceeds ``spread`` |x| |W[f]|."""
    rounding = torch.finfo(dtype).eps / 2 * 1.01 if dtype != torch.float32 else 0.0
    error = (exact - found.acts).abs() - rounding * dots.abs() - 2.0**-22 * exact.abs()
    return ~(error > spread * norms[0][found.tokens] * norms[1][found.features]).any()


def _search_dtype(W: Tensor) -> torch.dtype:
    return torch.bfloat16 if W.dtype == torch.float32 else W.dtype


def _block(
    x: Tensor, W: Tensor, b: Tensor, k: int, W_low: Tensor, name: str, *, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and whether they are proven, for at most ROWS tokens."""
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
    """Candidates from a float32 product of all features, and where they prove nothing either, every feature rescored."""
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
        indices[rows] = reference.largest(exact, k)
        values[rows] = exact.gather(1, indices[rows])
    return values, indices


def _written_out(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    parts = [
        reference.encode_topk(part.float(), W.float(), b, k) for part in x.split(max(1, _FLOAT32_VALUES // len(W)))
    ]
    values, indices = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(indices)


def variants() -> list[Variant]:
    """Every way in which the kernels of this folder may be launched."""
    return [*stream.variants(), *emit.variants(), *settle.variants(), *surplus.variants()]
