"""BatchTopK encoding: a batch keeps its k N largest positive pre-activations, wherever they fall."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.above import encode_above
from saelab_kernels.batchtopk import reference
from saelab_kernels.ragged import Ragged

#: Tokens from which the search's floor is estimated, and how many more than k pairs of each it is set to let through.
_SAMPLE = 64
_EXCESS = 1.25


def encode_batchtopk(x: Tensor, W: Tensor, b: Tensor, k: int) -> Ragged:
    """The ``k * N`` largest entries of ``relu(x @ W.T + b)`` over the whole batch, of those above 0.

    x [N, d], W [F, d], b [F]; Bussmann et al. 2024, arXiv 2412.06410. Entries that equal the smallest one kept are kept
    too. NaN counts as largest. Differentiable once in x, W and b through the activations. Computes in float32 or wider.

    The pairs above an estimated floor are found first (``encode_above``). If they are at least k N, the k N largest are
    among them, which is exact; if not, the floor is lowered.

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit, or k outside 1..F.
    """
    arguments.check_matrix("W", W)
    arguments.check_matrix("x", x, columns=W.shape[1])
    arguments.check_vector("b", b, length=len(W))
    arguments.check_k(k, len(W))
    dtype = arguments.computing_dtype(x, W, b)
    path = dispatch.path_for(W, k, gathers=False, dtype=dtype)
    if path == "reference":
        return reference.encode_batchtopk(x.to(dtype), W.to(dtype), b.to(dtype), k * len(x))
    excess = _EXCESS
    while True:
        floor = _floor(x, W, b, k, excess)
        found = encode_above(x, W, b, floor.expand(len(W)))
        if len(found.acts) >= k * len(x) or floor == 0:
            return _keep_largest(found, k * len(x), path)
        excess *= 2


def _keep_largest(found: Ragged, n_kept: int, path: str) -> Ragged:
    if path != "fused" or len(found.acts) <= n_kept:
        return reference.keep_largest(found, n_kept)
    from saelab_kernels.select import radix

    return compiled.or_else(
        "batch_threshold",
        lambda: reference.not_below(found, radix.batch_threshold(found.acts.detach(), n_kept)),
        lambda: reference.keep_largest(found, n_kept),
        strict=dispatch.strict(),
    )


@torch.no_grad()
def _floor(x: Tensor, W: Tensor, b: Tensor, k: int, excess: float) -> Tensor:
    """A value that about ``excess * k`` pre-activations of each token exceed; 0 where that is most of them."""
    sample = x[:: max(1, len(x) // _SAMPLE)]
    n_wanted = int(excess * k * len(sample))
    pre_acts = F.linear(sample.to(W.dtype), W, b.to(W.dtype)).flatten().float()
    if n_wanted >= pre_acts.numel():
        return pre_acts.new_zeros(())
    return pre_acts.kthvalue(pre_acts.numel() - n_wanted).values.clamp_min(0).nan_to_num(0, 0, 0)
