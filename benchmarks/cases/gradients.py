"""Weight gradients and the optimiser's step: sorting pairs, sums over a feature's pairs, Adam, AuxK."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Case
from benchmarks.cases.inputs import Inputs, exact_sums, restricted
from benchmarks.eager import aux_loss, transposed_bags
from benchmarks.floors import Floors
from benchmarks.gates import exact, rms_error
from benchmarks.problem import AUX_COEFFICIENT


def pairs_by_feature(inputs: Inputs, floors: Floors) -> list[Case]:
    """Against torch.sort with searchsorted."""
    from saelab_kernels import pairs_by_feature as ours
    from saelab_kernels.pairs import reference

    indices, n_features = inputs.top[1], inputs.shape.features
    order, starts = reference.sort_pairs(indices, n_features)

    def error(result: Any) -> float:
        return max(exact(result[0], order), exact(result[-1], starts))

    return [
        Case(
            "pairs_by_feature",
            "forward",
            lambda: ours(indices, n_features),
            {"torch.sort + searchsorted": lambda: reference.sort_pairs(indices, n_features)},
            error,
            floors.pairs(),
            tolerance=0.0,
        )
    ]


def feature_grad(inputs: Inputs, floors: Floors) -> list[Case]:
    """One weight gradient from sorted pairs: against a bag for each feature, index_add_, and the dense product."""
    from saelab_kernels import feature_grad as ours
    from saelab_kernels import pairs_by_feature

    (acts, indices), vectors, n_features = inputs.top, inputs.grad, inputs.shape.features
    pairs = pairs_by_feature(indices, n_features)
    values = acts.flatten()[pairs.order].to(vectors.dtype)
    expected = exact_sums(indices, acts, vectors, inputs.features)

    def by_bags() -> Tensor:
        return F.embedding_bag(
            pairs.tokens, vectors, pairs.starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )

    def by_index_add() -> Tensor:
        result = torch.zeros(n_features, inputs.shape.width, device=inputs.device, dtype=vectors.dtype)
        n_rows = max(1, 2**24 // (inputs.shape.k * inputs.shape.width))
        for start in range(0, len(vectors), n_rows):
            block = slice(start, start + n_rows)
            rows = acts[block, :, None].to(vectors.dtype) * vectors[block, None]
            result.index_add_(0, indices[block].flatten(), rows.flatten(0, 1))
        return result

    def by_product() -> Tensor:
        dense = vectors.new_zeros(len(vectors), n_features).scatter_(1, indices, acts.to(vectors.dtype))
        return dense.T @ vectors

    return [
        Case(
            "feature_grad",
            "forward",
            lambda: ours(pairs, acts, vectors),
            {"a bag for each feature": by_bags, "index_add_ by block": by_index_add, "dense product": by_product},
            lambda result: rms_error(result[inputs.features].float(), expected),
            floors.feature_grad(),
        )
    ]


def feature_step(inputs: Inputs, floors: Floors) -> list[Case]:
    """Gradients, projection, Adam and unit norm of all weights: against bags, torch's fused Adam and a division.

    All contenders change the same weights, whose sampled rows are put back before a result is checked: three copies of
    weights and moments would not fit where it matters.
    """
    from saelab_kernels import AdamSettings, Layer, SparseGrads
    from saelab_kernels import feature_step as ours
    from saelab_kernels import pairs_by_feature as sort_pairs
    from saelab_kernels.step import reference

    shape, features = inputs.shape, inputs.features
    (acts, indices), centred, grad = inputs.top, inputs.x, inputs.grad
    sparse = SparseGrads(
        pairs=sort_pairs(indices, shape.features),
        top_acts=acts,
        pre_grad=inputs.acts_grad,
        recon_grad=grad,
        centred=centred,
        b_enc=inputs.normal(shape.features).float() / shape.tokens,
        b_dec=inputs.normal(shape.width).float() / shape.tokens,
    )
    parameters = Layer(inputs.W_enc.float(), inputs.W_dec.float(), inputs.b_enc.clone(), inputs.b_dec.clone())
    parameters.W_dec.div_(torch.linalg.vector_norm(parameters.W_dec, dim=1, keepdim=True))
    means = Layer(*(1e-4 * torch.randn_like(part) for part in parameters))
    squares = Layer(*(1e-8 * torch.rand_like(part) + 1e-9 for part in parameters))
    adam = AdamSettings(lr=1e-3, step=10)
    optimizer = _torch_adam(parameters, means, squares, adam)
    kept = [_rows(state, features) for state in (parameters, means, squares)]
    expected = _expected_step(kept, sparse, indices, features, adam, reference)

    def reset() -> None:
        for state, rows in zip((parameters, means, squares), kept, strict=True):
            for name, part in rows._asdict().items():
                getattr(state, name)[... if name == "b_dec" else features] = part
        for state in optimizer.state.values():
            state["step"].fill_(adam.step - 1)

    def run_ours() -> Layer:
        ours(parameters, means, squares, sparse, adam)
        return parameters

    @torch.no_grad()
    def in_torch() -> Layer:
        W_enc, W_dec = transposed_bags(
            indices, shape.features, [(inputs.acts_grad, centred), (acts, grad)], inputs.dtype
        )
        W_dec.addcmul_(torch.linalg.vecdot(W_dec, parameters.W_dec)[:, None], parameters.W_dec, value=-1)
        for leaf, gradient in zip(parameters, (W_enc, W_dec, sparse.b_enc, sparse.b_dec), strict=True):
            leaf.grad = gradient
        optimizer.step()
        for leaf in parameters:
            leaf.grad = None
        parameters.W_dec.div_(torch.linalg.vector_norm(parameters.W_dec, dim=1, keepdim=True))
        return parameters

    def error(result: Any) -> float:
        # the change is what a step computes; the weights themselves would hide an error of a thousandth
        found = _rows(result, features)
        return max(
            rms_error(new.double() - old.double(), wanted - old.double())
            for new, wanted, old in zip(found, expected, kept[0], strict=True)
        )

    return [
        Case(
            "feature_step",
            "in place",
            run_ours,
            {"bags + Adam(fused=True)": in_torch},
            error,
            floors.pairs() + floors.feature_step(),
            tolerance=1e-3,  # a change of 1e-3 in weights near 1 has four digits in float32
            reset=reset,
        )
    ]


def aux_dead(inputs: Inputs, floors: Floors) -> list[Case]:
    """AuxK's loss and gradients: against autograd on the packed rows, and on all features as other trainers do it."""
    from saelab_kernels.dispatch import bfloat16_units
    from saelab_kernels.revive import aux_dead as ours
    from saelab_kernels.revive import reference

    k_aux, residual, centred = inputs.shape.k_aux, inputs.normal(*inputs.x.shape).float(), inputs.x
    weights = (inputs.W_enc, inputs.b_enc, inputs.W_dec)
    rows = torch.arange(0, inputs.shape.features, 20, device=inputs.device)[: inputs.shape.n_dead]
    # the loss is a ratio of sums over all tokens, so there is no sample: the reference runs at full size, in float64
    # where that fits
    wide = torch.float64 if centred.numel() + centred.shape[0] * len(rows) < 2**27 else torch.float32
    every = torch.arange(len(rows), device=inputs.device)
    dead = [part[rows].to(wide) for part in weights]
    expected = reference.aux_dead(every, residual.to(wide), centred.to(wide), dead[0], dead[1], dead[2], k_aux)

    def error(result: Any) -> float:
        loss, *gradients = result
        found = [loss, *(part for part in gradients if part.is_floating_point())]
        return max(rms_error(part.float(), whole) for part, whole in zip(found, expected, strict=True))

    def packed() -> tuple[Tensor, ...]:
        leaves = [part[rows].detach().requires_grad_() for part in weights]
        loss = aux_loss(centred, residual, *leaves) / AUX_COEFFICIENT
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def masked() -> tuple[Tensor, ...]:
        leaves = [part.detach().requires_grad_() for part in weights]
        W_enc, b_enc, W_dec = leaves
        alive = torch.ones(len(W_enc), dtype=torch.bool, device=inputs.device)
        alive[rows] = False
        pre_acts = F.linear(centred, W_enc, b_enc.to(W_enc.dtype)).masked_fill(alive, -torch.inf)
        top = pre_acts.topk(k_aux, dim=1, sorted=False)
        acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
        loss = ((acts @ W_dec).float() - residual).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()
        gradients = torch.autograd.grad(loss, leaves)
        return loss.detach(), *(gradient[rows] for gradient in gradients)

    low = inputs.dtype == torch.bfloat16
    return [
        Case(
            "aux_dead",
            "forward + backward",
            lambda: ours(rows, residual, centred, *weights, k_aux),
            {"packed rows, autograd": packed, "all features masked, autograd": masked},
            error,
            floors.aux_dead(),
            tolerance=1e-2 if low or bfloat16_units(inputs.x.device) else 1e-5,
        )
    ]


def _torch_adam(parameters: Any, means: Any, squares: Any, adam: Any) -> torch.optim.Adam:
    """torch's optimiser on the same tensors and moments."""
    optimizer = torch.optim.Adam(list(parameters), lr=adam.lr, betas=adam.betas, eps=adam.eps, fused=True)
    for leaf, mean, square in zip(parameters, means, squares, strict=True):
        step = torch.tensor(float(adam.step - 1), device=leaf.device)
        optimizer.state[leaf] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    return optimizer


def _rows(state: Any, features: Tensor) -> Any:
    """Copies of the sampled features' rows, and of b_dec."""
    return type(state)(state.W_enc[features], state.W_dec[features], state.b_enc[features], state.b_dec.clone())


def _expected_step(kept: list[Any], sparse: Any, indices: Tensor, features: Tensor, adam: Any, reference: Any) -> Any:
    """The reference's step in float64 on the sampled features alone, whose rows depend on no other feature."""
    layer, means, squares = (type(state)(*(part.double() for part in state)) for state in kept)
    pairs, _ = restricted(indices, sparse.top_acts, features)
    doubles = {name: value.double() for name, value in sparse._asdict().items() if isinstance(value, Tensor)}
    sampled = sparse._replace(**doubles, pairs=pairs)._replace(b_enc=doubles["b_enc"][features])
    reference.feature_step(layer, means, squares, sampled, adam)
    return layer
