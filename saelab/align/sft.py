"""Supervised fine-tuning: imitate demonstrations, the loss on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.align.encoding import Encoded, collate
from saelab.align.logprob import completion_logps
from saelab.align.policy import Policy
from saelab.align.session import Order, Progress, Session, StepSettings
from saelab.rundir import StageWriter
from saelab.stats import Interval, bootstrap, ratio


class Imitation(NamedTuple):
    """How probable demonstrations are that the policy never saw."""

    nll: Interval
    """Nats a token of the answer, EOS included."""
    n_sequences: int
    n_tokens: int


def train_sft(
    policy: Policy,
    demonstrations: Sequence[Encoded],
    run: StageWriter,
    *,
    training: StepSettings,
    progress: Progress | None = None,
) -> None:
    """Train ``policy`` on ``demonstrations`` and save it in ``run``; continues from the latest checkpoint.

    A step's loss is the mean over all answer tokens of its batch, however the batch is divided into forward passes.
    Sequences of like length go through the model together, so that little of a pass is padding.

    Raises:
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    session = Session(run, training, policy.trainable(), progress=progress)
    order = Order(len(demonstrations), batch_size=training.batch_size, micro_batch=None, seed=training.seed)
    for step in session.steps():
        batch = sorted((demonstrations[i] for i in order.batch(step)), key=lambda sequence: sequence.n_tokens)
        n_tokens = sum(len(sequence.completion_ids) for sequence in batch)
        total = 0.0
        for part in _parts(batch, training.micro_batch):
            nll = answer_nll(policy, part)
            session.backward(nll.sum() / n_tokens)
            total += float(nll.detach().sum())
        session.update()
        session.log(loss=total / n_tokens, num_tokens=n_tokens)
    policy.save(run.path)


def answer_nll(policy: Policy, sequences: Sequence[Encoded]) -> Float[Tensor, " batch"]:
    """-log p(answer | prompt) of each sequence in nats, with gradients."""
    batch = collate(sequences, pad_id=policy.codec.pad_id).to(policy.device)
    return -completion_logps(policy.model, batch).sum()


def evaluate_sft(policy: Policy, demonstrations: Sequence[Encoded], *, batch_size: int = 8) -> Imitation:
    """Held-out negative log-likelihood a token, with a bootstrap interval over sequences."""
    nll = []
    with torch.no_grad():
        for start in range(0, len(demonstrations), batch_size):
            nll.append(answer_nll(policy, demonstrations[start : start + batch_size]).double().cpu())
    n_tokens = torch.tensor([float(len(sequence.completion_ids)) for sequence in demonstrations], dtype=torch.float64)
    columns = torch.stack([torch.cat(nll), n_tokens], 1).numpy()
    interval = bootstrap(ratio, columns)
    return Imitation(interval, len(demonstrations), int(n_tokens.sum()))


def _parts(batch: Sequence[Encoded], micro_batch: int | None) -> list[Sequence[Encoded]]:
    size = micro_batch or len(batch)
    return [batch[i : i + size] for i in range(0, len(batch), size)]
