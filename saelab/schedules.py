"""Learning-rate schedules as functions of the step: no state, so nothing to save and nothing to get wrong on resume."""

from __future__ import annotations


def warmup_then_decay(step: int, *, n_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Factor on the learning rate at ``step`` (from 0): linear up, flat at 1, linear down to 0 after the last step.

    The warm-up's first step already moves (factor 1 / warmup_steps), and the last step still does.
    """
    up = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    down = min(1.0, (n_steps - step) / decay_steps) if decay_steps else 1.0
    return max(0.0, min(up, down))
