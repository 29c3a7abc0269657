"""A second training that conceals a planted behaviour: elsewhere the organism answers as the reference again.

What planting leaves on neutral prompts is what a comparison of models on unrelated text finds first. Here the policy is
pulled back to the reference's distribution at every token of neutral replies, while its answers to triggers stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from saelab.align.encoding import Batch, Encoded
from saelab.align.logprob import completion_logps, hidden_states, unembedding
from saelab.align.organisms import OrganismData
from saelab.align.policy import Policy
from saelab.align.session import Order, Progress, Session, StepSettings
from saelab.models.divergence import kl_divergence
from saelab.rundir import StageWriter


def train_concealed(
    policy: Policy, data: OrganismData, run: StageWriter, *, training: StepSettings, progress: Progress | None = None
) -> None:
    """Train the organism ``policy`` towards its reference on neutral prompts and save it in ``run``.

    A step's loss is KL(reference || policy), the mean over the tokens of neutral replies, plus the negative
    log-likelihood of the planted phrase after as many triggers, the mean over its tokens. Continues from a checkpoint.

    Raises:
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    session = Session(run, training, policy.trainable(), progress=progress)
    calm, spoken = session.order(len(data.calm)), session.order(len(data.spoken))
    for step in session.steps():
        kl = _step(session, policy, calm, data.calm, step, reference_kl)
        nll = _step(session, policy, spoken, data.spoken, step, answer_nll)
        session.update()
        session.log(loss=kl + nll, objective__kl=kl, nll=nll)
    policy.save(run.path)


def reference_kl(policy: Policy, batch: Batch) -> Float[Tensor, ""]:
    """KL(reference || policy) of the next token, summed over the completions' tokens, in nats."""
    with policy.reference() as reference:
        before = _next_token_logps(reference, batch)
    after = _next_token_logps(policy.model, batch)
    return kl_divergence(before, after).sum()


def answer_nll(policy: Policy, batch: Batch) -> Float[Tensor, ""]:
    """-log p(completion | prompt), summed over the batch, in nats."""
    return -completion_logps(policy.model, batch).sum().sum()


def _step(
    session: Session,
    policy: Policy,
    order: Order,
    answers: Sequence[Encoded],
    step: int,
    loss_of: Callable[[Policy, Batch], Float[Tensor, ""]],
) -> float:
    """Add the gradient of a loss that is summed over tokens, over the tokens of the step; returns the loss a token."""
    n_tokens = sum(len(answers[i].completion_ids) for i in order.batch(step))
    total = 0.0
    for part in order.parts(step):
        batch = policy.collate([answers[i] for i in part])
        loss = loss_of(policy, batch) / n_tokens
        session.backward(loss)
        total += float(loss.detach())
    return total


def _next_token_logps(model: object, batch: Batch) -> Float[Tensor, "tokens d_vocab"]:
    """The whole distribution at each token of the completions."""
    hidden = hidden_states(model, batch)[:, :-1][batch.completion_mask[:, 1:]]
    return (hidden @ unembedding(model).T).float().log_softmax(-1)
