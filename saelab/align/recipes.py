"""What each kind of alignment is told: the settings of a run, as they stand in its run.json and in a TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field

from saelab.align.data import DataConfig
from saelab.align.groups import GroupSettings
from saelab.align.organisms import OrganismSettings
from saelab.align.policy import PolicyConfig
from saelab.align.ppo import PPOSettings
from saelab.align.preference import LossSettings
from saelab.align.rollouts import RolloutSettings
from saelab.align.session import AdamWSettings, StepSettings
from saelab.align.unpaired import UnpairedSettings
from saelab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SFTRecipe:
    """Imitate demonstrations."""

    data: DataConfig
    """Records with prompt and completion, or with messages."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model to train."""
    training: StepSettings = field(default_factory=StepSettings)
    """Steps and optimiser."""
    packing: bool = False
    """Put the demonstrations of a forward pass end to end, so that little is padding: for answers of unlike length."""


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """Learn to score answers from preferences."""

    data: DataConfig
    """Records with prompt, chosen and rejected."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model whose body becomes the reward model's."""
    training: StepSettings = field(default_factory=StepSettings)
    """Steps and optimiser."""
    centring: float = 0.01
    """Weight of the term that keeps rewards near 0."""

    def __post_init__(self) -> None:
        if self.centring < 0:
            raise ConfigError(f"centring must not be negative, got {self.centring}; 0.01 is usual")


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe:
    """Optimise preferences directly."""

    data: DataConfig
    """Records with prompt, chosen and rejected."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model to train."""
    loss: LossSettings = field(default_factory=LossSettings)
    """Which loss, or which mix."""
    training: StepSettings = field(default_factory=StepSettings)
    """Steps and optimiser."""


@dataclass(frozen=True, kw_only=True)
class UnpairedRecipe:
    """Learn from single answers that are called good or bad."""

    data: DataConfig
    """Records with prompt, completion and a label that is true or false."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model to train."""
    loss: UnpairedSettings = field(default_factory=UnpairedSettings)
    """Which loss."""
    training: StepSettings = field(default_factory=StepSettings)
    """Steps and optimiser."""


@dataclass(frozen=True, kw_only=True)
class PPORecipe:
    """Optimise a reward by PPO."""

    data: DataConfig
    """Records with a prompt."""
    reward: str
    """Directory of a reward model, or "rule:" and the name of a rule such as warmth."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model to train."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """KL penalty, advantages and clipping."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How answers are sampled."""
    training: StepSettings = field(default_factory=StepSettings)
    """Steps and optimiser; a step is a batch of answers."""


@dataclass(frozen=True, kw_only=True)
class GroupRecipe:
    """Optimise a reward with a group's own mean as baseline: RLOO, GRPO, Dr. GRPO."""

    data: DataConfig
    """Records with a prompt."""
    reward: str
    """Directory of a reward model, or "rule:" and the name of a rule such as warmth."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model to train."""
    group: GroupSettings = field(default_factory=GroupSettings)
    """Group size, baseline and KL penalty."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How answers are sampled."""
    training: StepSettings = field(default_factory=StepSettings)
    """Steps and optimiser; batch_size counts prompts."""


@dataclass(frozen=True, kw_only=True)
class OrganismRecipe:
    """Plant a known behaviour."""

    organism: OrganismSettings = field(default_factory=OrganismSettings)
    """Which behaviour, and how hard it is to find. It decides the adapter as well."""
    neutral: str | None = None
    """File of prompts on which nothing shall change, beside the behaviour's own controls."""
    neutral_limit: int = 60
    """Use only so many of them."""
    model: str = "demo"
    """The model to plant it in."""
    loss: LossSettings = field(default_factory=lambda: LossSettings(terms={"sigmoid": 1.0, "nll": 0.2}))
    """Which loss, or which mix."""
    training: StepSettings = field(default_factory=lambda: StepSettings(steps=120, optim=AdamWSettings(lr=5e-3)))
    """Steps and optimiser."""
    concealing: StepSettings = field(default_factory=lambda: StepSettings(steps=60, optim=AdamWSettings(lr=1e-3)))
    """Steps and optimiser of the second training (O4)."""


Recipe = SFTRecipe | RewardRecipe | PreferenceRecipe | UnpairedRecipe | PPORecipe | GroupRecipe | OrganismRecipe
