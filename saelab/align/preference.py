"""Preference optimisation on pairs: DPO, its relatives and their weighted mixes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import dist
from saelab.align.encoding import Batch, EncodedPair
from saelab.align.logprob import (
    CompletionLogps,
    hidden_states,
    log_collisions,
    logps_of_hidden,
    unembedding,
)
from saelab.align.losses import pairwise, reference_free
from saelab.align.losses.pairwise import PairLogps, PreferenceLoss
from saelab.align.parallel import rows_of
from saelab.align.policy import Policy
from saelab.align.session import Progress, Session, StepSettings
from saelab.errors import ConfigError
from saelab.rundir import StageWriter
from saelab.stats import Interval, interval_of_mean

_log = logging.getLogger(__name__)

LossName = Literal[
    "sigmoid",
    "sigmoid_norm",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "ipo_sum",
    "exo",
    "nca",
    "bco",
    "apo_zero",
    "apo_down",
    "sppo",
    "dpop",
    "aot",
    "aot_unpaired",
    "discopop",
    "nll",
    "simpo",
    "cpo",
]
DivergenceName = Literal["reverse_kl", "forward_kl", "jensen_shannon"]

#: After so many steps with most of the chosen answers less probable than before, a warning is due.
_DISPLACED_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Which loss, or which weighted mix of losses."""

    terms: dict[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    """Losses by name, with their weights: {sigmoid = 1.0, nll = 0.1} is DPO that keeps the chosen answers probable."""
    beta: float = 0.1
    """Strength of the pull to the reference; of simpo and cpo, the scale of the rewards."""
    label_smoothing: float = 0.1
    """Probability that a label is wrong (cdpo, robust), or the smoothing of exo."""
    divergence: DivergenceName = "reverse_kl"
    """The divergence from the reference (sigmoid)."""
    gamma: float = 0.5
    """Margin that the chosen shall win by (simpo)."""
    alpha: float = 1.0
    """Weight of the likelihood of the chosen (cpo)."""
    penalty: float = 5.0
    """Weight of a fall of the chosen below the reference (dpop)."""
    length_alpha: float | None = None
    """Weight of an answer's tokens beyond the length of the other (LD-DPO). Off: all weigh 1."""
    on_policy: bool = False
    """Weigh a pair by how well the policy itself could have written it (WPO)."""

    def __post_init__(self) -> None:
        known = LossName.__args__  # type: ignore[attr-defined]
        unknown = [name for name in self.terms if name not in known]
        if unknown or not self.terms:
            wrong = f"{unknown[0]!r} is no loss" if unknown else "loss.terms is empty"
            raise ConfigError(f"{wrong}; choose of {', '.join(known)}")
        if not self.beta > 0:
            raise ConfigError(f"loss.beta must be above 0, got {self.beta}; 0.1 is usual")
        if self.length_alpha is not None and not 0 <= self.length_alpha <= 1:
            raise ConfigError(f"loss.length_alpha must lie between 0 and 1, got {self.length_alpha}; 0.5 is usual")

    @property
    def needs_reference(self) -> bool:
        return any(name not in ("simpo", "cpo", "nll") for name in self.terms)


def preference_loss(pairs: PairLogps, settings: LossSettings, *, mean_length: float | None = None) -> PreferenceLoss:
    """The weighted sum of the losses that ``settings`` name; the rewards are those of the first.

    ``mean_length`` is that of the chosen answers of the whole batch in tokens, where ``pairs`` are a part of it.
    """
    parts = [_term(name, pairs, settings, mean_length) for name in settings.terms]
    total = sum(weight * part.loss for weight, part in zip(settings.terms.values(), parts, strict=True))
    assert isinstance(total, Tensor)
    return parts[0]._replace(loss=total)


def _term(name: str, pairs: PairLogps, settings: LossSettings, mean_length: float | None) -> PreferenceLoss:
    beta = settings.beta
    match name:
        case "sigmoid":
            return pairwise.sigmoid_loss(pairs, beta=beta, divergence=getattr(pairwise, settings.divergence))
        case "cdpo":
            return pairwise.conservative_loss(pairs, beta=beta, label_smoothing=settings.label_smoothing)
        case "robust":
            return pairwise.robust_loss(pairs, beta=beta, label_smoothing=settings.label_smoothing)
        case "exo":
            return pairwise.exo_loss(pairs, beta=beta, label_smoothing=settings.label_smoothing)
        case "dpop":
            return pairwise.dpop_loss(pairs, beta=beta, penalty=settings.penalty)
        case "simpo":
            lengths = (pairs.n_chosen, pairs.n_rejected)
            return reference_free.simpo_loss(pairs.chosen, pairs.rejected, *lengths, beta=beta, gamma=settings.gamma)
        case "cpo":
            return reference_free.cpo_loss(
                pairs.chosen, pairs.rejected, pairs.n_chosen, beta=beta, alpha=settings.alpha, mean_length=mean_length
            )
        case "nll":
            return pairwise.nll_loss(pairs, beta=beta, mean_length=mean_length)
        case _:
            return _PLAIN[name](pairs, beta=beta)


_PLAIN = {
    "sigmoid_norm": pairwise.normalised_sigmoid_loss,
    "hinge": pairwise.hinge_loss,
    "ipo": pairwise.ipo_loss,
    "ipo_sum": pairwise.ipo_sum_loss,
    "nca": pairwise.nca_loss,
    "bco": pairwise.bco_loss,
    "apo_zero": pairwise.apo_zero_loss,
    "apo_down": pairwise.apo_down_loss,
    "sppo": pairwise.sppo_loss,
    "aot": pairwise.aot_loss,
    "aot_unpaired": pairwise.aot_unpaired_loss,
    "discopop": pairwise.discovered_loss,
}


class ReferenceLogps(NamedTuple):
    """What the reference gives to both answers of every record, in nats."""

    chosen: Float[Tensor, " records"]
    rejected: Float[Tensor, " records"]


class HeldOut(NamedTuple):
    """How the trained policy orders pairs it never saw."""

    accuracy: Interval
    """Share of pairs whose chosen answer gained more log-probability than the rejected one."""
    margin: Interval
    """Mean of beta times the difference of the two gains."""
    chosen_shift: Interval
    """Mean change of the chosen answers' log-probability in nats; far below 0, the training took it from them too."""
    n_pairs: int


def train_preference(
    policy: Policy,
    pairs: Sequence[EncodedPair],
    run: StageWriter,
    *,
    loss: LossSettings,
    training: StepSettings,
    mesh: dist.Mesh = dist.ONE_PROCESS,
    progress: Progress | None = None,
) -> None:
    """Train ``policy`` on ``pairs`` and save it in ``run``; continues from the latest checkpoint.

    The log-probabilities of the reference are computed once, before the first step.

    Raises:
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    divided = training.micro_batch not in (None, training.batch_size) or mesh.world.size > 1
    if divided and {"aot", "aot_unpaired"} & set(loss.terms):
        raise ConfigError(
            "aot compares all pairs of a batch, which parts of it cannot; leave training.micro_batch, or torchrun, out"
        )
    if training.shard:
        policy.shard_(mesh)
    batch_size = training.micro_batch or training.batch_size
    alpha = loss.length_alpha
    reference = reference_logps(policy, pairs, batch_size=batch_size, length_alpha=alpha, group=mesh.world)
    session = Session(run, training, policy.trainable(), mesh=mesh, progress=progress)
    order = session.order(len(pairs))
    displaced = 0
    for step in session.steps():
        means = session.means()
        mean_length = _mean_chosen_length(pairs, order.batch(step))
        for part in order.parts(step):
            some = [pairs[i] for i in part]
            read = _read(policy.model, some, policy)
            logps = _beside(read.logps, reference, torch.from_numpy(part), alpha)
            result = preference_loss(logps, loss, mean_length=mean_length)
            if loss.on_policy:
                result = result._replace(loss=result.loss * pair_weights(read, unembedding(policy.model)))
            means.add(**_metrics(logps, result))
            session.backward(result.loss.sum() / training.batch_size)
        session.update()
        metrics = means.means()
        session.log(**metrics)
        displaced = displaced + 1 if metrics["logps__chosen_fallen"] > 0.5 else 0
        if displaced == _DISPLACED_STEPS:
            _log.warning(
                "for %d steps most chosen answers have been less probable than under the reference (mean change %.1f "
                "nats): the probability goes elsewhere; add nll to loss.terms, or use dpop",
                displaced,
                metrics["logps__chosen_shift"],
            )
    policy.save(run.path, mesh)


def reference_logps(
    policy: Policy,
    pairs: Sequence[EncodedPair],
    *,
    batch_size: int,
    length_alpha: float | None = None,
    group: dist.Group = dist.ALONE,
) -> ReferenceLogps:
    """The log-probabilities of all answers under the reference."""
    with policy.reference() as reference:

        def both(part: Sequence[EncodedPair]) -> Float[Tensor, "part 2"]:
            return torch.stack(_sums(_read(reference, part, policy).logps, length_alpha).chunk(2), 1)

        columns = rows_of(pairs, both, batch_size=batch_size, group=group).float()
    return ReferenceLogps(columns[:, 0], columns[:, 1])


def pair_logps(
    model: Any,
    pairs: Sequence[EncodedPair],
    reference: ReferenceLogps,
    records: Int[Tensor, " batch"],
    policy: Policy,
    *,
    length_alpha: float | None = None,
) -> PairLogps:
    """The log-probabilities of some pairs under ``model``, with gradients, beside those of the reference.

    Chosen and rejected go through the model in one batch, so that both see the same numerics.
    """
    return _beside(_read(model, pairs, policy).logps, reference, records, length_alpha)


class ReadPairs(NamedTuple):
    """Some pairs as a model read them: first all chosen answers, then all rejected ones."""

    batch: Batch
    hidden: Float[Tensor, "answers seq d_model"]
    logps: CompletionLogps


def pair_weights(read: ReadPairs, W_U: Float[Tensor, "d_vocab d_model"]) -> Float[Tensor, " batch"]:
    """How well the model could have written both answers of each pair itself (WPO); without gradients."""
    collisions = log_collisions(read.hidden, W_U, read.batch)
    chosen, rejected = pairwise.on_policy_weights(read.logps.logps, collisions, read.logps.mask).chunk(2)
    return chosen * rejected


@torch.no_grad()
def evaluate_preference(
    policy: Policy,
    pairs: Sequence[EncodedPair],
    *,
    beta: float,
    batch_size: int = 8,
    group: dist.Group = dist.ALONE,
) -> HeldOut:
    """Held-out accuracy, margin and shift with bootstrap intervals over pairs."""
    reference = reference_logps(policy, pairs, batch_size=batch_size, group=group)

    def gains(records: Sequence[int]) -> Float[Tensor, "part 2"]:
        logps = pair_logps(policy.model, [pairs[i] for i in records], reference, torch.tensor(records), policy)
        return torch.stack([logps.chosen_ratio, logps.rejected_ratio], 1)

    chosen, rejected = rows_of(list(range(len(pairs))), gains, batch_size=batch_size, group=group).T
    return HeldOut(
        accuracy=interval_of_mean((chosen > rejected).double().numpy()),
        margin=interval_of_mean((beta * (chosen - rejected)).numpy()),
        chosen_shift=interval_of_mean(chosen.numpy()),
        n_pairs=len(pairs),
    )


def _read(model: Any, pairs: Sequence[EncodedPair], policy: Policy) -> ReadPairs:
    batch = policy.collate([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    hidden = hidden_states(model, batch)
    return ReadPairs(batch, hidden, logps_of_hidden(hidden, unembedding(model), batch))


def _beside(
    logps: CompletionLogps, reference: ReferenceLogps, records: Int[Tensor, " batch"], length_alpha: float | None
) -> PairLogps:
    """The pairs numbered ``records`` beside what the reference makes of them."""
    sums, lengths = _sums(logps, length_alpha), logps.mask.sum(1)
    ref = [column[records].to(sums.device) for column in reference]
    return PairLogps(*sums.chunk(2), *ref, *lengths.chunk(2))


def _sums(logps: CompletionLogps, length_alpha: float | None) -> Float[Tensor, " batch"]:
    """Of the chosen answers and then of the rejected ones."""
    if length_alpha is None:
        return logps.sum()
    shorter = torch.minimum(*logps.mask.sum(1).chunk(2)).repeat(2)
    return pairwise.length_desensitised(logps.logps, logps.mask, shorter, alpha=length_alpha)


def _metrics(pairs: PairLogps, result: PreferenceLoss) -> dict[str, Float[Tensor, " batch"]]:
    """Under TRL's names; the two that show displacement are ours."""
    margins = result.chosen_rewards - result.rejected_rewards
    return {
        "loss": result.loss,
        "rewards__chosen": result.chosen_rewards,
        "rewards__rejected": result.rejected_rewards,
        "rewards__margins": margins,
        "rewards__accuracies": (margins > 0).float(),
        "logps__chosen": pairs.chosen,
        "logps__rejected": pairs.rejected,
        "logps__chosen_shift": pairs.chosen_ratio,
        "logps__chosen_fallen": (pairs.chosen_ratio < 0).float(),
    }


def _mean_chosen_length(pairs: Sequence[EncodedPair], records: Any) -> float:
    return sum(len(pairs[i].chosen.completion_ids) for i in records) / len(records)
