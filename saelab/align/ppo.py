"""Proximal policy optimisation from a reward, with a value head and a KL penalty on every token.

Ziegler et al. 2019 (arXiv 1909.08593) and Stiennon et al. 2020 (arXiv 2009.01325): sample answers, score them, subtract
beta times the KL to the frozen reference at each token, estimate advantages, and take clipped steps on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab import atomic
from saelab.align.advantages import gae, kl_estimate, token_rewards
from saelab.align.encoding import Batch, Encoded
from saelab.align.logprob import CompletionLogps, completion_logps, hidden_states, logps_of_hidden, unembedding
from saelab.align.losses.policy import ppo_policy_loss, ppo_value_loss
from saelab.align.masked import masked_mean, whiten
from saelab.align.policy import Policy
from saelab.align.rollouts import RolloutSettings, Score, sample, score_with_penalty
from saelab.align.session import Means, Progress, Session, StepSettings
from saelab.errors import ConfigError
from saelab.rundir import StageWriter

#: Answers of a step that are written down with their scores.
_N_SAMPLES_KEPT = 4


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    beta: float = 0.05
    """KL coefficient of the reward, in units of the score a nat."""
    target_kl: float | None = None
    """KL of an answer, in nats, that beta is adapted to. Off: beta stays."""
    horizon: int = 10_000
    """Answers over which the adaptation acts."""
    gamma: float = 1.0
    """Discount of a token later."""
    lam: float = 0.95
    """Decay of the advantage estimate; 1 trusts the sampled reward, less trusts the value head."""
    clip: float = 0.2
    """How far a token's probability may move in one batch, as a ratio."""
    value_clip: float = 0.2
    """How far a value may move in one batch."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    epochs: int = 4
    """Passes over a batch of answers."""
    minibatches: int = 1
    """Steps in a pass."""
    whiten_rewards: bool = False
    """Scale the rewards of a batch to deviation 1."""

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ppo.{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("gamma", "lam"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"ppo.{name} must be above 0 and at most 1, got {getattr(self, name)}; 1 is safe")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ConfigError(f"ppo.target_kl must be above 0, got {self.target_kl}; 6 nats an answer is usual")


class KLController:
    """beta, constant or adapted so that answers keep ``target_kl`` (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, settings: PPOSettings) -> None:
        self.settings = settings
        self.beta = settings.beta

    def update(self, kl: float, *, n_answers: int) -> None:
        if self.settings.target_kl is not None:
            error = max(-0.2, min(0.2, kl / self.settings.target_kl - 1))
            self.beta *= 1 + error * n_answers / self.settings.horizon

    def tensors(self) -> dict[str, Tensor]:
        return {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.beta = float(tensors["beta"])


class _LogpsAndValues(NamedTuple):
    logps: CompletionLogps
    values: Float[Tensor, "answers seq"]


class Experience(NamedTuple):
    """A batch of answers and everything about them that stays fixed while the policy learns from it."""

    batch: Batch
    logps: Float[Tensor, "answers seq"]
    values: Float[Tensor, "answers seq"]
    advantages: Float[Tensor, "answers seq"]
    returns: Float[Tensor, "answers seq"]
    mask: Bool[Tensor, "answers seq"]

    def rows(self, rows: Int[Tensor, " rows"]) -> Experience:
        batch = Batch(ids=self.batch.ids[rows], n_prompt=self.batch.n_prompt[rows], n_total=self.batch.n_total[rows])
        return Experience(batch, *(column[rows] for column in self[1:]))


def train_ppo(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    score: Score,
    run: StageWriter,
    *,
    ppo: PPOSettings,
    rollout: RolloutSettings,
    training: StepSettings,
    progress: Progress | None = None,
) -> None:
    """Train ``policy`` to answer ``prompts`` with higher scores and save it in ``run``; continues from a checkpoint.

    Raises:
        TrainingError: a loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    policy.keep_reference()
    head = new_value_head(policy)
    controller = KLController(ppo)
    parameters = {**policy.trainable(), **{f"value.{name}": p for name, p in head.named_parameters()}}
    session = Session(run, training, parameters, progress=progress, kl=controller)
    order = session.order(len(prompts))
    for step in session.steps():
        answers = sample(
            policy, [prompts[i] for i in order.batch(step)], rollout, seed=rollout_seed(training.seed, step)
        )
        scores = score_with_penalty(score, answers, rollout).to(policy.device)
        experience, metrics = gather(policy, head, answers, scores, ppo=ppo, beta=controller.beta, rollout=rollout)
        means = Means()
        for epoch in range(ppo.epochs):
            shuffled = torch.randperm(len(answers), generator=session.generator(epoch))
            for rows in shuffled.chunk(ppo.minibatches):
                _minibatch(policy, head, experience.rows(rows), session, means, ppo, rollout)
        controller.update(metrics["objective__kl"], n_answers=len(answers))
        session.log(**metrics, **means.means())
        write_samples(run, policy, step, answers, scores)
    policy.save(run.path)


def new_value_head(policy: Policy) -> nn.Linear:
    """A head on the policy's hidden states that predicts 0 at the start."""
    head = nn.Linear(policy.model.get_output_embeddings().weight.shape[1], 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head.to(policy.device)


@torch.no_grad()
def gather(
    policy: Policy,
    head: nn.Linear,
    answers: Sequence[Encoded],
    scores: Float[Tensor, " answers"],
    *,
    ppo: PPOSettings,
    beta: float,
    rollout: RolloutSettings,
) -> tuple[Experience, dict[str, float]]:
    """Log-probabilities, values and advantages of sampled answers, with the step's metrics under TRL's names."""
    batch = policy.collate(answers)
    logps, values = _logps_and_values(policy, head, batch, rollout.temperature)
    with policy.reference() as reference:
        ref = completion_logps(reference, batch, temperature=rollout.temperature)
    mask = logps.mask
    kl = kl_estimate(logps.logps, ref.logps).where(mask, 0.0)
    last = batch.n_total - 2  # column t holds what is known of token t + 1
    rewards = token_rewards(kl, scores, last, mask, beta=beta)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=ppo.gamma, lam=ppo.lam)
    experience = Experience(batch, logps.logps, values, whiten(advantages, mask), returns, mask)
    answer_kl = kl.sum(1)
    metrics = {
        "objective__kl": float(answer_kl.mean()),
        "objective__entropy": float(-logps.sum().mean()),
        "objective__scores": float(scores.mean()),
        "objective__non_score_reward": float(-beta * answer_kl.mean()),
        "objective__rlhf_reward": float((scores - beta * answer_kl).mean()),
        "objective__beta": beta,
        "val__num_eos_tokens": float(sum(not answer.truncated for answer in answers)),
        "val__length": float(batch.n_completion.double().mean()),
    }
    return experience, metrics


def _minibatch(
    policy: Policy,
    head: nn.Linear,
    part: Experience,
    session: Session,
    means: Means,
    ppo: PPOSettings,
    rollout: RolloutSettings,
) -> None:
    """One clipped step on some of the answers."""
    logps, values = _logps_and_values(policy, head, part.batch, rollout.temperature)
    policy_loss = ppo_policy_loss(logps.logps, part.logps, part.advantages, part.mask, clip=ppo.clip)
    value_loss = ppo_value_loss(values, part.values, part.returns, part.mask, clip=ppo.value_clip)
    loss = policy_loss.loss + ppo.value_coefficient * value_loss.loss
    session.backward(loss)
    session.update()
    ratio = masked_mean((logps.logps.detach() - part.logps).clamp(-20, 20).exp(), part.mask)
    means.add(
        loss=loss[None],
        loss__policy_avg=policy_loss.loss[None],
        loss__value_avg=value_loss.loss[None],
        policy__approxkl_avg=policy_loss.approx_kl[None],
        policy__clipfrac_avg=policy_loss.clip_fraction[None],
        val__clipfrac_avg=value_loss.clip_fraction[None],
        val__ratio=ratio[None],
    )


def _logps_and_values(policy: Policy, head: nn.Linear, batch: Batch, temperature: float) -> _LogpsAndValues:
    """Log-probabilities of the answers' tokens, and the value before each: one pass through the model."""
    hidden = hidden_states(policy.model, batch)
    logps = logps_of_hidden(hidden, unembedding(policy.model), batch, temperature=temperature)
    values = head(hidden[:, :-1].to(head.weight.dtype))[..., 0]
    return _LogpsAndValues(logps, values.where(logps.mask, 0.0))


def rollout_seed(seed: int, step: int) -> int:
    """The seed of a step's answers."""
    return 1_000_003 * seed + step


def write_samples(
    run: StageWriter, policy: Policy, step: int, answers: Sequence[Encoded], scores: Float[Tensor, " answers"]
) -> None:
    """A few answers of the step: a file of its own, so that a step done twice after a kill is written once."""
    shown = [
        {
            "prompt": policy.codec.tokenizer.decode(answer.prompt_ids),
            "answer": policy.codec.decode(answer.completion_ids),
            "score": float(score),
        }
        for answer, score in zip(answers[:_N_SAMPLES_KEPT], scores, strict=False)
    ]
    atomic.write_json(run.path / "samples" / f"step_{step + 1:06d}.json", shown)
