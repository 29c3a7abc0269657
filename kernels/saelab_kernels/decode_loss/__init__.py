"""Decoding, squared error and the gradient of the activations in one operation: what a training step needs of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.decode_loss import cpu, reference
from saelab_kernels.pairs import Pairs


class DecodeLoss(NamedTuple):
    """The loss of each token and what all gradients are made of (``decode_loss``, ``prefix_pairs``)."""

    loss: Tensor  # [N]
    error: Tensor  # [N, d]; with prefixes [n_prefixes, N, d]
    acts_grad: Tensor  # [N, k]


@torch.no_grad()
def decode_loss(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    *,
    prefix_ends: tuple[int, ...] | None = None,
) -> DecodeLoss:
    """Squared error of the reconstruction and its gradients. No autograd: the gradients are the result.

    top_acts [N, k], top_indices int64 [N, k], W_dec [F, d], b_dec [d], target [N, d]. Without prefixes

        error[n] = sum_j top_acts[n, j] W_dec[top_indices[n, j]] + b_dec - target[n]
        loss[n] = |error[n]|^2,  acts_grad[n, j] = d loss[n] / d top_acts[n, j] = 2 error[n] . W_dec[top_indices[n, j]]

    and of sum_n loss[n] the gradients for b_dec and W_dec are ``2 * error.sum(0)`` and
    ``2 * feature_grad(pairs, top_acts, error)``.

    With ``prefix_ends`` = (end_1, ..., F), ascending, the features below end_p reconstruct the target by themselves for
    each p (Matryoshka SAE, Bussmann et al. 2025, arXiv 2503.17547, eq. 4): e_p[n] is the error of prefix p and

        loss[n] = sum_p |e_p[n]|^2,  error[p, n] = e_p[n] + e_(p+1)[n] + ... + e_last[n]
        acts_grad[n, j] = 2 error[p, n] . W_dec[i],  i = top_indices[n, j] in end_(p-1) .. end_p - 1

    A feature takes part in the prefixes that reach beyond it, so its gradients see one row, error[p, n] of its group.
    Of sum_n loss[n] they are ``2 * error[0].sum(0)`` for b_dec and, pairs counted through the rows of all groups,
    ``2 * feature_grad(prefix_pairs(pairs, ...), top_acts, error.flatten(0, 1))`` for W_dec. Fewer rows would not do,
    for the errors of a token's prefixes are independent.

    Computes in float32 or wider. Deterministic: two runs are bitwise equal. A NaN spoils its own token only.

    Raises:
        TypeError: not floating-point, or ``top_indices`` not int64.
        ValueError: shapes that do not fit, an index out of range, ``prefix_ends`` not ascending from 1 to F.
    """
    arguments.check_matrix("W_dec", W_dec)
    arguments.check_indices(top_indices, n_features=len(W_dec))
    arguments.check_matrix("top_acts", top_acts, rows=len(top_indices), columns=top_indices.shape[1])
    arguments.check_vector("b_dec", b_dec, length=W_dec.shape[1])
    arguments.check_matrix("target", target, rows=len(top_indices), columns=W_dec.shape[1])
    ends = (len(W_dec),) if prefix_ends is None else _checked(prefix_ends, n_features=len(W_dec))
    result = _on_path(top_acts, top_indices, W_dec, b_dec, target, ends)
    return result if prefix_ends is not None else result._replace(error=result.error[0])


def prefix_pairs(pairs: Pairs, prefix_ends: tuple[int, ...], *, n_tokens: int) -> Pairs:
    """``pairs`` with the token of each replaced by its row in ``error.flatten(0, 1)``: group * n_tokens + token.

    Raises:
        ValueError: ``prefix_ends`` is not ascending from 1 to F.
    """
    _checked(prefix_ends, n_features=len(pairs.starts) - 1)
    tokens = pairs.tokens
    positions = torch.arange(len(tokens), device=tokens.device)
    for end in prefix_ends[:-1]:
        tokens = tokens + n_tokens * (positions >= pairs.starts[end])
    return pairs._replace(tokens=tokens)


def _on_path(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: tuple[int, ...]
) -> DecodeLoss:
    dtype = arguments.computing_dtype(top_acts, W_dec, b_dec, target)
    path = dispatch.path_for(W_dec, top_indices.shape[1], dtype=dtype)

    def in_torch() -> DecodeLoss:
        wide = (tensor.to(dtype) for tensor in (W_dec, b_dec, target))
        on = cpu if path == "cpu" else reference
        return DecodeLoss(*on.decode_loss(top_acts.to(dtype), top_indices, *wide, ends))

    if path == "fused":
        from saelab_kernels.decode_loss import fused

        return compiled.or_else(
            "decode_loss",
            lambda: DecodeLoss(*fused.decode_loss(top_acts, top_indices, W_dec, b_dec, target, ends)),
            in_torch,
            strict=dispatch.strict(),
        )
    return in_torch()


def _checked(prefix_ends: tuple[int, ...], *, n_features: int) -> tuple[int, ...]:
    ascending = all(low < high for low, high in zip((0, *prefix_ends), prefix_ends, strict=False))
    if not ascending or prefix_ends[-1:] != (n_features,):
        raise ValueError(f"prefix_ends must ascend from at least 1 to F={n_features}, got {prefix_ends}")
    return prefix_ends
