"""The reconstruction loss on the CPU: bags of weighted rows forward, dot products in place backward.

With prefixes each active feature is still read twice only: the entries of a row are told apart by their group, and a
group adds its rows to the reconstruction of the groups before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab_kernels.bags import weighted_bags
from saelab_kernels.decode.cpu import sparse_decode
from saelab_kernels.dots.cpu import ragged_dot, sampled_dot


def decode_loss(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference: loss [N], errors [len(ends), N, d], the gradient for ``top_acts`` [N, k]."""
    if len(ends) == 1:
        error = sparse_decode(top_acts, top_indices, W_dec).add_(b_dec).sub_(target)
        return error.pow(2).sum(1), error[None], sampled_dot(error, W_dec, top_indices).mul_(2)

    groups = torch.bucketize(top_indices.contiguous(), torch.tensor(ends), right=True)
    members = [groups == group for group in range(len(ends))]
    errors = target.new_empty(len(ends), *target.shape)
    error = b_dec - target
    for group, member in enumerate(members):
        torch.add(
            error, weighted_bags(top_indices[member], _offsets(member), top_acts[member], W_dec), out=errors[group]
        )
        error = errors[group]
    loss = errors.pow(2).sum((0, 2))
    for group in reversed(range(len(ends) - 1)):
        errors[group] += errors[group + 1]
    acts_grad = torch.empty_like(top_acts)
    for error, member in zip(errors, members, strict=True):
        acts_grad[member] = 2 * ragged_dot(error, W_dec, _offsets(member), top_indices[member])
    return loss, errors, acts_grad


def _offsets(member: Tensor) -> Tensor:
    """Where each row's entries begin [N + 1] among those that ``member`` [N, k] chooses."""
    return F.pad(member.sum(1).cumsum(0), (1, 0))
