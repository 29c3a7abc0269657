"""The table of architectures."""

from __future__ import annotations

import torch

from saelab.errors import ConfigError
from saelab.sae.abstopk import AbsTopK, AbsTopKConfig
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.batchtopk import BatchTopK, BatchTopKConfig
from saelab.sae.crosscoder import Crosscoder, CrosscoderConfig
from saelab.sae.gated import Gated, GatedConfig
from saelab.sae.groupmax import GroupMax, GroupMaxConfig
from saelab.sae.jumprelu import JumpReLU, JumpReLUConfig
from saelab.sae.matching_pursuit import MatchingPursuit, MatchingPursuitConfig
from saelab.sae.matryoshka import Matryoshka, MatryoshkaConfig
from saelab.sae.panneal import PAnneal, PAnnealConfig
from saelab.sae.relu import ReLU, ReLUConfig
from saelab.sae.topk import TopK, TopKConfig
from saelab.sae.transcoder import Transcoder, TranscoderConfig

#: What can be trained, told apart by ``arch``.
TrainableConfig = (
    ReLUConfig
    | PAnnealConfig
    | GatedConfig
    | TopKConfig
    | AbsTopKConfig
    | BatchTopKConfig
    | JumpReLUConfig
    | MatryoshkaConfig
    | MatchingPursuitConfig
    | TranscoderConfig
    | GroupMaxConfig
    | CrosscoderConfig
)

#: All there is; an architecture only for inference comes from a file.
AnyConfig = TrainableConfig

SAE_OF: dict[type, type[SAE]] = {
    ReLUConfig: ReLU,
    PAnnealConfig: PAnneal,
    GatedConfig: Gated,
    TopKConfig: TopK,
    AbsTopKConfig: AbsTopK,
    BatchTopKConfig: BatchTopK,
    MatryoshkaConfig: Matryoshka,
    TranscoderConfig: Transcoder,
    CrosscoderConfig: Crosscoder,
    GroupMaxConfig: GroupMax,
    JumpReLUConfig: JumpReLU,
    MatchingPursuitConfig: MatchingPursuit,
}

CONFIG_OF: dict[str, type] = {config.arch: config for config in SAE_OF}  # type: ignore[attr-defined]


def new_sae(cfg: SAEConfig, *, d_in: int, generator: torch.Generator | None = None) -> SAE:
    """A fresh SAE of the architecture that ``cfg`` describes; the same seed in ``generator`` gives the same weights.

    Raises:
        ConfigError: ``cfg`` is the config of no architecture, or ``d_in`` is below 1.
    """
    if type(cfg) not in SAE_OF:
        known = ", ".join(sorted(config.__name__ for config in SAE_OF))
        raise ConfigError(f"{type(cfg).__name__} is the config of no architecture; use one of {known}")
    return SAE_OF[type(cfg)](cfg, d_in, generator=generator)
