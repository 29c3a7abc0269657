"""The reward model: a language model's body and one number read at the last token of an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab import atomic, dist
from saelab.align.encoding import Batch, Encoded, EncodedPair
from saelab.align.logprob import hidden_states
from saelab.align.losses.reward import bradley_terry_loss
from saelab.align.parallel import rows_of
from saelab.align.policy import Policy, PolicyConfig, load_policy
from saelab.align.session import Progress, Session, StepSettings
from saelab.errors import ArtifactError
from saelab.rundir import StageWriter
from saelab.stats import Interval, interval_of_mean


class RewardModel:
    """Scores answers: ``(head(hidden at the last token) - mean) / deviation``."""

    def __init__(self, policy: Policy, head: nn.Linear) -> None:
        self.policy = policy
        self.head = head
        self.mean, self.deviation = 0.0, 1.0

    @classmethod
    def fresh(cls, policy: Policy, *, seed: int = 0) -> RewardModel:
        """A head with weights of deviation 1 / sqrt(d_model + 1) on the body of ``policy``.

        Stiennon et al. 2020, arXiv 2009.01325, appendix B.1: for inputs of deviation 1, scores start with deviation 1.
        """
        d_model = policy.model.get_output_embeddings().weight.shape[1]
        head = nn.Linear(d_model, 1)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            head.weight.copy_(torch.randn(1, d_model, generator=generator) / (d_model + 1) ** 0.5)
            head.bias.zero_()
        return cls(policy, head.to(policy.device))

    def trainable(self) -> dict[str, nn.Parameter]:
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return self.policy.trainable() | head

    def raw_scores(self, sequences: Sequence[Encoded]) -> Float[Tensor, " batch"]:
        """What the head says at the last token of each answer, with gradients."""
        batch = self.policy.collate(sequences)
        return self.raw_scores_of(batch)

    def raw_scores_of(self, batch: Batch) -> Float[Tensor, " batch"]:
        hidden = hidden_states(self.policy.model, batch)
        # from the lengths: pad may be the EOS token, and padding on the right moves nothing
        last = hidden[torch.arange(len(batch), device=hidden.device), batch.n_total - 1]
        return self.head(last.to(self.head.weight.dtype))[:, 0]

    @torch.no_grad()
    def scores(
        self, sequences: Sequence[Encoded], *, batch_size: int = 16, group: dist.Group = dist.ALONE
    ) -> Float[Tensor, " answers"]:
        """Normalised scores: mean 0 and deviation 1 over the answers that ``normalise_`` saw."""
        raw = rows_of(sequences, lambda part: self.raw_scores(part)[:, None], batch_size=batch_size, group=group)
        return (raw[:, 0].float() - self.mean) / self.deviation

    def normalise_(self, sequences: Sequence[Encoded], *, batch_size: int = 16, group: dist.Group = dist.ALONE) -> None:
        """Make the scores of ``sequences``, answers of the policy before training, have mean 0 and deviation 1.

        A Bradley-Terry reward is known up to a constant only, and a policy that is trained on it should not have to
        learn that constant (Ziegler et al. 2019, arXiv 1909.08593, section 2.1).
        """
        self.mean, self.deviation = 0.0, 1.0
        scores = self.scores(sequences, batch_size=batch_size, group=group).double()
        self.mean = float(scores.mean())
        self.deviation = float(scores.std()) if len(scores) > 1 and float(scores.std()) > 0 else 1.0

    def save(self, path: Path, mesh: dist.Mesh = dist.ONE_PROCESS) -> None:
        """Write body or adapter, head and normalisation; every process of ``mesh`` calls it, and the first writes."""
        from safetensors.torch import save_file

        self.policy.save(path, mesh)

        def write() -> None:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
            with atomic.replacing(path / "reward_head.safetensors") as temporary:
                save_file(tensors, temporary)
            atomic.write_json(path / "reward.json", {"mean": self.mean, "deviation": self.deviation})

        dist.on_first(mesh, write)


def load_reward_model(path: Path, config: PolicyConfig, *, device: str | None = None) -> RewardModel:
    """The reward model that ``train_reward`` wrote to ``path``, frozen; ``config`` says how to read its body.

    Raises:
        ArtifactError: there is none, or a file of it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path / "reward_head.safetensors")
        normalisation = json.loads((path / "reward.json").read_text("utf-8"))
        mean, deviation = float(normalisation["mean"]), float(normalisation["deviation"])
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} holds no reward model ({error.filename} is missing); train one first") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the reward model in {path} is damaged ({error}); train it again") from error
    policy = load_policy(config, device=device, trainable=False)
    head = nn.Linear(tensors["weight"].shape[1], 1)
    head.load_state_dict(tensors)
    model = RewardModel(policy, head.to(policy.device).requires_grad_(False))
    model.mean, model.deviation = mean, deviation
    return model


class RewardQuality(NamedTuple):
    """Agreement with held-out preferences."""

    accuracy: Interval
    """Share of pairs whose chosen answer scores higher."""
    calibration_error: float
    """Mean gap between sigma(margin) and the share that is right, over ten bins of the margin weighted by size."""
    length_accuracy: float
    """What "the longer answer is better" reaches on the same pairs: the baseline that a reward model must beat."""
    n_pairs: int


def train_reward(
    reward: RewardModel,
    pairs: Sequence[EncodedPair],
    run: StageWriter,
    *,
    training: StepSettings,
    margins: Sequence[float] | None = None,
    centring: float = 0.01,
    mesh: dist.Mesh = dist.ONE_PROCESS,
    progress: Progress | None = None,
) -> None:
    """Train on preferences and save in ``run``; normalised so that the chosen answers have mean 0 and deviation 1.

    Raises:
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    if training.shard:
        reward.policy.shard_(mesh)
    session = Session(run, training, reward.trainable(), mesh=mesh, progress=progress)
    order = session.order(len(pairs))
    given = torch.zeros(len(pairs)) if margins is None else torch.tensor(list(margins), dtype=torch.float32)
    for step in session.steps():
        means = session.means()
        for part in order.parts(step):
            chosen, rejected = _pair_scores(reward, [pairs[i] for i in part])
            margin = given[torch.from_numpy(part)].to(chosen.device)
            result = bradley_terry_loss(chosen, rejected, margin=margin, centring=centring)
            session.backward(result.loss.sum() / training.batch_size)
            right = (result.margins > 0).float()
            means.add(loss=result.loss, accuracy=right, margin=result.margins, mean_reward=(chosen + rejected) / 2)
        session.update()
        session.log(**means.means())
    reward.normalise_([pair.chosen for pair in pairs[:256]], group=mesh.world)
    reward.save(run.path, mesh)


@torch.no_grad()
def evaluate_reward(
    reward: RewardModel, pairs: Sequence[EncodedPair], *, batch_size: int = 8, group: dist.Group = dist.ALONE
) -> RewardQuality:
    """Accuracy with a bootstrap interval over pairs, calibration, and the length baseline."""
    scores = rows_of(pairs, lambda part: torch.stack(_pair_scores(reward, part), 1), batch_size=batch_size, group=group)
    margin = (scores[:, 0] - scores[:, 1]).numpy()
    right = (margin > 0).astype(float)
    accuracy = interval_of_mean(right)
    longer = [float(len(p.chosen.completion_ids) > len(p.rejected.completion_ids)) for p in pairs]
    return RewardQuality(accuracy, _calibration_error(margin), float(np.mean(longer)), len(pairs))


def _pair_scores(
    reward: RewardModel, pairs: Sequence[EncodedPair]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    both = reward.raw_scores([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    chosen, rejected = both.chunk(2)
    return chosen, rejected


def _calibration_error(margin: Float[np.ndarray, " pairs"], *, n_bins: int = 10) -> float:
    """Expected calibration error with bins of equal size (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    The preferred answer is called by the sign of the margin, with confidence sigma(|margin|).
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(margin))), margin > 0
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(n_bins, len(margin)))
    gaps = [len(b) * abs(confidence[b].mean() - right[b].mean()) for b in bins]
    return float(sum(gaps) / len(margin))
