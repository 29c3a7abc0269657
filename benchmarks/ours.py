"""Our training step, as contenders: from the kernels alone, and as saelab's training makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.eager import Weights, initial_weights
from benchmarks.problem import AUX_COEFFICIENT, BETAS, CLIP_NORM, EPS, Problem


class Loop:
    """The step of saelab's training loop. Needs saelab installed, not only its kernels.

    The problem's dead features stay so; after ``mark_dead`` they are those that were silent for ``dead_window`` tokens.
    """

    def __init__(self, problem: Problem, *, clip_norm: float = CLIP_NORM, dead_window: int = 10_000_000) -> None:
        from saelab.sae.architectures import new_sae
        from saelab.sae.topk import TopKConfig
        from saelab.train.dead import DeadFeatures
        from saelab.train.optim import OptimConfig, adam

        _, width, features, k = problem.shape
        config = TopKConfig(d_sae=features, k=k, aux_coefficient=AUX_COEFFICIENT)
        self.sae = new_sae(config, d_in=width, generator=torch.Generator().manual_seed(0)).to(problem.device)
        with torch.no_grad():
            self.sae.encoder.copy_(problem.directions)
            self.sae.W_dec.copy_(problem.directions)
            self.sae.b_enc.copy_(problem.b_enc)
        self.lr = problem.lr
        self.config = OptimConfig(betas=BETAS, clip_norm=clip_norm)
        self.optimizer = adam(self.sae, self.config)
        self.dead = problem.dead.to(problem.device)
        self.silence = DeadFeatures(features, window_tokens=dead_window)

    def mark_dead(self) -> None:
        """Count as dead what has been silent for the window."""
        self.dead = self.silence.mask.to(self.dead.device)

    @property
    def weights(self) -> Weights:
        return Weights(self.sae.encoder, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec)

    def step(self, x: Tensor) -> None:
        from saelab.train.fused import fused_step_

        gradient = self.sae.training_gradient(x, dead=self.dead)
        if not torch.isfinite(gradient.losses.total):  # which the loop asks, and waits for, at every step
            raise FloatingPointError("the loss is no number")
        float(fused_step_(self.sae, self.optimizer, gradient.sparse, self.config, lr=self.lr))
        self.silence.update(gradient.losses.fired, n_tokens=len(x))


class Kernels:
    """The same step from the operations of saelab_kernels alone, as a machine without saelab can make it.

    ``clip_norm`` None leaves out the clipping, which needs the norm of the whole gradient before any weight may change
    and so costs a pass of its own. It is another optimiser, so its held-out error is a little different.
    """

    def __init__(self, problem: Problem, *, clip_norm: float | None = CLIP_NORM) -> None:
        from saelab_kernels import Layer

        self.problem, self.clip_norm = problem, clip_norm
        leaves = (leaf.detach() for leaf in initial_weights(problem))
        self.layer = Layer(**dict(zip(Weights._fields, leaves, strict=True)))
        self.means, self.squares = (Layer(*(torch.zeros_like(part) for part in self.layer)) for _ in range(2))
        self.dead_rows = problem.dead.nonzero().flatten().to(problem.device)
        self.n_steps = 0

    @property
    def weights(self) -> Weights:
        return Weights(**self.layer._asdict())

    @torch.no_grad()
    def step(self, x: Tensor) -> None:
        from saelab_kernels import AdamSettings, feature_step, topk_gradient

        problem, layer = self.problem, self.layer
        gradient = topk_gradient(x, layer, problem.shape.k)
        sparse = gradient.sparse
        if len(self.dead_rows):
            sparse = self._with_aux(sparse, gradient.error)
        self.n_steps += 1
        settings = AdamSettings(lr=problem.lr, step=self.n_steps, betas=BETAS, eps=EPS, clip_norm=self.clip_norm)
        feature_step(layer, self.means, self.squares, sparse, settings)

    def _with_aux(self, sparse: Any, error: Tensor) -> Any:
        """The gradient with AuxK's added."""
        from saelab_kernels import RowGrads
        from saelab_kernels.revive import aux_dead

        layer, k_aux = self.layer, max(1, self.problem.shape.width // 2)
        aux = aux_dead(self.dead_rows, -error, sparse.centred, layer.W_enc, layer.b_enc, layer.W_dec, k_aux)
        sparse.b_enc.index_add_(0, self.dead_rows, aux.b_enc_grad, alpha=AUX_COEFFICIENT)
        rows = RowGrads(self.dead_rows, aux.W_enc_grad.mul_(AUX_COEFFICIENT), aux.W_dec_grad.mul_(AUX_COEFFICIENT))
        return sparse._replace(extra=rows)
