"""The state of an Adam optimiser as named tensors, so that checkpoints need no pickle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn, optim


def state_tensors(optimizer: optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Moments and step count of each of the named ``parameters``, under ``name.moment``."""
    return {
        f"{name}.{key}": value for name, parameter in parameters for key, value in optimizer.state[parameter].items()
    }


def restore_state_(
    optimizer: optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``state_tensors`` took, on the device of each parameter."""
    for name, parameter in parameters:
        prefix = f"{name}."
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value.to(parameter.device)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
