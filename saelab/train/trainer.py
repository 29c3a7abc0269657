"""The state of one training run and the step that changes it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.adam import restore_state_, state_tensors
from saelab.checkpoint import Checkpoint
from saelab.errors import ConfigError, DistributedError, TrainingError
from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE, Metadata, SAELoss
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.train.config import TrainConfig
from saelab.train.dead import DeadFeatures
from saelab.train.ema import WeightAverage
from saelab.train.end_to_end import OutputLoss
from saelab.train.fused import fused_step_
from saelab.train.halves import backward_in_halves, can_be_halved
from saelab.train.l0 import L0Controller
from saelab.train.nonfinite import NotFinite, is_finite
from saelab.train.normaliser import Normaliser
from saelab.train.optim import adam, set_lr_
from saelab.train.parallel import ALONE, ActivationBatches, Layout, clip_gradients_, over_all_tokens
from saelab.train.saturation import SaturationAlarm
from saelab_kernels import SparseGrads, choose

_log = logging.getLogger(__name__)


class OutOfMemory(TrainingError):
    """A step does not fit into memory, not even in halves; the weights are those of the step before."""


class Trainer:
    """All state that a step changes, in one place: what is here is in the checkpoint, and nothing else matters."""

    def __init__(
        self,
        config: TrainConfig,
        batches: ActivationBatches,
        device: str | torch.device,
        layout: Layout = ALONE,
        output_loss: OutputLoss | None = None,
    ) -> None:
        self.config, self.device, self.layout = config, torch.device(device), layout
        self.output_loss, self.output_kl = output_loss, math.nan
        self._check_output_loss()
        self.step = 0
        self.grad_norm = self.lr = 0.0
        at_origin = getattr(config.sae, "b_dec", None) == "zero"
        self.stats = batches.statistics(config.stats_tokens)
        self.normalise = Normaliser.fitted(self.stats, centre=config.centre and not at_origin).to(self.device)
        generator = torch.Generator().manual_seed(config.seed)
        self.sae = layout.place(new_sae(config.sae, d_in=batches.d_in, generator=generator).to(self.device))
        self._check_slots()
        self.optimizer = adam(self.sae, config.optim)
        k = getattr(config.sae, "k", config.sae.d_sae)
        tuned = choose(self.device, n_features=config.sae.d_sae, k=k).name != "reference"
        self.sparse_gradients = tuned and layout.keeps_gradients and output_loss is None
        self.dead = DeadFeatures(config.sae.d_sae, window_tokens=config.dead_window)
        self.average = None if config.ema_decay is None else WeightAverage(self.sae, decay=config.ema_decay)
        self.controller: L0Controller | None = None
        if config.target_l0 is not None:
            self.controller = L0Controller(config.sae, target=config.target_l0, n_steps=config.n_steps)
        self.alarm = SaturationAlarm() if isinstance(config.sae, JumpReLUConfig) else None
        self.halved = False
        self.n_skipped = self.skipped_in_a_row = 0
        self._warn_of_offset()

    @property
    def finished(self) -> bool:
        return self.step >= self.config.n_steps

    @property
    def progress(self) -> float:
        """Share of the training that is done, 1 at the last step."""
        return self.step / max(1, self.config.n_steps - 1)

    def advance(self, raw_acts: Float[Tensor, "batch *slots d_in"]) -> SAELoss:
        """One step of Adam on the batch of ``self.step``; a batch that is skipped changes nothing.

        Raises:
            NotFinite: the loss or the gradient is not finite, and such batches are not to be skipped, or too many were.
            OutOfMemory: the step does not fit into memory; it can be asked for again.
        """
        acts = self.normalise(raw_acts)
        self.lr = self.config.optim.lr_at(self.step, n_steps=self.config.n_steps, d_sae=self.config.sae.d_sae)
        if self.controller is not None:
            self.controller.apply_(self.sae)
        buffers = [buffer.clone() for buffer in self.sae.buffers()]
        losses, sparse = self._gradient(acts, buffers)
        if torch.isfinite(losses.total) and self._gradient_is_finite(sparse):
            self._update(sparse)
            self._take_note(losses, n_tokens=len(acts) * self.layout.mesh.data.size)
        else:
            self._undo_(buffers)
            self._count_skip(acts, losses)
        self.step += 1
        return losses._replace(total=losses.total.detach())

    def _gradient(
        self, acts: Float[Tensor, "batch *slots d_in"], buffers: list[Tensor]
    ) -> tuple[SAELoss, SparseGrads | None]:
        """The losses of a batch and their gradient: in factors, or where there is None in the parameters."""
        while (made := self._gradient_if_it_fits(acts)) is None:  # here its tensors are free again
            self._undo_(buffers)
            self._halve_(len(acts))
        return made

    def _gradient_if_it_fits(
        self, acts: Float[Tensor, "batch *slots d_in"]
    ) -> tuple[SAELoss, SparseGrads | None] | None:
        dead, progress = self.dead.mask.to(self.device), self.progress
        try:
            if self.halved:
                losses = self._with_output(backward_in_halves(self.sae, acts, dead=dead, progress=progress))
                if losses.total.requires_grad:  # the output's part of it
                    losses.total.backward()
                return losses, None
            if self.sparse_gradients:
                gradient = self.sae.training_gradient(acts, dead=dead, progress=progress)
                if gradient is not None:
                    return gradient.losses, gradient.sparse
            losses = self._with_output(self.sae.training_loss(acts, dead=dead, progress=progress))
            of_batch = over_all_tokens(losses, self.layout.mesh.data)
            if torch.isfinite(of_batch.total):
                losses.total.backward()
                self.layout.average_gradients_(self.sae)
            return of_batch, None
        except torch.OutOfMemoryError:
            return None

    def _with_output(self, losses: SAELoss) -> SAELoss:
        """``losses`` with what the model's output adds to their total, where that is asked for."""
        if self.output_loss is None:
            return losses
        kl = self.output_loss.divergence(self.sae, self.normalise, step=self.step)
        self.output_kl = float(kl.detach())
        return losses._replace(total=losses.total + self.output_loss.coefficient * kl)

    def _gradient_is_finite(self, sparse: SparseGrads | None) -> bool:
        """Clips a gradient of tensors on the way."""
        if sparse is not None:
            return is_finite(sparse)
        self.sae.project_decoder_grad_()
        self.grad_norm = clip_gradients_(self.sae, self.config.optim.norm_limit(self.sae.d_in))
        return math.isfinite(self.grad_norm)

    def _update(self, sparse: SparseGrads | None) -> None:
        """Change the weights."""
        if sparse is not None:
            self.grad_norm = float(fused_step_(self.sae, self.optimizer, sparse, self.config.optim, lr=self.lr))
            return
        set_lr_(self.optimizer, self.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sae.normalise_decoder_()

    def _take_note(self, losses: SAELoss, *, n_tokens: int) -> None:
        """What a step changes besides weights and optimiser."""
        self.dead.update(losses.fired, n_tokens=n_tokens)
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.sae)
        if self.controller is not None:
            self.controller.update(float(losses.l0), progress=self.progress)
        if self.alarm is not None:
            coefficient = self.sae.cfg.coefficient_at(self.progress)  # type: ignore[attr-defined]
            self.alarm.watch(losses, coefficient=coefficient, progress=self.progress)

    @torch.no_grad()
    def _undo_(self, buffers: list[Tensor]) -> None:
        """Forget the gradient of a step that was not made, and what the loss wrote into buffers."""
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.sae.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _halve_(self, n_tokens: int) -> None:
        """From now on compute gradients in two halves.

        Raises:
            OutOfMemory: they are in halves already, or the loss is not one that halves can give.
            DistributedError: several processes work together, of which the others are elsewhere in the step.
        """
        if not self.layout.keeps_gradients:
            raise DistributedError(
                f"step {self.step} does not fit into the memory of process {self.layout.mesh.world.rank}; "
                "continue from the last checkpoint with more processes"
            )
        cure = f"start anew with a batch_size below {n_tokens} or a smaller d_sae"
        if self.halved:
            raise OutOfMemory(f"step {self.step} does not fit into memory, not even in two halves; {cure}")
        if self.output_loss is not None:
            raise OutOfMemory(f"step {self.step} does not fit into memory; {cure}, or a lower end_to_end.rows")
        if not can_be_halved(self.config.sae):
            raise OutOfMemory(
                f"step {self.step} does not fit into memory, and the loss of {self.config.sae.arch!r} is one of the "
                f"whole batch, which its halves cannot give; {cure}"
            )
        _log.warning("step %d does not fit into memory; from here on its gradient is computed in halves", self.step)
        self.halved = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _count_skip(self, acts: Float[Tensor, "batch *slots d_in"], losses: SAELoss) -> None:
        if self.config.on_nonfinite == "raise":
            raise NotFinite(self._not_finite(acts, losses))
        self.n_skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.max_skips:
            raise NotFinite(
                f"{self._not_finite(acts, losses)} (after {self.config.max_skips} skipped batches in a row)"
            )

    def record(self, losses: SAELoss) -> dict[str, float | int]:
        """The line of metrics.jsonl for the step just made; what is not finite, of a skipped one, is left out."""
        line: dict[str, float | int] = {
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
        if self.config.on_nonfinite == "skip":
            line["n_skipped"] = self.n_skipped
        if self.output_loss is not None:
            line["kl"] = self.output_kl
        if self.controller is not None:
            line |= {"coefficient": self.controller.coefficient, "saturated": int(self.controller.saturated)}
        return {name: value for name, value in line.items() if math.isfinite(value)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs: weights, Adam's state, counters, the average and the controller."""
        named = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        named |= {
            f"adam.{name}": value for name, value in state_tensors(self.optimizer, self.sae.named_parameters()).items()
        }
        named["silent_tokens"] = self.dead.silent_tokens
        named["counters"] = torch.tensor([self.n_skipped, self.skipped_in_a_row, int(self.halved)])
        for prefix, part in (("ema", self.average), ("l0", self.controller)):
            if part is not None:
                named |= {f"{prefix}.{name}": value for name, value in part.tensors().items()}
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}

    def restore(self, saved: Checkpoint) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v.to(self.device) for k, v in saved.tensors.items() if k.startswith(prefix)}

        self.sae.load_state_dict(under("sae."))
        restore_state_(self.optimizer, self.sae.named_parameters(), under("adam."))
        self.dead.silent_tokens = saved.tensors["silent_tokens"]
        self.n_skipped, self.skipped_in_a_row, halved = saved.tensors["counters"].tolist()
        self.halved = bool(halved) and self.layout.keeps_gradients
        if self.average is not None:
            self.average.restore_(under("ema."))
        if self.controller is not None:
            self.controller.restore_(under("l0."))
        self.step = saved.step

    @torch.inference_mode()
    def density(self, batches: ActivationBatches, n_batches: int = 20) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each feature fires, over the first batches of the data."""
        fired, n_tokens = torch.zeros(self.config.sae.d_sae), 0
        for step in range(n_batches):
            acts = self.normalise(batches.at(step).to(self.device))
            fired += self.layout.firing_counts(self.sae, acts).cpu()
            n_tokens += len(acts) * self.layout.mesh.data.size
        return fired / n_tokens

    def use_average_(self) -> None:
        """Make the running mean the weights, where one is kept. Call it when training is over."""
        if self.average is not None:
            self.average.put_into_(self.sae)

    def finish(self, metadata: Metadata) -> SAE:
        """The trained SAE, working on raw activations."""
        self.sae = self.layout.whole(self.sae)
        self.sae.cfg = self.config.sae  # as it was asked for, whatever the controller made of its coefficient
        self.sae.fold_(self.normalise.mean, self.normalise.scale)
        stats = self.stats[-1] if isinstance(self.stats, tuple) else self.stats
        self.sae.metadata = replace(
            metadata,
            mean_norm=stats.mean_norm,
            activation_scale=self.normalise.output_scale,
            extra={**metadata.extra, "gamma": stats.gamma},
        )
        return self.sae.eval()

    def _warn_of_offset(self) -> None:
        """A mean that is longer than the spread about it points all tokens at the same features, and the rest die."""
        gamma = max(stats.gamma for stats in (self.stats if isinstance(self.stats, tuple) else (self.stats,)))
        if gamma > 1 and not self.normalise.mean.any():
            _log.warning(
                "the activations' mean is %.1f times as long as their spread and is not taken off, which predicts dead "
                "features (arXiv 2605.31518); set centre = true", gamma,
            )  # fmt: skip

    def _check_output_loss(self) -> None:
        if (self.output_loss is None) != (self.config.end_to_end is None):
            given = "no model was given to it" if self.output_loss is None else "end_to_end is not set"
            raise ConfigError(f"end-to-end training needs both its settings and the model, but {given}; give both")
        if self.output_loss is not None and not self.layout.keeps_gradients:
            raise ConfigError("end_to_end is for training in one process; start it without torchrun")

    def _check_slots(self) -> None:
        given = len(self.stats) if isinstance(self.stats, tuple) else None
        if given != self.sae.n_slots:
            raise ConfigError(
                f"architecture {self.config.sae.arch!r} is trained on {self.sae.n_slots or 1} activations a token, "
                f"but the batches hold {given or 1}; choose as many hooks or stores as it needs"
            )

    def _not_finite(self, acts: Float[Tensor, "batch *slots d_in"], losses: SAELoss) -> str:
        first, last = self.step * self.config.batch_size, (self.step + 1) * self.config.batch_size - 1
        bad = int(self.layout.mesh.data.sum((~torch.isfinite(acts)).flatten(1).any(1).sum()))
        cause = (
            f"{bad} of its activations are not finite, so look at the data"
            if bad
            else "lower optim.lr or set optim.clip_norm"
        )
        loss = float(losses.total.detach())
        what = f"the loss became {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        return (
            f"{what} at step {self.step} (batch of tokens {first} to {last} in the order "
            f"of seed {self.config.seed}); {cause}; the last checkpoint is untouched"
        )
