"""The table of architectures."""

from __future__ import annotations

import torch

from saelab.errors import ConfigError
from saelab.sae.base import SAE
from saelab.sae.batchtopk import BatchTopK, BatchTopKConfig
from saelab.sae.jumprelu import JumpReLU, JumpReLUConfig
from saelab.sae.relu import ReLU, ReLUConfig
from saelab.sae.topk import TopK, TopKConfig

AnyConfig = ReLUConfig | TopKConfig | BatchTopKConfig | JumpReLUConfig


def new_sae(cfg: AnyConfig, *, d_in: int, generator: torch.Generator | None = None) -> SAE:
    """A fresh SAE of the architecture that ``cfg`` describes; the same seed in ``generator`` gives the same weights.

    Raises:
        ConfigError: ``d_in`` is below 1.
    """
    match cfg:
        case ReLUConfig():
            return ReLU(cfg, d_in, generator=generator)
        case TopKConfig():
            return TopK(cfg, d_in, generator=generator)
        case BatchTopKConfig():
            return BatchTopK(cfg, d_in, generator=generator)
        case JumpReLUConfig():
            return JumpReLU(cfg, d_in, generator=generator)
    raise ConfigError(
        f"{type(cfg).__name__} is the config of no architecture; "
        "use ReLUConfig, TopKConfig, BatchTopKConfig or JumpReLUConfig"
    )
