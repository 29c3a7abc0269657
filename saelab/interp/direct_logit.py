"""Direct logit attribution: what every component writes into the residual stream, read at one logit.

    x = sum of what components write,  logit = (norm(x) W_U + b_U)[token],  norm(x) = (x - centre) / s(x) * gain + bias

The last norm is frozen: its division s(x) is held at the value that it has in this run. Then everything is linear, and
the parts add up to the logit exactly. That is bookkeeping of what is written where, not an effect: taking a part away
would change s(x), and whatever later layers read of it (see activation patching for that).
Source: Elhage et al. 2021, "A mathematical framework for transformer circuits", for models without a norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError, ShapeError
from saelab.interp.feature_gradients import hook_of
from saelab.interp.patch_metrics import one_token
from saelab.interp.unembedding import Unembedding
from saelab.models.hooks import layer_of
from saelab.models.load import Model
from saelab.sae.base import SAE

Kind = Literal["embedding", "attention", "head", "mlp", "feature", "sae_bias", "error", "bias", "rounding"]

#: Largest share of the residual stream's norm that may be left unexplained by the components, by precision.
_UNEXPLAINED = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Part(NamedTuple):
    """What one component adds to the logit."""

    kind: Kind
    layer: int | None
    number: int | None
    """Of the head or of the feature."""
    value: float

    @property
    def name(self) -> str:
        where = "" if self.layer is None else f" {self.layer}"
        what = {"attention": "attn", "sae_bias": "SAE bias", "error": "SAE error"}.get(self.kind, self.kind)
        if self.kind == "head":
            return f"head {self.layer}.{self.number}"
        return f"feature {self.number}" if self.kind == "feature" else f"{what}{where}"


@dataclass(frozen=True)
class LogitAttribution:
    """A logit, or the difference of two, as the sum of ``parts``."""

    tokens: tuple[str, ...]
    """The text's, BOS included."""
    position: int
    """Index of the token after which the logit stands."""
    answer: str
    wrong: str | None
    logit: float
    """As the model computes it, before an architecture's own scaling or cap."""
    scale: float
    """What the last norm divides by at this position."""
    parts: tuple[Part, ...]
    """In the order of the forward pass; they sum to ``logit``. "rounding" is what the model's precision does."""

    def strongest(self, n: int = 10) -> list[Part]:
        """The ``n`` parts of the largest absolute value, largest first."""
        return sorted(self.parts, key=lambda part: -abs(part.value))[:n]

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": list(self.tokens),
            "position": self.position,
            "answer": self.answer,
            "wrong": self.wrong,
            "logit": self.logit,
            "scale": self.scale,
            "parts": [part._asdict() | {"name": part.name} for part in self.parts],
        }


@torch.no_grad()
def direct_logit_attribution(
    model: Model,
    text: str,
    *,
    answer: str | int | None = None,
    wrong: str | int | None = None,
    position: int = -1,
    heads: bool = False,
    sae: SAE | None = None,
) -> LogitAttribution:
    """Divide up the logit of ``answer`` after ``position`` of ``text``, or its difference to that of ``wrong``.

    Both are tokens by their text or their id; by default the answer is what the model predicts. Parts are the embedding
    (with positions where the model adds them), each attention output and each MLP. ``heads`` divides attention outputs
    into heads; ``sae`` replaces what its hook holds by the features active there, its bias and its error. A difference
    is easier to read than a logit: what moves all logits alike, which softmax does not see, cancels.

    Raises:
        ConfigError: the components do not add up to the residual stream of this architecture, an SAE that does not
            reconstruct one place in it, or twice the same token.
        TextError: an answer that is no single token. ShapeError: no such position or token id.
    """
    unembedding = Unembedding(model)
    ids = model.to_tokens(text).ids
    seq = ids.shape[1]
    if not -seq <= position < seq:
        raise ShapeError(f"there is no token {position}; the text has tokens 0 to {seq - 1}, the first is BOS")
    components = _components(model)
    z_hooks = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)] if heads else []
    sae_hook = None if sae is None else hook_of(model, sae)
    wanted = [hook for component in components for hook in component.hooks]
    wanted += [*z_hooks, *([sae_hook] if sae_hook else []), unembedding.last_hook]
    acts = {hook: value[0, position].float() for hook, value in model.capture(ids, wanted).items()}
    resid = acts[unembedding.last_hook]
    written = [torch.stack([acts[hook] for hook in component.hooks]).sum(0) for component in components]
    _check_sum(model, torch.stack(written).sum(0), resid)

    logits = unembedding.linear(unembedding.normed(resid[None]))[0].float()
    ours = int(logits.argmax()) if answer is None else _token_id(model, answer)
    theirs = [] if wrong is None else [_token_id(model, wrong)]
    if theirs == [ours]:
        raise ConfigError(f"both tokens are {model.str_tokens([ours])[0]!r}, and their difference is 0; name two")
    norm, W_U = unembedding.frozen_norm(resid), model.unembed
    reader = W_U[:, ours] - (W_U[:, theirs[0]] if theirs else 0)
    biases = unembedding.bias([ours, *theirs])
    logit = float(logits[ours] - (logits[theirs[0]] if theirs else 0))

    def read(vector: Float[Tensor, " d_model"]) -> float:
        return float(norm(vector) @ reader)

    def parts() -> Iterator[Part]:
        covered = _covered(components, sae_hook)
        for component, vector in zip(components, written, strict=True):
            if component in covered:
                if component == covered[-1] and sae is not None and sae_hook is not None:
                    yield from _sae_parts(sae, acts[sae_hook], read)
            elif heads and component.kind == "attention":
                yield from _head_parts(model, component, acts, vector, read)
            else:
                yield Part(component.kind, component.layer, None, read(vector))
        yield Part("bias", None, None, float(norm.bias @ reader + biases[0] - biases[1:].sum()))

    found = list(parts())
    found.append(Part("rounding", None, None, logit - sum(part.value for part in found)))
    names = [model.str_tokens([i])[0] for i in (ours, *theirs)]
    return LogitAttribution(
        tokens=tuple(model.str_tokens(ids[0])),
        position=position % seq,
        answer=names[0],
        wrong=names[1] if theirs else None,
        logit=logit,
        scale=norm.scale,
        parts=tuple(found),
    )


class _Component(NamedTuple):
    """Something that writes to the residual stream, and the hooks that hold what it writes."""

    kind: Kind
    layer: int | None
    hooks: tuple[str, ...]


def _components(model: Model) -> list[_Component]:
    positions = ("hook_pos_embed",) if "hook_pos_embed" in model.hook_names() else ()
    parts = [_Component("embedding", None, ("hook_embed", *positions))]
    for layer in range(model.n_layers):
        parts.append(_Component("attention", layer, (f"blocks.{layer}.hook_attn_out",)))
        parts.append(_Component("mlp", layer, (f"blocks.{layer}.hook_mlp_out",)))
    return parts


def _covered(components: Sequence[_Component], sae_hook: str | None) -> list[_Component]:
    """The components whose sum is what the SAE's hook holds.

    Raises:
        ConfigError: the hook holds no such sum.
    """
    if sae_hook is None:
        return []
    layer, place = layer_of(sae_hook), sae_hook.rpartition("hook_")[2]
    alone = [component for component in components if sae_hook in component.hooks and len(component.hooks) == 1]
    if alone:
        return alone
    if layer is not None and place in ("resid_pre", "resid_mid", "resid_post"):
        n_written = 2 * layer + {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[place]
        return list(components[: 1 + n_written])
    raise ConfigError(
        f"the SAE reconstructs {sae_hook}, which is not written to the residual stream as it is, so its features have "
        "no direct part in a logit; give an SAE of a residual stream, of attn_out or of mlp_out"
    )


def _sae_parts(sae: SAE, acts: Float[Tensor, " d_model"], read: Any) -> Iterator[Part]:
    """Active features, what the SAE adds whatever the features, and what it leaves."""
    layer, acts = layer_of(sae.metadata.hook_name), acts.to(sae.dtype)
    codes = sae.sparse_codes(acts[None])
    directions = sae.W_dec[codes.features].float()
    recon = sae(acts[None])[0].float()
    for feature, value, direction in zip(codes.features.tolist(), codes.values.float(), directions, strict=True):
        yield Part("feature", layer, feature, read(value * direction))
    yield Part("sae_bias", layer, None, read(recon - codes.values.float() @ directions))
    yield Part("error", layer, None, read(acts.float() - recon))


def _head_parts(
    model: Model, component: _Component, acts: dict[str, Tensor], written: Float[Tensor, " d_model"], read: Any
) -> Iterator[Part]:
    """Each head's output, and the attention's bias with what rounding leaves.

    Raises:
        ConfigError: the heads do not add up to the attention's output.
    """
    attention = model.bridge.blocks[component.layer].attn
    W_O = attention.W_O.detach().float()  # [n_heads, d_head, d_model]
    z = acts[f"blocks.{component.layer}.attn.hook_z"].view(W_O.shape[0], W_O.shape[1])
    outputs = torch.einsum("hd,hdm->hm", z, W_O)
    bias = getattr(attention, "b_O", None)
    _check_sum(model, outputs.sum(0) + (0 if bias is None else bias.detach().float()), written)
    for head, output in enumerate(outputs):
        yield Part("head", component.layer, head, read(output))
    yield Part("attention", component.layer, None, read(written - outputs.sum(0)))


def _check_sum(model: Model, found: Float[Tensor, " d_model"], expected: Float[Tensor, " d_model"]) -> None:
    share = float((expected - found).norm() / expected.norm().clamp_min(1e-9))
    if not share <= _UNEXPLAINED[model.dtype]:
        raise ConfigError(
            f"the parts of {model.name} do not add up to what they should make (the rest has {share:.0%} of its norm), "
            "so they cannot be read one by one: is an edit active, or does the architecture scale what it adds?"
        )


def _token_id(model: Model, token: str | int) -> int:
    if isinstance(token, str):
        return one_token(model, token)
    if not 0 <= token < model.d_vocab:
        raise ShapeError(f"there is no token {token}; {model.name} has tokens 0 to {model.d_vocab - 1}")
    return token
