"""The (token, feature) pairs of a batch in feature-major order: what both weight gradients are summed by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from saelab_kernels import arguments, dispatch
from saelab_kernels.pairs import cpu, reference
from saelab_kernels.ragged import Ragged


class Pairs(NamedTuple):
    """P pairs sorted by (feature, token), N*k of a TopK batch; ``starts[f]:starts[f + 1]`` belong to feature f."""

    order: Tensor  # int64 [P]: position of the pair in top_indices.flatten(), or in a ragged batch
    tokens: Tensor  # int64 [P]: its token
    starts: Tensor  # int64 [F+1]


def pairs_by_feature(top_indices: Tensor, n_features: int) -> Pairs:
    """Sort the pairs of ``top_indices`` [N, k] by feature; within a feature by token, then by slot.

    Raises:
        TypeError: ``top_indices`` is not int64.
        ValueError: it is not [N, k], or an entry lies outside 0..n_features-1.
    """
    arguments.check_indices(top_indices, n_features=n_features)
    k = top_indices.shape[1]
    path = dispatch.choose(top_indices.device, n_features=n_features, k=k).name
    order, starts = (cpu if path == "cpu" else reference).sort_pairs(top_indices, n_features)
    return Pairs(order, order.div(max(k, 1), rounding_mode="floor"), starts)


def ragged_pairs(active: Ragged, n_features: int) -> Pairs:
    """The pairs of a ragged batch, sorted by feature and then by token.

    Raises:
        TypeError: the features are not int64.
        ValueError: a feature lies outside 0..n_features-1.
    """
    column = active.features[:, None]
    arguments.check_indices(column, n_features=n_features)
    path = dispatch.choose(column.device, n_features=n_features, k=1).name
    order, starts = (cpu if path == "cpu" else reference).sort_pairs(column, n_features)
    return Pairs(order, active.tokens[order], starts)
