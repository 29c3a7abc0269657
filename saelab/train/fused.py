"""A training step without gradient tensors: the gradient goes from its factors straight into Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.sae.base import SAE
from saelab.train.optim import OptimConfig
from saelab_kernels import AdamSettings, Layer, SparseGrads, feature_step


def fused_step_(
    sae: SAE, optimizer: torch.optim.Adam, sparse: SparseGrads, config: OptimConfig, *, lr: float
) -> Tensor:
    """Project, clip, update and normalise as the step over gradient tensors does; returns the gradient's norm.

    Adam's state stays where ``optimizer`` keeps it, so that a checkpoint does not depend on the kind of step.
    """
    parameters = {"W_enc": sae.encoder, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    states = {name: _state(optimizer, parameter) for name, parameter in parameters.items()}
    for state in states.values():
        state["step"] += 1
    n_steps = int(states["W_enc"]["step"])
    settings = AdamSettings(lr=lr, step=n_steps, betas=config.betas, clip_norm=config.norm_limit(sae.d_in))
    means = Layer(**{name: state["exp_avg"] for name, state in states.items()})
    squares = Layer(**{name: state["exp_avg_sq"] for name, state in states.items()})
    return feature_step(sae.layer, means, squares, sparse, settings)


def _state(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """What torch.optim.Adam keeps of a parameter, made as it would make it."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
