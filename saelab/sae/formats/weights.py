"""The algebra between formats: what a format computes differently is folded into weights that mean the same.

Here an SAE is a table of tensors under our names (``encoder [d_sae, d_in]``, ``W_dec [d_sae, d_out]``, ``b_enc``,
``b_dec``, ``threshold``; of a gated one ``b_gate``, ``b_mag``, ``r_mag``), and a fold turns one table into another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab import config as configs
from saelab.errors import ArtifactError, ConfigError
from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE, Metadata, SAEConfig
from saelab.sae.slots import product64

Weights = dict[str, Tensor]


class Read(NamedTuple):
    """An SAE from a file, and what was changed on the way so that it means the same."""

    sae: SAE
    folded: tuple[str, ...]


def config_of(cls: type, settings: Mapping[str, Any], *, source: object) -> Any:
    """The config of class ``cls``; settings that it refuses are the fault of the file ``source``.

    Raises:
        ArtifactError: the class refuses them.
    """
    try:
        return configs.from_mapping(cls, settings)
    except ConfigError as error:
        raise ArtifactError(f"{source} does not fit: {str(error)[:300]}") from error


def build(cfg: SAEConfig, weights: Weights, *, d_in: int, metadata: Metadata) -> SAE:
    """The SAE with these weights, for inference: evaluation mode, no gradients, at least float32."""
    dtype = torch.float32  # half precision is for storage
    for tensor in weights.values():
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    with torch.device("meta"):  # no random numbers for weights that are replaced
        sae = new_sae(cfg, d_in=d_in)
    # counters of training, which no format of weights has; their shapes do not depend on d_in
    counters = {name for name, _ in sae.named_buffers()} - set(weights)
    assert "threshold" not in counters
    fresh = new_sae(cfg, d_in=1).state_dict() if counters else {}
    state = {name: fresh[name] for name in counters} | weights
    state = {n: t.to(dtype).contiguous() if t.is_floating_point() else t for n, t in state.items()}
    sae.load_state_dict(state, assign=True)
    sae.metadata = metadata
    return sae.requires_grad_(False).eval()


def uncentred(weights: Weights) -> Weights:
    """For an encoder that reads ``acts`` itself: ``acts W + b = (acts - b_dec) W + (b + b_dec W)``."""
    return _shifted(weights, 1.0)


def recentred(weights: Weights) -> Weights:
    """The opposite of ``uncentred``, for a format whose encoder reads ``acts`` itself."""
    return _shifted(weights, -1.0)


def _shifted(weights: Weights, sign: float) -> Weights:
    if not weights["b_dec"].any():
        return weights
    shift = sign * product64(weights["encoder"], weights["b_dec"])
    shifted = dict(weights)
    for name in ("b_enc", "b_gate"):
        if name in weights:
            shifted[name] = (weights[name].double() + shift).to(weights[name].dtype)
    if "b_mag" in weights:  # the magnitude reads exp(r_mag) times the same projection
        exact = weights["b_mag"].double() + weights["r_mag"].double().exp() * shift
        shifted["b_mag"] = exact.to(weights["b_mag"].dtype)
    return shifted


def unit_decoder(weights: Weights) -> Weights:
    """Rows of W_dec of norm 1; their norms move into the encoder, so that ``feature_acts`` are multiplied by them.

    For ReLU this changes nothing else; for the k largest it is what SAELens calls rescaling by decoder norm.
    """
    norms = weights["W_dec"].norm(dim=1).clamp_min(1e-8)
    folded = dict(weights)
    folded["W_dec"] = weights["W_dec"] / norms[:, None]
    folded["encoder"] = weights["encoder"] * norms[:, None]
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in weights:
            folded[name] = weights[name] * norms
    return folded


def scaled_input(weights: Weights, *, scale: float, scale_out: float | None = None) -> Weights:
    """An SAE that read ``scale * acts`` (and wrote ``scale_out * acts``) on raw ones, its activations unchanged."""
    out = scale if scale_out is None else scale_out
    folded = dict(weights)
    folded["encoder"] = weights["encoder"] * scale
    folded["W_dec"] = weights["W_dec"] / out
    folded["b_dec"] = weights["b_dec"] / out
    return folded


def weights_of(sae: SAE) -> Weights:
    """The weights of ``sae`` under our names, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}


def inference_form(sae: SAE) -> SAE:
    """What ``sae`` is once training is over: one with a threshold for a batch-wise architecture, else itself."""
    twin: Callable[[], SAE] | None = getattr(sae, "as_jumprelu", None)
    return sae if twin is None else twin()
