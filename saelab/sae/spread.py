"""What couples the tokens of a batch, when these are spread over processes: a variance, and the largest of all.

Each function equals what one process that holds the whole batch computes. Losses are means over the tokens of
a process, and training takes the mean over processes, which hold equally many.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.dist import ALONE, Group
from saelab_kernels import Ragged, encode_above, encode_batchtopk
from saelab_kernels.batchtopk.reference import not_below

#: Tokens from which the floor of a search is estimated, and how many times the wanted pairs it lets through.
_SAMPLE = 64
_EXCESS = 1.25


@torch.no_grad()
def variance_share(residual: Float[Tensor, "batch d"], group: Group) -> Float[Tensor, ""] | float:
    """This process's sum of squares about the mean, over the mean of that sum over processes as the whole batch has it.

    What is divided by a variance, as AuxK is, must be divided by that of the whole batch: its factor on this process.
    """
    if group is ALONE:
        return 1.0
    here, everywhere = _sum_of_squares(residual), total_variance(residual, group)
    return here * group.size / everywhere.clamp_min(torch.finfo(residual.dtype).tiny)


@torch.no_grad()
def total_variance(residual: Float[Tensor, "batch d"], group: Group) -> Float[Tensor, ""]:
    """sum |residual - mean|^2 over the tokens of all processes, the mean over all of them as well.

    Around each process's own mean first, so that a large mean costs no digits (Chan, Golub and LeVeque 1983, eq. 2.1).
    """
    parts = torch.stack(group.gather(torch.cat([_sum_of_squares(residual)[None], residual.mean(0)])))
    squares, means = parts[:, 0], parts[:, 1:]
    return squares.sum() + len(residual) * (means - means.mean(0)).pow(2).sum()


def largest_of_batch(
    x: Float[Tensor, "batch d"], W: Float[Tensor, "d_sae d"], b: Float[Tensor, " d_sae"], n_kept: int, group: Group
) -> Ragged:
    """The ``n_kept`` largest positive entries of ``x @ W.T + b`` over the whole batch: those of this process.

    As ``encode_batchtopk``, with all that equal the smallest one kept. ``group`` is all who hold tokens of the batch or
    features of the dictionary. A floor that is sure to let ``n_kept`` pass is estimated from a sample of the tokens.

    A process sends 2 kB for each byte of a float, however many activations there are.
    """
    if group is ALONE:
        return encode_batchtopk(x, W, b, n_kept // len(x))
    excess = _EXCESS
    while True:
        floor = _floor(x, W, b, excess * n_kept / (len(x) * group.size), group)
        found = encode_above(x, W, b, floor.expand(len(W)))
        n_found = int(group.sum(torch.tensor(len(found.acts), device=x.device)))
        if n_found >= n_kept or floor == 0:
            break
        excess *= 2
    if n_found <= n_kept:
        return found
    return not_below(found, nth_largest(found.acts.detach(), n_kept, group))


@torch.no_grad()
def smallest_kept(kept: Float[Tensor, " kept"], group: Group) -> Float[Tensor, " 1"]:
    """The smallest activation that any process kept; infinity where none was."""
    here = kept.min() if len(kept) else kept.new_tensor(float("inf"))
    return group.smallest(here)[None]


@torch.no_grad()
def nth_largest(values: Float[Tensor, " n"], n: int, group: Group) -> Float[Tensor, ""]:
    """The n-th largest (from 1) of the values of all processes, exactly. They must not be negative; NaN is largest.

    Non-negative floats are ordered as the integers that their bits spell, so eight bits a pass are found by counting
    (radix selection): one sum of 256 counts a pass, four passes for float32.
    """
    size = values.element_size()
    bits = values.contiguous().view({4: torch.int32, 8: torch.int64}[size])
    found = 0
    for shift in range(8 * size - 8, -1, -8):
        digits = (bits >> shift) & 255
        counts = group.sum(torch.bincount(digits, minlength=256))
        from_above = counts.flip(0).cumsum(0).flip(0)
        digit = int((from_above >= n).sum()) - 1
        n -= int(from_above[digit] - counts[digit])
        found = found << 8 | digit
        bits = bits[digits == digit]
    return torch.tensor(found, dtype=bits.dtype, device=values.device).view(values.dtype)


@torch.no_grad()
def _floor(
    x: Float[Tensor, "batch d"],
    W: Float[Tensor, "d_sae d"],
    b: Float[Tensor, " d_sae"],
    n_passing: float,
    group: Group,
) -> Float[Tensor, ""]:
    """A value, the same on each process, that about ``n_passing`` entries a row exceed; 0 where that is most of them.

    Rows are those of one process: where features are spread, a token is a row on each process that has some of them.
    """
    sample = x[:: max(1, len(x) // _SAMPLE)]
    pre_acts = torch.nn.functional.linear(sample.to(W.dtype), W, b).flatten().relu().nan_to_num(0, 0, 0)
    n_wanted = int(n_passing * len(sample) * group.size)
    n_all = int(group.sum(torch.tensor(pre_acts.numel(), device=x.device)))
    if n_wanted >= n_all:
        return pre_acts.new_zeros(())
    return nth_largest(pre_acts, n_wanted, group)


def _sum_of_squares(residual: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    return (residual - residual.mean(0)).pow(2).sum()
