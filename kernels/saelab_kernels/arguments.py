"""Checks of what callers pass in: microseconds on the CPU, and none but the last waits for another device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_matrix(name: str, tensor: Tensor, *, rows: int | None = None, columns: int | None = None) -> None:
    """Raise TypeError unless ``tensor`` is floating, ValueError unless it is [rows, columns] (None: any size)."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    wanted = (rows if rows is not None else "any", columns if columns is not None else "any")
    fits = tensor.ndim == 2 and rows in (None, tensor.shape[0]) and columns in (None, tensor.shape[1])
    if not fits:
        raise ValueError(f"{name} must have shape [{wanted[0]}, {wanted[1]}], got {list(tensor.shape)}")


def check_vector(name: str, tensor: Tensor, *, length: int) -> None:
    """Raise TypeError unless ``tensor`` is floating, ValueError unless it has the one axis of that length."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], got {list(tensor.shape)}")


def check_k(k: int, n_features: int) -> None:
    """Raise ValueError unless 1 <= k <= n_features."""
    if not 1 <= k <= n_features:
        raise ValueError(f"k must be between 1 and the number of features {n_features}, got {k}")


def check_indices(indices: Tensor, *, n_features: int) -> None:
    """Raise TypeError unless ``indices`` is int64, ValueError unless it is [N, k] with entries in range (CPU only)."""
    if indices.dtype != torch.int64:
        raise TypeError(f"top_indices must be int64, got {indices.dtype}")
    if indices.ndim != 2:
        raise ValueError(f"top_indices must have shape [N, k], got {list(indices.shape)}")
    if indices.device.type == "cpu" and indices.numel():
        low, high = torch.aminmax(indices)
        if low < 0 or high >= n_features:
            raise ValueError(f"top_indices must lie in 0..{n_features - 1}, got {int(low)}..{int(high)}")


def computing_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision to compute in: the widest of the tensors', at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is a finite number. Waits for another device."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN if any is; ten times faster than isfinite().all()
    return bool(low.isfinite() & high.isfinite())
