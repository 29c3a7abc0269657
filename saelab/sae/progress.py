"""Coefficients as functions of the share of the training that is done: no state, so nothing to save and to restore."""

from __future__ import annotations

from saelab.errors import ConfigError


def warmed_up(progress: float, *, share: float) -> float:
    """Factor on a coefficient: linear from 0, 1 once ``share`` of the training is done; with share 0 always 1."""
    return min(1.0, progress / share) if share else 1.0


def annealed(progress: float, *, first: float, last: float, start: float) -> float:
    """``first`` until the share ``start`` of the training is done, then linearly to ``last`` at its end."""
    done = max(0.0, progress - start) / (1 - start)
    return last if done >= 1 else first + (last - first) * done


def check_share(name: str, value: float, *, below: float = 1.0) -> None:
    """Refuse a setting that is no share of the training.

    Raises:
        ConfigError: outside 0..``below``.
    """
    if not 0 <= value <= below:
        raise ConfigError(f"{name} is a share of the training, between 0 and {below:g}, got {value}; usual is 0.05")
