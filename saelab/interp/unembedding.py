"""From the residual stream to logits: the model's own last norm and unembedding, as a function of any vector.

    logits = T( norm(x) W_U + b_U ),   norm(x) = (x - centre(x)) / s(x) * gain + bias

RMSNorm has no centre and no bias; s is the root mean square of what is centred. T is the identity but for architectures
that scale or cap their logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.models.divergence import kl_divergence
from saelab.models.load import Model

#: Largest difference from the model's own logits, as a share of the largest of these, by the model's precision.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


#: Logits held at a time; 64 MB in float32.
_BLOCK_LOGITS = 1 << 24


class FrozenNorm(NamedTuple):
    """The last norm at one residual vector x, its division held fixed: linear in everything that x is the sum of."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]  # zero for an RMSNorm
    scale: float  # s(x)
    centred: bool  # True for a LayerNorm

    def __call__(self, part: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What ``part``, a summand of x, contributes to norm(x); the bias belongs to no part."""
        part = part - part.mean(-1, keepdim=True) if self.centred else part
        return part / self.scale * self.gain


class Unembedding:
    """The last norm and the unembedding of ``model``, in the model's own precision; gradients pass through.

    Raises:
        ConfigError: the logits of the model are not made this way, so that lenses have no meaning for it.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._norm = getattr(getattr(model.bridge, "ln_final", None), "original_component", None)
        self._linear = model.bridge.unembed.original_component
        self.last_hook = f"blocks.{model.n_layers - 1}.hook_resid_post"
        """The residual stream that the model itself unembeds."""
        self._check()

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits, in float32, if ``resid`` were the last residual stream; of that itself they are the model's.

        Source: the logit lens, nostalgebraist 2020, "interpreting GPT: the logit lens".
        """
        return self._transformed(self.linear(self.normed(resid))).float()

    def normed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``resid`` after the last norm, in the model's precision."""
        resid = resid.to(self.model.device, self.model.dtype)
        return resid if self._norm is None else self._norm(resid)

    def linear(self, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """``normed @ W_U + b_U``: the logits before whatever the architecture does to them last."""
        return self._linear(normed)

    def bias(self, ids: Sequence[int]) -> Float[Tensor, " ids"]:
        """b_U of some tokens, in float32."""
        nothing = torch.zeros(1, self.model.d_model, device=self.model.device, dtype=self.model.dtype)
        with torch.no_grad():
            return self.linear(nothing)[0, list(ids)].float()

    @torch.no_grad()
    def frozen_norm(self, resid: Float[Tensor, " d_model"]) -> FrozenNorm:
        """The last norm at ``resid`` in float32, with its division held at what it is there.

        Everything is measured, because architectures differ in how they store and apply gain and bias.
        """
        unit = self.unit_norm()
        if self._norm is None:
            return unit
        unscaled = unit(resid.to(self.model.device, torch.float32))
        scaled = copy.deepcopy(self._norm).float()(resid.to(self.model.device, torch.float32)[None])[0] - unit.bias
        return unit._replace(scale=float(unscaled.square().sum() / (unscaled * scaled).sum()))

    @torch.no_grad()
    def unit_norm(self) -> FrozenNorm:
        """The last norm without its division: what a direction is to the unembedding, whatever the text."""
        signs = torch.ones(self.model.d_model, device=self.model.device)
        if self._norm is None:
            return FrozenNorm(signs, torch.zeros_like(signs), 1.0, False)
        norm = copy.deepcopy(self._norm).float()
        constant = norm(signs[None])[0]
        signs[1::2] = -1  # mean 0 and root mean square 1, so that the norm divides by 1 (its epsilon apart)
        there, back = norm(signs[None])[0], norm(-signs[None])[0]
        gain, bias = (there - back) / 2 * signs, (there + back) / 2
        return FrozenNorm(gain, bias, 1.0, centred=bool((constant - bias).norm() < 0.01 * gain.norm()))

    def _transformed(self, logits: Float[Tensor, "*batch d_vocab"]) -> Any:
        return self.model.bridge.adapter.apply_output_logits_transform(logits)

    @torch.no_grad()
    def _check(self) -> None:
        ids = torch.full((1, min(3, self.model.context)), self.model.bos_id)
        expected = self.model.logits(ids)
        found = self.logits(self.model.capture(ids, [self.last_hook])[self.last_hook])
        share = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
        if not share <= _TOLERANCE[self.model.dtype]:
            raise ConfigError(
                f"the logits of {self.model.name} are not its last norm and unembedding applied to {self.last_hook} "
                f"(they differ by {share:.1%} of the largest), so lenses do not apply; use a model of another "
                "architecture"
            )


def residual_hooks(model: Model) -> list[str]:
    """The residual stream before the first block and after each: the rows of a lens."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers))]


def lens_kl(
    logps: Float[Tensor, "tokens d_vocab"], lens_logits: Float[Tensor, "tokens d_vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(model || lens) in nats of the next-token distributions, from log-probabilities and logits; 0 is the best."""
    return kl_divergence(logps, lens_logits.log_softmax(-1))


def token_blocks(n_tokens: int, d_vocab: int) -> Iterator[slice]:
    """The tokens in blocks whose logits fit comfortably into memory."""
    size = max(1, _BLOCK_LOGITS // d_vocab)
    return (slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size))
