"""Training steps of other libraries, each as its own trainer makes it, on a problem of ours.

Every class takes the problem's initial weights, learning rate and dead features; ``step`` makes one whole step;
``held_out_error`` is the squared error an entry of the held-out tokens by the library's own forward pass. The libraries
are imported inside the classes, since an environment may have one and not another.
"""

from __future__ import annotations

import contextlib
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import BETAS, CLIP_NORM, EPS, Problem


class SAELens:
    """sae_lens 6: TopKTrainingSAE with what SAETrainer does around it.

    ``autocast`` and ``sparse`` are options of its own config; the trainer's Adam is not fused and cannot be.
    """

    package = "sae-lens"

    def __init__(self, problem: Problem, *, autocast: bool = False, sparse: bool = False) -> None:
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        self.problem, self.make_input = problem, TrainStepInput
        _, d_in, d_sae, k = problem.shape
        # its backward pass fails with both options on (torch 2.13, CPU: no aten::view for sparse tensors)
        config = TopKTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, k=k, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse,
            device=problem.device,
        )  # fmt: skip
        self.sae = TopKTrainingSAE(config)
        with torch.no_grad():
            self.sae.W_enc.copy_(problem.directions.T)
            self.sae.W_dec.copy_(problem.directions)
            self.sae.b_enc.copy_(problem.b_enc)
            self.sae.b_dec.zero_()
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=problem.lr, betas=BETAS, eps=EPS)
        self.autocast = torch.autocast(problem.device, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
        self.dead = problem.dead.to(problem.device)
        self.passes_since_fired = torch.zeros(d_sae, device=problem.device)
        self.firings = torch.zeros(d_sae, device=problem.device)
        self.n_steps = 0

    def step(self, x: Tensor) -> None:
        self.sae.train()
        with self.autocast:
            output = self.sae.training_forward_pass(
                self.make_input(
                    sae_in=x,
                    coefficients={},
                    dead_neuron_mask=self.dead,
                    n_training_steps=self.n_steps,
                    is_logging_step=False,
                )
            )
            with torch.no_grad():
                firing = output.feature_acts.bool().float()
                did_fire = firing.sum(-2).bool()
                if did_fire.is_sparse:
                    did_fire = did_fire.to_dense()
                self.passes_since_fired += 1
                self.passes_since_fired[did_fire] = 0
                self.firings += firing.sum(0)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.n_steps += 1

    def mark_dead(self, window: int) -> None:
        """Count as dead what has not fired in the last ``window`` steps."""
        self.dead = self.passes_since_fired >= window

    @torch.no_grad()
    def held_out_error(self) -> float:
        return _mean_square(self.problem, self.sae)


class DictionaryLearning:
    """dictionary_learning: TopKTrainer.update."""

    package = "dictionary-learning"

    def __init__(self, problem: Problem) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.problem = problem
        _, d_in, d_sae, k = problem.shape
        self.trainer = TopKTrainer(
            steps=10**9, activation_dim=d_in, dict_size=d_sae, k=k, layer=0, lm_name="none", lr=problem.lr,
            warmup_steps=0, device=problem.device,
        )  # fmt: skip
        with torch.no_grad():
            self.trainer.ae.encoder.weight.copy_(problem.directions)
            self.trainer.ae.encoder.bias.copy_(problem.b_enc)
            self.trainer.ae.decoder.weight.copy_(problem.directions.T)
        self.optimizer = self.trainer.optimizer
        self.silent = torch.where(problem.dead, 10**9, 0).to(problem.device)

    def step(self, x: Tensor) -> None:
        self.trainer.num_tokens_since_fired.copy_(self.silent)
        self.trainer.update(1, x)  # step 0 would replace b_dec

    @torch.no_grad()
    def held_out_error(self) -> float:
        return _mean_square(self.problem, self.trainer.ae)


class Sparsify:
    """EleutherAI's sparsify: SparseCoder with what its Trainer does around it, with Adam and AuxK on.

    Its encoder's backward pass ignores the gradient of the pre-activations, so its AuxK trains decoder rows alone.
    """

    package = "eai-sparsify"

    def __init__(self, problem: Problem) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        self.problem = problem
        _, d_in, d_sae, k = problem.shape
        self.coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=problem.device)
        with torch.no_grad():
            self.coder.encoder.weight.copy_(problem.directions)
            self.coder.encoder.bias.copy_(problem.b_enc)
            self.coder.W_dec.copy_(problem.directions)
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=problem.lr, betas=BETAS, eps=EPS)
        self.dead = problem.dead.to(problem.device)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.long, device=problem.device)

    def step(self, x: Tensor) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        output = self.coder(x, dead_mask=self.dead)
        (output.fvu + output.auxk_loss / 32).backward()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[output.latent_indices.flatten()] = 0
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def held_out_error(self) -> float:
        return _mean_square(self.problem, lambda x: self.coder(x).sae_out.float())


class Control:
    """Our own dense step in plain torch, to see that a process of its own changes no time."""

    package = "torch"

    def __init__(self, problem: Problem) -> None:
        from benchmarks.eager import Dense

        self.problem, self.dense = problem, Dense(problem)
        self.optimizer = self.dense.optimizer

    def step(self, x: Tensor) -> None:
        self.dense.step(x)

    def held_out_error(self) -> float:
        from benchmarks.eager import held_out_error

        return held_out_error(self.dense.weights, self.problem)


#: name on the command line and in results -> class and options
PEERS: dict[str, tuple[Any, dict[str, bool]]] = {
    "sae-lens": (SAELens, {}),
    "sae-lens autocast": (SAELens, {"autocast": True}),
    "sae-lens sparse": (SAELens, {"sparse": True}),
    "dictionary_learning": (DictionaryLearning, {}),
    "sparsify": (Sparsify, {}),
    "control: torch dense float32": (Control, {}),
}


def version(name: str) -> str:
    """The version of the library behind a name."""
    return metadata.version(PEERS[name][0].package)


def _mean_square(problem: Problem, model: object) -> float:
    error = torch.zeros((), device=problem.device)
    for tokens in problem.held_out.split(256):
        x = tokens.to(problem.device).float()
        error += (model(x) - x).pow(2).sum()  # type: ignore[operator]
    return float(error) / problem.held_out.numel()
