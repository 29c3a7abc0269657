"""Supervised fine-tuning: imitate demonstrations, the loss on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import dist
from saelab.align.encoding import Encoded, pack
from saelab.align.logprob import completion_logps, packed_logps
from saelab.align.parallel import rows_of, share
from saelab.align.policy import Policy
from saelab.align.session import Progress, Session, StepSettings
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
    packing: bool = False,
    mesh: dist.Mesh = dist.ONE_PROCESS,
    progress: Progress | None = None,
) -> None:
    """Train ``policy`` on ``demonstrations`` and save it in ``run``; continues from the latest checkpoint.

    A step's loss is the mean over all answer tokens of its batch, however the batch is divided into forward passes.
    Sequences of like length go through the model together, so that little of a pass is padding; with ``packing`` they
    stand end to end in rows of the context's length, each seen by itself alone.

    Raises:
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    if training.shard:
        policy.shard_(mesh)
    session = Session(run, training, policy.trainable(), mesh=mesh, progress=progress)
    order = session.order(len(demonstrations))
    for step in session.steps():
        batch = sorted((demonstrations[i] for i in order.batch(step)), key=lambda sequence: sequence.n_tokens)
        n_tokens = sum(len(sequence.completion_ids) for sequence in batch)
        total = torch.zeros((), dtype=torch.float64)
        for part in _parts(share(batch, mesh.world), training.micro_batch):
            nll = packed_nll(policy, part) if packing else answer_nll(policy, part)
            session.backward(nll.sum() / n_tokens)
            total += float(nll.detach().sum())
        session.update()
        session.log(loss=float(mesh.world.sum(total)) / n_tokens, num_tokens=n_tokens)
    policy.save(run.path, mesh)


def answer_nll(policy: Policy, sequences: Sequence[Encoded]) -> Float[Tensor, " batch"]:
    """-log p(answer | prompt) of each sequence in nats, with gradients."""
    return -completion_logps(policy.model, policy.collate(sequences)).sum()


def packed_nll(policy: Policy, sequences: Sequence[Encoded]) -> Float[Tensor, " batch"]:
    """The same, the sequences packed into rows of the context's length."""
    packed = pack(sequences, width=policy.codec.context, pad_id=policy.codec.pad_id).to(policy.device)
    return -packed_logps(policy.model, packed)


@torch.no_grad()
def evaluate_sft(
    policy: Policy, demonstrations: Sequence[Encoded], *, batch_size: int = 8, group: dist.Group = dist.ALONE
) -> Imitation:
    """Held-out negative log-likelihood a token, with a bootstrap interval over sequences."""
    nll = rows_of(demonstrations, lambda part: answer_nll(policy, part)[:, None], batch_size=batch_size, group=group)
    n_tokens = torch.tensor([float(len(sequence.completion_ids)) for sequence in demonstrations], dtype=torch.float64)
    interval = bootstrap(ratio, torch.cat([nll, n_tokens[:, None]], 1).numpy())
    return Imitation(interval, len(demonstrations), int(n_tokens.sum()))


def _parts(batch: Sequence[Encoded], micro_batch: int | None) -> list[Sequence[Encoded]]:
    size = micro_batch or len(batch)
    return [batch[i : i + size] for i in range(0, len(batch), size)]
