"""How probable a model finds an answer: one number for each token of the completion, the prompt left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.align.encoding import Batch, PackedBatch
from saelab.errors import ConfigError
from saelab_kernels import token_logps


@dataclass(frozen=True)
class CompletionLogps:
    """Log-probabilities in nats, float32; column t is that of the token at place t + 1, given all before it."""

    logps: Float[Tensor, "batch seq"]
    """0 where ``mask`` is False."""
    mask: Bool[Tensor, "batch seq"]
    """True where the predicted token belongs to the completion, EOS included."""

    def sum(self) -> Float[Tensor, " batch"]:
        """log p(completion | prompt)."""
        return self.logps.sum(1)

    def mean(self) -> Float[Tensor, " batch"]:
        """The same a token."""
        return self.logps.sum(1) / self.mask.sum(1)


def completion_logps(model: Any, batch: Batch, *, temperature: float = 1.0) -> CompletionLogps:
    """Log-probabilities of the completions of ``batch`` under a Hugging Face causal language model, with gradients.

    With a ``temperature``, those of the distribution that sampling at this temperature draws from.

    Raises:
        ConfigError: the model's head does more than multiply by a matrix.
    """
    return logps_of_hidden(hidden_states(model, batch), unembedding(model), batch, temperature=temperature)


def packed_logps(model: Any, packed: PackedBatch) -> Float[Tensor, " sequences"]:
    """log p(completion | prompt) of each packed sequence, with gradients: no sequence sees another.

    Positions that start anew, without a mask, are what transformers takes as the boundaries of packed sequences.

    Raises:
        ConfigError: the model's head does more than multiply by a matrix, or its attention would see across.
    """
    lm = causal_lm(model)
    if lm.config._attn_implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"packing needs attention of the kind sdpa or eager, and the model has {lm.config._attn_implementation}; "
            "leave packing out"
        )
    output = lm.base_model(input_ids=packed.ids, position_ids=packed.positions, use_cache=False)
    counts = packed.owner[:, 1:] >= 0  # a completion has a prompt before it, so its first token is never a row's first
    flat = token_logps(output.last_hidden_state[:, :-1][counts], unembedding(model), packed.ids[:, 1:][counts])
    sums = torch.zeros(packed.n_sequences, dtype=flat.dtype, device=flat.device)
    return sums.index_add(0, packed.owner[:, 1:][counts], flat)


def logps_of_hidden(
    hidden: Float[Tensor, "batch seq d_model"],
    W_U: Float[Tensor, "d_vocab d_model"],
    batch: Batch,
    *,
    temperature: float = 1.0,
) -> CompletionLogps:
    """The same from what the head reads, for callers that read it too."""
    mask = batch.completion_mask[:, 1:]
    flat = token_logps(hidden[:, :-1][mask] / temperature, W_U, batch.ids[:, 1:][mask])
    logps = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
    return CompletionLogps(logps, mask)


@torch.no_grad()
def log_collisions(
    hidden: Float[Tensor, "batch seq d_model"], W_U: Float[Tensor, "d_vocab d_model"], batch: Batch
) -> Float[Tensor, "batch width"]:
    """log sum_v p(v)^2 at each token of the completions: that two draws from the model agree; 0 elsewhere."""
    mask = batch.completion_mask[:, 1:]
    found = torch.zeros(mask.shape, device=mask.device)
    rows = []
    for part in hidden[:, :-1][mask].split(256):  # a few hundred distributions at a time
        logits = (part @ W_U.T).float()
        rows.append((2 * logits).logsumexp(1) - 2 * logits.logsumexp(1))
    return found.masked_scatter(mask, torch.cat(rows))


def hidden_states(model: Any, batch: Batch) -> Float[Tensor, "batch seq d_model"]:
    """What the head reads, at each token."""
    body = causal_lm(model).base_model
    # positions given, because models that learn them would count a mask's gaps
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    output = body(
        input_ids=batch.ids, attention_mask=batch.attention_mask.long(), position_ids=positions, use_cache=False
    )
    return output.last_hidden_state


def unembedding(model: Any) -> Float[Tensor, "d_vocab d_model"]:
    """The matrix that turns hidden states into logits.

    Raises:
        ConfigError: the head has a bias, or the logits are scaled or capped afterwards.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    extras = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if _set(lm.config, name)]
    if getattr(head, "bias", None) is not None:
        extras.append("a bias of the head")
    if extras:
        raise ConfigError(f"{type(lm).__name__} changes its logits by {' and '.join(extras)}; use another architecture")
    return head.weight


def causal_lm(model: Any) -> Any:
    """The Hugging Face model itself, from under a PEFT adapter where there is one (its layers stay in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _set(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return value is not None and value != 1.0
