"""The lens: what the model would predict next if each layer were its last, for every token of a text.

The logit lens unembeds the residual stream of a layer as it is (nostalgebraist 2020); the tuned lens translates it
first (`tuned_lens`). Beside the predictions stand the two numbers that say how far to trust them: the KL to the model's
own prediction, and the log-probability of the token that really follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError, ShapeError
from saelab.interp.feature_gradients import hook_of
from saelab.interp.tuned_lens import TunedLens
from saelab.interp.unembedding import Unembedding, residual_hooks, token_blocks
from saelab.models.divergence import kl_divergence
from saelab.models.hooks import canonical_hook_name, layer_of
from saelab.models.load import Model
from saelab.sae.base import SAE

#: Random directions that show how large the strongest effect is by chance.
_N_RANDOM = 256


class Prediction(NamedTuple):
    token: str
    probability: float


@dataclass(frozen=True, eq=False)
class LensReading:
    """What a lens reads in a text: rows are hooks from early to late, columns the tokens, BOS included."""

    kind: str
    """"logit lens" or "tuned lens"."""
    hook_names: tuple[str, ...]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    """The likeliest next tokens of each cell, best first."""
    top_ids: Int[Tensor, "hooks seq n"]
    top_probs: Float[Tensor, "hooks seq n"]
    kl: Float[Tensor, "hooks seq"]
    """KL(model || lens) of the next-token distributions, in nats; 0 in the row that the model itself unembeds."""
    next_logps: Float[Tensor, "hooks seq"]
    """Log-probability, in nats, of the token that follows in the text; NaN at the last token."""

    def top(self, hook_name: str, position: int) -> list[Prediction]:
        """The likeliest next tokens of one cell.

        Raises:
            ConfigError: the lens does not read this hook. ShapeError: there is no such token.
        """
        known = canonical_hook_name(hook_name)
        if known not in self.hook_names:
            raise ConfigError(f"the lens has not read {hook_name}; it read {', '.join(self.hook_names)}")
        seq = len(self.tokens)
        if not -seq <= position < seq:
            raise ShapeError(f"there is no token {position}; the text has tokens 0 to {seq - 1}, the first is BOS")
        row = self.hook_names.index(known)
        return [
            Prediction(token, float(probability))
            for token, probability in zip(self.top_tokens[row][position], self.top_probs[row, position], strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data: a cell for each hook and token."""
        return {
            "kind": self.kind,
            "hook_names": list(self.hook_names),
            "tokens": list(self.tokens),
            "token_ids": list(self.token_ids),
            "cells": [
                [
                    {
                        "top": [prediction._asdict() for prediction in self.top(hook, position)],
                        "kl": float(self.kl[row, position]),
                        "next_logp": None if math.isnan(logp) else logp,
                    }
                    for position, logp in enumerate(self.next_logps[row].tolist())
                ]
                for row, hook in enumerate(self.hook_names)
            ],
        }


@torch.no_grad()
def logit_lens(
    model: Model,
    text: str,
    *,
    tuned: TunedLens | None = None,
    hook_names: Sequence[str] | None = None,
    top: int = 5,
) -> LensReading:
    """Read the residual stream of ``text`` at every layer, or at ``hook_names``, through the unembedding.

    With ``tuned`` each row is translated first. Edits that are active on the model count.

    Raises:
        ConfigError: an unknown hook, one that is not d_model wide, or one that the tuned lens has no translator for.
        TextError: the text is empty. ShapeError: it is longer than the model's context.
        ArtifactError: the tuned lens was trained on another model.
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}; 5 shows the likeliest five")
    if tuned is not None:
        tuned.check_model(model)
    unembedding = Unembedding(model)
    hooks = [_checked(model, name) for name in (hook_names or residual_hooks(model))]
    ids = model.to_tokens(text).ids
    acts = model.capture(ids, [*hooks, unembedding.last_hook])
    following = torch.cat([ids[0, 1:], ids.new_zeros(1)])  # the last token is followed by nothing, see below
    blocks = []
    for part in token_blocks(ids.shape[1], model.d_vocab):
        logps = unembedding.logits(acts[unembedding.last_hook][0, part]).log_softmax(-1)
        rows = []
        for hook in hooks:
            resid = acts[hook][0, part]
            if tuned is not None and hook != unembedding.last_hook:
                resid = tuned.translator(hook)(resid.float())
            rows.append(_cells(logps, unembedding.logits(resid), following[part], top=min(top, model.d_vocab)))
        blocks.append(_Cells(*map(torch.stack, zip(*rows, strict=True))))
    cells = _Cells(*(torch.cat(field, dim=1).cpu() for field in zip(*blocks, strict=True)))
    cells.next_logps[:, -1] = math.nan
    return LensReading(
        kind=_kind(tuned),
        hook_names=tuple(hooks),
        tokens=tuple(model.str_tokens(ids[0])),
        token_ids=tuple(ids[0].tolist()),
        top_tokens=tuple(tuple(tuple(model.str_tokens(cell)) for cell in row) for row in cells.top_ids.tolist()),
        **cells._asdict(),
    )


class _Cells(NamedTuple):
    top_ids: Int[Tensor, "*hooks seq n"]
    top_probs: Float[Tensor, "*hooks seq n"]
    kl: Float[Tensor, "*hooks seq"]
    next_logps: Float[Tensor, "*hooks seq"]


def _cells(
    logps: Float[Tensor, "seq d_vocab"],
    lens_logits: Float[Tensor, "seq d_vocab"],
    following: Int[Tensor, " seq"],
    *,
    top: int,
) -> _Cells:
    """What is kept of a row of cells, given the model's own log-probabilities and the tokens that follow."""
    lens_logps = lens_logits.log_softmax(-1)
    best = lens_logps.topk(top)
    next_logps = lens_logps.gather(1, following[:, None])[:, 0]
    return _Cells(best.indices, best.values.exp(), kl_divergence(logps, lens_logps), next_logps)


def _kind(tuned: TunedLens | None) -> str:
    return "logit lens" if tuned is None else "tuned lens"


class Effect(NamedTuple):
    """What a direction does to one token's logit, for each unit of activation, relative to the vocabulary's mean."""

    token: str
    effect: float


class FeatureLens(NamedTuple):
    """The tokens that a feature makes more and less likely by itself, as a lens reads its direction."""

    feature: int
    kind: str
    promoted: tuple[Effect, ...]
    suppressed: tuple[Effect, ...]
    z: float
    """The strongest effect in standard deviations over the vocabulary."""
    noise_z: float
    """What z stays below for 99 % of random directions, read the same way."""


@torch.no_grad()
def feature_lens(
    model: Model, sae: SAE, features: Sequence[int], *, tuned: TunedLens | None = None, top: int = 10
) -> list[FeatureLens]:
    """Read the directions of SAE features through the unembedding: ``norm(T W_dec[i]) @ W_U``, centred.

    T is the tuned lens' linear part after the SAE's block (the identity without one): what later layers usually make of
    a change there. The norm's division depends on the text and is left out, so that effects compare within a feature.

    Raises:
        ConfigError: the SAE does not write to the residual stream. ShapeError: no such feature.
        ArtifactError: the tuned lens was trained on another model.
    """
    if top < 1 or not features:
        raise ConfigError(f"there are {len(features)} features with top {top}; give at least 1 of both")
    unembedding = Unembedding(model)
    hook = _written_at(model, sae)
    directions = torch.stack([sae.feature(i).direction.float() for i in features]).to(model.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_N_RANDOM, model.d_model, generator=generator).to(model.device)
    if tuned is not None:
        tuned.check_model(model)
        if hook != unembedding.last_hook:
            translator = tuned.translator(hook)
            directions, noise = translator.direction(directions), translator.direction(noise)
    noise_z = float(torch.cat([_strongest(effects) for effects in _effects(unembedding, noise)]).quantile(0.99))
    found: list[FeatureLens] = []
    for effects in _effects(unembedding, directions):
        promoted = effects.topk(min(top, model.d_vocab))
        suppressed = effects.topk(min(top, model.d_vocab), largest=False)
        for row, z in enumerate(_strongest(effects).tolist()):
            up, down = (_named(model, ids[row], values[row]) for values, ids in (promoted, suppressed))
            found.append(FeatureLens(features[len(found)], _kind(tuned), up, down, z, noise_z))
    return found


def _written_at(model: Model, sae: SAE) -> str:
    """The residual stream that first holds what the SAE's features write."""
    hook = hook_of(model, sae)
    layer, place = layer_of(hook), hook.rpartition(".hook_")[2]
    if place in ("resid_pre", "resid_post"):
        return hook
    if place in ("resid_mid", "attn_out", "mlp_out"):
        return f"blocks.{layer}.hook_resid_post"
    raise ConfigError(
        f"the SAE reconstructs {hook}, which does not write to the residual stream as it is, so the unembedding cannot "
        "read its features; give an SAE of a residual stream, of attn_out or of mlp_out"
    )


def _effects(
    unembedding: Unembedding, directions: Float[Tensor, "n d_model"]
) -> Iterator[Float[Tensor, "block d_vocab"]]:
    """Effects on the vocabulary, minus their mean, which softmax does not see; a block of directions at a time."""
    norm, W_U = unembedding.unit_norm(), unembedding.model.unembed
    for block in token_blocks(len(directions), unembedding.model.d_vocab):
        effects = norm(directions[block]) @ W_U
        yield effects - effects.mean(1, keepdim=True)


def _strongest(effects: Float[Tensor, "block d_vocab"]) -> Float[Tensor, " block"]:
    """The largest of centred effects in standard deviations; 0 for a direction without any."""
    return effects.amax(1) / effects.square().mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _named(model: Model, ids: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> tuple[Effect, ...]:
    return tuple(Effect(token, float(v)) for token, v in zip(model.str_tokens(ids), values, strict=True))


def _checked(model: Model, name: str) -> str:
    known = model.check_hook(name)
    if not known.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post")):
        raise ConfigError(
            f"{known} is not the residual stream, which is what a lens reads; give a hook_resid_post, or ask by direct "
            f"logit attribution what {known} adds to a logit"
        )
    return known
