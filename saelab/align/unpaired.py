"""Preference optimisation on single answers that are called good or bad: KTO, and APO on unpaired answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab import dist
from saelab.align.encoding import Encoded
from saelab.align.logprob import completion_logps
from saelab.align.losses.pairwise import PreferenceLoss
from saelab.align.losses.unpaired import apo_zero_unpaired_loss, kto_baseline, kto_loss
from saelab.align.parallel import rows_of
from saelab.align.policy import Policy
from saelab.align.session import Progress, Session, StepSettings
from saelab.errors import ConfigError, TextError
from saelab.rundir import StageWriter
from saelab.stats import Interval, interval_of_mean, superiority

_log = logging.getLogger(__name__)

#: Good against bad answers, weights included: the authors' 1 to 4/3, and what chance makes of it in a small set.
_BALANCED = (0.9, 1.5)


@dataclass(frozen=True, kw_only=True)
class UnpairedSettings:
    kind: Literal["kto", "apo_zero"] = "kto"
    """kto: gains count from the KL to the reference; apo_zero: from 0."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: float = 1.0
    """Weight of good answers (kto)."""
    undesirable_weight: float = 1.0
    """Weight of bad answers (kto)."""

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"loss.{name} must be above 0, got {getattr(self, name)}; raise it")


class Labels(NamedTuple):
    """Answers and whether each is good, in the same order."""

    answers: list[Encoded]
    good: list[bool]


class UnpairedQuality(NamedTuple):
    """What training did to held-out answers, relative to the reference."""

    good_shift: Interval
    """Mean change of the good answers' log-probability in nats."""
    bad_shift: Interval
    """The same of the bad ones; training pushes it below the good ones'."""
    separation: float
    """Probability that a good answer gained more than a bad one; one half says nothing."""
    n_good: int
    n_bad: int


def train_unpaired(
    policy: Policy,
    data: Labels,
    run: StageWriter,
    *,
    loss: UnpairedSettings,
    training: StepSettings,
    mesh: dist.Mesh = dist.ONE_PROCESS,
    progress: Progress | None = None,
) -> None:
    """Train ``policy`` on labelled answers and save it in ``run``; continues from the latest checkpoint.

    For KTO the KL to the reference, from which gains and losses are counted, is estimated anew in each step on the
    answers of the whole batch, each behind the prompt of its neighbour (Ethayarajh et al. 2024, section 4.1).

    Raises:
        ConfigError: a batch of one, in which no answer has a neighbour.
        TextError: all answers are good, or all bad.
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    if loss.kind == "kto" and training.batch_size < 2:
        raise ConfigError("KTO needs at least 2 answers a batch to estimate the KL, got 1; raise training.batch_size")
    check_labels(data, loss)
    if training.shard:
        policy.shard_(mesh)
    size, group = training.micro_batch or training.batch_size, mesh.world
    reference = reference_logps(policy, data.answers, batch_size=size, group=group)
    session = Session(run, training, policy.trainable(), mesh=mesh, progress=progress)
    order = session.order(len(data.answers))
    good = torch.tensor(data.good)
    for step in session.steps():
        means = session.means()
        baseline = torch.zeros(())
        if loss.kind == "kto":
            batch = [data.answers[i] for i in order.batch(step)]
            baseline = kto_baseline(mismatched_ratios(policy, batch, batch_size=size, group=group))
        for part in order.parts(step):
            records = torch.from_numpy(part)
            logps = completion_logps(policy.model, policy.collate([data.answers[i] for i in part])).sum()
            ratios = logps - reference[records].to(logps.device)
            result = unpaired_loss(ratios, good[records].to(logps.device), baseline.to(logps.device), loss)
            means.add(
                loss=result.loss,
                rewards__chosen=result.chosen_rewards,
                rewards__rejected=result.rejected_rewards,
                logps__chosen=logps.detach().where(good[records].to(logps.device), torch.nan),
                logps__rejected=logps.detach().where(~good[records].to(logps.device), torch.nan),
            )
            session.backward(result.loss.sum() / training.batch_size)
        session.update()
        session.log(kl=float(baseline), **means.means())
    policy.save(run.path, mesh)


def unpaired_loss(
    ratios: Float[Tensor, " batch"], good: Any, baseline: Float[Tensor, ""], settings: UnpairedSettings
) -> PreferenceLoss:
    """The loss that ``settings`` name."""
    if settings.kind == "apo_zero":
        return apo_zero_unpaired_loss(ratios, good, beta=settings.beta)
    return kto_loss(
        ratios,
        good,
        baseline,
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )


@torch.no_grad()
def mismatched_ratios(
    policy: Policy, batch: Sequence[Encoded], *, batch_size: int, group: dist.Group = dist.ALONE
) -> Float[Tensor, " batch"]:
    """log pi - log ref of each answer behind the prompt of the record after it in the batch."""
    pairs = mismatched(batch, context=policy.codec.context)

    logps = _sums(policy.model, policy, pairs, batch_size=batch_size, group=group).float()
    with policy.reference() as reference:
        return logps - _sums(reference, policy, pairs, batch_size=batch_size, group=group).float()


def mismatched(batch: Sequence[Encoded], *, context: int) -> list[Encoded]:
    """Each record's prompt with the answer of the record before it, as far as the context holds it."""
    found = []
    for i, record in enumerate(batch):
        answer, room = batch[i - 1].completion_ids, context - len(record.prompt_ids)
        found.append(Encoded(record.prompt_ids, answer[:room], truncated=len(answer) > room))
    return found


@torch.no_grad()
def reference_logps(
    policy: Policy, answers: Sequence[Encoded], *, batch_size: int, group: dist.Group = dist.ALONE
) -> Float[Tensor, " answers"]:
    """The log-probabilities of all answers under the reference."""
    with policy.reference() as reference:
        return _sums(reference, policy, answers, batch_size=batch_size, group=group).float()


@torch.no_grad()
def evaluate_unpaired(
    policy: Policy, data: Labels, *, batch_size: int = 8, group: dist.Group = dist.ALONE
) -> UnpairedQuality:
    """Shifts of held-out answers with bootstrap intervals over answers, and how well they separate good from bad."""
    before = reference_logps(policy, data.answers, batch_size=batch_size, group=group)
    after = _sums(policy.model, policy, data.answers, batch_size=batch_size, group=group)
    shifts, good = (after - before).numpy(), np.array(data.good)
    rises, falls = shifts[good], shifts[~good]
    return UnpairedQuality(
        interval_of_mean(rises), interval_of_mean(falls), superiority(rises, falls), n_good=len(rises), n_bad=len(falls)
    )


def _sums(
    model: Any, policy: Policy, answers: Sequence[Encoded], *, batch_size: int, group: dist.Group
) -> Float[Tensor, " answers"]:
    """The log-probability of each answer under ``model``, in float64."""

    def column(part: Sequence[Encoded]) -> Float[Tensor, "part 1"]:
        return completion_logps(model, policy.collate(part)).sum()[:, None]

    return rows_of(answers, column, batch_size=batch_size, group=group)[:, 0]


def check_labels(data: Labels, loss: UnpairedSettings | None = None) -> None:
    """Refuse answers of one kind, and warn where one kind outweighs the other far (KTO, section 4.2).

    Raises:
        TextError: all are good, or all bad.
    """
    n_good = sum(data.good)
    n_bad = len(data.good) - n_good
    if not n_good or not n_bad:
        raise TextError(f"{n_good} answers are labelled good and {n_bad} bad; training and measuring need both kinds")
    if loss is not None and loss.kind == "kto":
        balance = loss.desirable_weight * n_good / (loss.undesirable_weight * n_bad)
        if not _BALANCED[0] <= balance <= _BALANCED[1]:
            _log.warning(
                "%d good answers against %d bad ones, with their weights %.2f to 1; KTO's authors advise 1 to 4/3: set "
                "loss.undesirable_weight to %.2f",
                n_good,
                n_bad,
                balance,
                loss.desirable_weight * n_good / n_bad,
            )
