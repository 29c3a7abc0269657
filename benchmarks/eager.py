"""The same training step in plain torch: dense, dense and compiled, and sparse as well as public torch allows.

    loss = mean((recon - x)^2) + 1/32 * |recon_of_dead - residual|^2 / |residual - mean(residual)|^2
    then: drop the decoder gradient's part along its rows, clip to norm 1, Adam (fused), rows of W_dec back to norm 1

AuxK is computed on the packed dead rows by all of them, as a dense product over all features would only slow them down.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import AUX_COEFFICIENT, BETAS, CLIP_NORM, EPS, Problem


class Weights(NamedTuple):
    """The parameters of an autoencoder, feature-major."""

    W_enc: Tensor  # [F, d]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d]
    b_dec: Tensor  # [d]


def initial_weights(problem: Problem) -> Weights:
    """Fresh float32 leaves on the problem's device."""
    directions, b_enc = problem.directions.to(problem.device), problem.b_enc.to(problem.device)
    leaves = (directions, b_enc, directions, directions.new_zeros(problem.shape.width))
    return Weights(*(leaf.clone().requires_grad_() for leaf in leaves))


@torch.no_grad()
def held_out_error(weights: Weights, problem: Problem) -> float:
    """Squared error an entry of the held-out tokens, from float32 products with all features."""
    error = torch.zeros((), device=problem.device)
    for tokens in problem.held_out.split(256):
        x = tokens.to(problem.device).float()
        top = F.linear(x - weights.b_dec, weights.W_enc, weights.b_enc).topk(problem.shape.k, dim=1)
        acts = F.embedding_bag(top.indices, weights.W_dec, mode="sum", per_sample_weights=top.values.relu())
        error += (acts + weights.b_dec - x).pow(2).sum()
    return float(error) / problem.held_out.numel()


class Dense:
    """Autograd through the products over all features; ``precision`` bfloat16 is torch's autocast."""

    def __init__(self, problem: Problem, precision: torch.dtype = torch.float32, *, compiled: bool = False) -> None:
        self.problem, self.precision = problem, precision
        self.weights = initial_weights(problem)
        self.dead_rows = problem.dead.nonzero().flatten().to(problem.device)
        self.optimizer = torch.optim.Adam(self.weights, lr=problem.lr, betas=BETAS, eps=EPS, fused=True)
        # not max-autotune: it tries for minutes, and the products, which are nearly all of it, are cuBLAS's either way
        self.loss: Callable[[Tensor], Tensor] = torch.compile(self._loss) if compiled else self._loss

    def step(self, x: Tensor) -> None:
        enabled = self.precision == torch.bfloat16
        with torch.autocast(self.problem.device, dtype=torch.bfloat16, enabled=enabled):
            loss = self.loss(x)
        loss.backward()
        finish(self.weights, self.optimizer)

    def _loss(self, x: Tensor) -> Tensor:
        W_enc, b_enc, W_dec, b_dec = self.weights
        pre_acts = F.linear(x - b_dec, W_enc, b_enc)
        top = pre_acts.topk(self.problem.shape.k, dim=1)
        feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
        error = (feature_acts @ W_dec).float() + b_dec - x
        return error.pow(2).mean() + aux_loss(
            x - b_dec.detach(), -error.detach(), W_enc[self.dead_rows], b_enc[self.dead_rows], W_dec[self.dead_rows]
        )


class Sparse:
    """Gradients by hand: topk, embedding_bag, and for the weights a sort with a bag of tokens for each feature.

    ``precision`` is that of the encoder's product; its values are used as they come out. On a GPU bfloat16 rows are
    gathered too, since bytes are what a gather costs there.
    """

    def __init__(self, problem: Problem, precision: torch.dtype = torch.float32) -> None:
        self.problem, self.precision = problem, precision
        self.rows = precision if problem.device == "cuda" else torch.float32
        self.weights = initial_weights(problem)
        self.dead_rows = problem.dead.nonzero().flatten().to(problem.device)
        self.optimizer = torch.optim.Adam(self.weights, lr=problem.lr, betas=BETAS, eps=EPS, fused=True)

    def step(self, x: Tensor) -> None:
        W_enc, b_enc, W_dec, b_dec = self.weights
        with torch.no_grad():
            centred = x - b_dec
            low = self.precision
            pre_acts = F.linear(centred.to(low), W_enc.to(low), b_enc.to(low))
            top = pre_acts.topk(self.problem.shape.k, dim=1)
            acts, indices = top.values.relu(), top.indices
            del pre_acts
            rows = W_dec.to(self.rows)
        decoded, acts_grad_of = bag(rows, indices, acts.to(self.rows))
        with torch.no_grad():
            error = decoded.float() + b_dec - x
            grad = error * (2 / error.numel())
        acts_grad = acts_grad_of(grad)
        with torch.no_grad():
            pre_grad = acts_grad.float() * (acts > 0)
            W_enc_grad, W_dec_grad = transposed_bags(
                indices, len(W_dec), [(pre_grad, centred), (acts.float(), grad)], self.rows
            )
            b_enc_grad = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), pre_grad.flatten())
            b_dec_grad = grad.sum(0) - b_enc_grad @ W_enc
        if len(self.dead_rows):
            self._add_aux(centred, -error, W_enc_grad, b_enc_grad, W_dec_grad)
        for weight, gradient in zip(self.weights, (W_enc_grad, b_enc_grad, W_dec_grad, b_dec_grad), strict=True):
            weight.grad = gradient
        finish(self.weights, self.optimizer)

    def _add_aux(self, centred: Tensor, residual: Tensor, *gradients: Tensor) -> None:
        packed = [weight.detach()[self.dead_rows].requires_grad_() for weight in self.weights[:3]]
        aux_loss(centred, residual, *packed).backward()
        for gradient, rows in zip(gradients, packed, strict=True):
            assert rows.grad is not None
            gradient.index_add_(0, self.dead_rows, rows.grad)


def bag(rows: Tensor, indices: Tensor, acts: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Decoded tokens [N, d], and the function from their gradient to that of ``acts`` [N, k].

    embedding_bag has a kernel for the gradient of its per-sample weights that makes no [N, k, d] temporary. On a CPU
    it takes a seventh of gathered rows times tokens, and a fourteenth of a dense product with a gather.
    """
    leaf = acts.requires_grad_()
    decoded = F.embedding_bag(indices, rows, mode="sum", per_sample_weights=leaf)
    return decoded.detach(), lambda grad: torch.autograd.grad(decoded, leaf, grad.to(decoded.dtype))[0]


def transposed_bags(
    indices: Tensor, n_features: int, terms: list[tuple[Tensor, Tensor]], rows: torch.dtype
) -> list[Tensor]:
    """For each (coefficients [N, k], vectors [N, d]) the sums over a feature's pairs, [F, d]; one sort for all."""
    features, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(features, torch.arange(n_features + 1, device=indices.device))
    tokens = order // indices.shape[1]
    return [
        F.embedding_bag(
            tokens,
            vectors.to(rows),
            starts,
            mode="sum",
            per_sample_weights=coefficients.flatten()[order].to(rows),
            include_last_offset=True,
        ).float()
        for coefficients, vectors in terms
    ]


def aux_loss(centred: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
    """AuxK on packed dead rows [n, d], [n], [n, d]; tokens and residual [N, d] count as constants."""
    if not len(W_enc):
        return residual.new_zeros(())
    feature_acts = F.linear(centred, W_enc, b_enc.to(W_enc.dtype)).relu()
    k_aux = max(1, centred.shape[1] // 2)
    if k_aux < len(W_enc):
        top = feature_acts.topk(k_aux, dim=1, sorted=False)
        feature_acts = torch.zeros_like(feature_acts).scatter(1, top.indices, top.values)
    unexplained = ((feature_acts @ W_dec).float() - residual).pow(2).sum()
    variance = (residual - residual.mean(0)).pow(2).sum()
    return AUX_COEFFICIENT * unexplained / variance.clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def finish(weights: Weights, optimizer: torch.optim.Optimizer) -> None:
    """Projection, clipping, Adam, unit norm."""
    W_dec = weights.W_dec
    assert W_dec.grad is not None
    along = torch.linalg.vecdot(W_dec.grad, W_dec)
    W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)
    torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))


def why_not_compiled(device: str) -> str | None:
    """Why torch.compile cannot be timed here, or None: on a CPU it needs a C++ compiler."""
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on the CPU, and none is installed"
    return None
