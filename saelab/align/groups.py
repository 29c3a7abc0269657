"""Policy optimisation without a value head: several answers to a prompt are each other's baseline (RLOO, GRPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.align.advantages import group_normalised, kl_estimate, leave_one_out
from saelab.align.logprob import completion_logps
from saelab.align.losses.policy import Aggregation, Surrogate, grpo_loss
from saelab.align.policy import Policy
from saelab.align.ppo import rollout_seed, write_samples
from saelab.align.rollouts import RolloutSettings, Score, sample, score_with_penalty
from saelab.align.session import Means, Progress, Session, StepSettings
from saelab.errors import ConfigError
from saelab.rundir import StageWriter


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    baseline: Literal["rloo", "grpo", "dr_grpo"] = "rloo"
    """Mean of the other answers (rloo), or group mean with (grpo) or without (dr_grpo) division by the deviation."""
    group_size: int = 4
    """Answers to a prompt."""
    beta: float = 0.05
    """KL coefficient, subtracted from the score of an answer: as a loss of its own it would have another optimum."""
    clip: float = 0.2
    """How far a token's probability may move in one batch, as a ratio."""
    surrogate: Surrogate = "clipped"
    """What a token's ratio does beyond its limit: "clipped" ends its gradient, "cispo" goes on with a capped weight."""
    ratio_cap: float = 5.0
    """Largest weight of a token (cispo)."""
    epochs: int = 1
    """Passes over a batch of answers."""
    aggregation: Aggregation = "tokens"
    """How tokens become one loss: "sequences", "tokens" or "constant"."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size must be at least 2, got {self.group_size}; an answer alone has no baseline")
        if not self.ratio_cap > 0:
            raise ConfigError(f"ratio_cap must be above 0, got {self.ratio_cap}; 5 is usual")
        if self.epochs < 1:
            raise ConfigError(f"epochs must be at least 1, got {self.epochs}; 1 is usual")


def train_groups(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    score: Score,
    run: StageWriter,
    *,
    group: GroupSettings,
    rollout: RolloutSettings,
    training: StepSettings,
    progress: Progress | None = None,
) -> None:
    """Train ``policy`` to answer ``prompts`` with higher scores; ``batch_size`` counts prompts.

    Raises:
        TrainingError: a loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    policy.keep_reference()
    session = Session(run, training, policy.trainable(), progress=progress)
    order = session.order(len(prompts))
    for step in session.steps():
        chosen = [prompts[i] for i in order.batch(step) for _ in range(group.group_size)]
        answers = sample(policy, chosen, rollout, seed=rollout_seed(training.seed, step))
        scores = score_with_penalty(score, answers, rollout).to(policy.device)
        batch = policy.collate(answers)
        with torch.no_grad():
            old = completion_logps(policy.model, batch, temperature=rollout.temperature)
            with policy.reference() as reference:
                ref = completion_logps(reference, batch, temperature=rollout.temperature)
            kl = kl_estimate(old.logps, ref.logps).where(old.mask, 0.0).sum(1)
            advantages = baselined(scores - group.beta * kl, group)
        means = Means()
        for _ in range(group.epochs):
            logps = completion_logps(policy.model, batch, temperature=rollout.temperature)
            result = grpo_loss(
                logps.logps,
                old.logps,
                advantages,
                old.mask,
                clip=group.clip,
                surrogate=group.surrogate,
                ratio_cap=group.ratio_cap,
                aggregation=group.aggregation,
            )
            session.backward(result.loss)
            session.update()
            means.add(
                loss=result.loss[None],
                policy__approxkl_avg=result.approx_kl[None],
                policy__clipfrac_avg=result.clip_fraction[None],
            )
        session.log(
            objective__kl=float(kl.mean()),
            objective__scores=float(scores.mean()),
            objective__rlhf_reward=float((scores - group.beta * kl).mean()),
            val__num_eos_tokens=float(sum(not answer.truncated for answer in answers)),
            val__length=float(batch.n_completion.double().mean()),
            **means.means(),
        )
        write_samples(run, policy, step, answers, scores)
    policy.save(run.path)


def baselined(rewards: Float[Tensor, " answers"], group: GroupSettings) -> Float[Tensor, " answers"]:
    """Each reward relative to those of the same prompt, which stand side by side."""
    groups = rewards.view(-1, group.group_size)
    match group.baseline:
        case "rloo":
            return leave_one_out(groups).flatten()
        case "grpo":
            return group_normalised(groups).flatten()
        case "dr_grpo":
            return group_normalised(groups, divide_by_std=False).flatten()
