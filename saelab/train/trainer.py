"""The state of one training run and the step that changes it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.activations.moments import ActivationStats
from saelab.checkpoint import Checkpoint
from saelab.errors import ConfigError, TrainingError
from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE, Metadata, SAELoss
from saelab.train.config import TrainConfig
from saelab.train.dead import DeadFeatures
from saelab.train.fused import fused_step_
from saelab.train.normaliser import Normaliser
from saelab.train.optim import adam, restore_state_, state_tensors
from saelab_kernels import choose


@runtime_checkable
class ActivationBatches(Protocol):
    """What training needs of its data: a batch is a function of the step alone, so a resumed run sees the same ones."""

    @property
    def d_in(self) -> int: ...

    def at(self, step: int) -> Float[Tensor, "batch *slots d_in"]: ...

    def statistics(self, max_tokens: int) -> ActivationStats | tuple[ActivationStats, ...]:
        """One for each slot, where a token has several."""
        ...


class Trainer:
    """All state that a step changes, in one place: what is here is in the checkpoint, and nothing else matters."""

    def __init__(self, config: TrainConfig, batches: ActivationBatches, device: str | torch.device) -> None:
        self.config, self.device = config, torch.device(device)
        self.step = 0
        self.grad_norm = self.lr = 0.0
        at_origin = getattr(config.sae, "b_dec", None) == "zero"
        self.stats = batches.statistics(config.stats_tokens)
        self.normalise = Normaliser.fitted(self.stats, centre=config.centre and not at_origin).to(self.device)
        generator = torch.Generator().manual_seed(config.seed)
        self.sae = new_sae(config.sae, d_in=batches.d_in, generator=generator).to(self.device)
        self._check_slots()
        self.optimizer = adam(self.sae, config.optim)
        k = getattr(config.sae, "k", config.sae.d_sae)
        self.sparse_gradients = choose(self.device, n_features=config.sae.d_sae, k=k).name != "reference"
        self.dead = DeadFeatures(config.sae.d_sae, window_tokens=config.dead_window)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.n_steps

    def advance(self, raw_acts: Float[Tensor, "batch *slots d_in"]) -> SAELoss:
        """One step of Adam on the batch of ``self.step``."""
        config = self.config
        acts = self.normalise(raw_acts)
        self.lr = config.optim.lr_at(self.step, n_steps=config.n_steps, d_sae=config.sae.d_sae)
        losses = self._update(acts, self.dead.mask.to(self.device))
        self.dead.update(losses.fired, n_tokens=len(acts))
        self.step += 1
        return losses._replace(total=losses.total.detach())

    def _update(self, acts: Float[Tensor, "batch *slots d_in"], dead: Bool[Tensor, " d_sae"]) -> SAELoss:
        """Change the weights: without gradient tensors where the architecture and the kernels' path allow it."""
        progress = self.step / max(1, self.config.n_steps - 1)
        if self.sparse_gradients:
            gradient = self.sae.training_gradient(acts, dead=dead, progress=progress)
            if gradient is not None:
                self._check_finite(acts, gradient.losses)
                norm = fused_step_(self.sae, self.optimizer, gradient.sparse, self.config.optim, lr=self.lr)
                self.grad_norm = float(norm)
                return gradient.losses
        losses = self.sae.training_loss(acts, dead=dead, progress=progress)
        self._check_finite(acts, losses)
        losses.total.backward()
        self.sae.project_decoder_grad_()
        limit = self.config.optim.clip_norm if self.config.optim.clip_norm is not None else math.inf
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(self.sae.parameters(), limit))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sae.normalise_decoder_()
        return losses

    def record(self, losses: SAELoss) -> dict[str, float | int]:
        """The line of metrics.jsonl for the step just made."""
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "loss": float(losses.total),
            "reconstruction": float(losses.reconstruction),
            "sparsity": float(losses.sparsity),
            "aux": float(losses.aux),
            "l0": float(losses.l0),
            "n_dead": int(self.dead.mask.sum()),
            "lr": self.lr,
            "grad_norm": self.grad_norm,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs: weights, Adam's state, dead-feature counters, normalisation."""
        named = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        named |= {f"adam.{name}": value for name, value in state_tensors(self.optimizer, self.sae).items()}
        named["silent_tokens"] = self.dead.silent_tokens
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}

    def restore(self, saved: Checkpoint) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v.to(self.device) for k, v in saved.tensors.items() if k.startswith(prefix)}

        self.sae.load_state_dict(under("sae."))
        restore_state_(self.optimizer, self.sae, under("adam."))
        self.dead.silent_tokens = saved.tensors["silent_tokens"]
        self.step = saved.step

    @torch.inference_mode()
    def density(self, batches: ActivationBatches, n_batches: int = 20) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each feature fires, over the first batches of the data."""
        fired, n_tokens = torch.zeros(self.config.sae.d_sae), 0
        for step in range(n_batches):
            acts = self.normalise(batches.at(step).to(self.device))
            fired += (self.sae.encode(self.sae.read_slots(acts)) != 0).sum(0).cpu()
            n_tokens += len(acts)
        return fired / n_tokens

    def finish(self, metadata: Metadata) -> SAE:
        """The trained SAE, working on raw activations."""
        self.sae.fold_(self.normalise.mean, self.normalise.scale)
        stats = self.stats[-1] if isinstance(self.stats, tuple) else self.stats
        self.sae.metadata = replace(metadata, mean_norm=stats.mean_norm, activation_scale=self.normalise.output_scale)
        return self.sae.eval()

    def _check_slots(self) -> None:
        given = len(self.stats) if isinstance(self.stats, tuple) else None
        if given != self.sae.n_slots:
            raise ConfigError(
                f"architecture {self.config.sae.arch!r} is trained on {self.sae.n_slots or 1} activations a token, "
                f"but the batches hold {given or 1}; choose as many hooks or stores as it needs"
            )

    def _check_finite(self, acts: Float[Tensor, "batch *slots d_in"], losses: SAELoss) -> None:
        if not torch.isfinite(losses.total):
            raise TrainingError(self._not_finite(acts, losses))

    def _not_finite(self, acts: Float[Tensor, "batch *slots d_in"], losses: SAELoss) -> str:
        first, last = self.step * self.config.batch_size, (self.step + 1) * self.config.batch_size - 1
        bad = int((~torch.isfinite(acts)).flatten(1).any(1).sum())
        cause = (
            f"{bad} of its activations are not finite, so look at the data"
            if bad
            else "lower optim.lr or set optim.clip_norm"
        )
        return (
            f"the loss became {float(losses.total.detach())} at step {self.step} "
            f"(batch of tokens {first} to {last} in the order "
            f"of seed {self.config.seed}); {cause}; the last checkpoint is untouched"
        )
