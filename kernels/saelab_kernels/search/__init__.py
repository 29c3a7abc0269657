"""Top activations, histograms and samples of every feature, from one pass over sparse activations.

A pass is a stream of chunks in any order; ``stream.FeatureSearch`` keeps what is to be known of each feature, and the
result is the same for any chunking, sharding or interruption.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels import compiled, dispatch
from saelab_kernels.search import cpu, reference
from saelab_kernels.search.types import Bins, Firings, Tally, TopState, empty_tally, empty_top

__all__ = [
    "Bins",
    "Firings",
    "Tally",
    "TopState",
    "empty_tally",
    "empty_top",
    "hist_sample",
    "merge_top",
    "merge_top_",
    "row_peaks",
    "scan_top",
]


def scan_top(features: Tensor, positions: Tensor, values: Tensor, threshold: Tensor) -> Firings:
    """The pairs that can still enter a ``TopState`` with that ``threshold`` [G], in their order.

    A value equal to the threshold can: its position may be the lower one. On a GPU the number of pairs comes back to
    the host, once a call.

    Raises:
        TypeError: not int64 features and positions, or values of another type than the threshold.
        ValueError: not three vectors of one length.
    """
    _check(features, positions, values, threshold)
    path = _path(features, len(threshold))
    if path == "fused":
        from saelab_kernels.search import fused

        return compiled.or_else(
            "scan_top",
            lambda: fused.scan_top(features, positions, values, threshold),
            lambda: reference.scan_top(features, positions, values, threshold),
            strict=dispatch.strict(),
        )
    return (cpu if path == "cpu" else reference).scan_top(features, positions, values, threshold)


def merge_top(state: TopState, features: Tensor, positions: Tensor, values: Tensor) -> TopState:
    """The m best of old and new pairs of each group. Associative and commutative, because the order is total.

    Raises:
        TypeError: not int64 features and positions, or values of another type than the state's.
        ValueError: not three vectors of one length.
    """
    return merge_top_(state.clone(), features, positions, values)


def merge_top_(state: TopState, features: Tensor, positions: Tensor, values: Tensor) -> TopState:
    """``merge_top`` in place: only the rows of groups with new pairs are touched. Returns ``state``."""
    _check(features, positions, values, state.threshold)
    path = _path(features, len(state.threshold))
    if path == "fused":
        from saelab_kernels.search import fused

        return compiled.or_else(
            "merge_top",
            lambda: fused.merge_top_(state, features, positions, values),
            lambda: reference.merge_top_(state, features, positions, values),
            strict=dispatch.strict(),
        )
    return (cpu if path == "cpu" else reference).merge_top_(state, features, positions, values)


def hist_sample(
    features: Tensor,
    positions: Tensor,
    values: Tensor,
    *,
    tally: Tally,
    bins: Bins,
    feature_hash: Tensor | None = None,
    group: int = 1,
) -> Firings | None:
    """Count the pairs in ``tally``, in place, and say which group and priority each has in a sample of every group.

    A group is ``group`` (a power of two) neighbouring bins of a feature; groups are numbered feature by feature. The m
    pairs of the highest priority (``hashing.priorities`` of ``feature_hash`` [F]) are a uniform sample of the group:
    give what is returned to ``scan_top`` and ``merge_top`` with a state of int64. Without ``feature_hash`` nothing is
    sampled, and None is returned.

    Raises:
        TypeError: not int64 features and positions, or values that are not float32.
        ValueError: not three vectors of one length, or ``group`` does not divide an octave's bins.
    """
    _check(features, positions, values, torch.empty(0, dtype=torch.float32))
    if group < 1 or group & (group - 1) or bins.per_octave % group:
        raise ValueError(f"group must be a power of two that divides {bins.per_octave} bins an octave, got {group}")
    path = _path(features, len(tally.counts))
    arguments = features, positions, values, tally, bins, feature_hash, group
    if path == "fused":
        from saelab_kernels.search import fused

        return compiled.or_else(
            "hist_sample",
            lambda: fused.hist_sample(*arguments),
            lambda: reference.hist_sample(*arguments),
            strict=dispatch.strict(),
        )
    return (cpu if path == "cpu" else reference).hist_sample(*arguments)


def row_peaks(features: Tensor, positions: Tensor, values: Tensor, *, row_length: int) -> Firings:
    """The highest pair of each feature and row (``position // row_length``), the lowest position among equals.

    Raises:
        TypeError: not int64 features and positions, or values that are not float32.
        ValueError: not three vectors of one length.
    """
    _check(features, positions, values, torch.empty(0, dtype=torch.float32))
    path = _path(features, 1)
    return (cpu if path == "cpu" else reference).row_peaks(features, positions, values, row_length)


def _path(features: Tensor, n_groups: int) -> str:
    return dispatch.choose(features.device, n_features=n_groups, k=1, gathers=False).name


def _check(features: Tensor, positions: Tensor, values: Tensor, threshold: Tensor) -> None:
    for name, tensor, dtype in (
        ("features", features, torch.int64),
        ("positions", positions, torch.int64),
        ("values", values, threshold.dtype),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        if tensor.shape != (len(features),):
            raise ValueError(f"{name} must be one value for each of {len(features)} pairs, got {list(tensor.shape)}")
