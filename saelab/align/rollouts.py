"""Answers that the policy writes itself, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.permutation import mixed_key
from saelab.align.encoding import Encoded
from saelab.align.logprob import causal_lm
from saelab.align.policy import Policy
from saelab.errors import ConfigError
from saelab.models.generation import Sampling, new_tokens
from saelab.models.tokens import Tokens, right_padded

#: A score for each answer; higher is better.
Score = Callable[[Sequence[Encoded]], Float[Tensor, " answers"]]


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How answers are sampled and scored."""

    max_new_tokens: int = 48
    """Longest answer; one that reaches it has no EOS."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities that training compares."""
    missing_eos_penalty: float | None = 1.0
    """Taken from the score of an answer that did not end. Off: nothing."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}; 48 is usual")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0 to sample, got {self.temperature}; 1 is usual")


def sample(
    policy: Policy, prompts: Sequence[tuple[int, ...]], settings: RolloutSettings, *, seed: int
) -> list[Encoded]:
    """One answer to each prompt, drawn in one batch with a KV cache; row i draws the same whatever stands beside it.

    An answer ends with EOS, or is ``truncated`` at the longest length; nothing is appended to those, because a token
    that the policy did not draw would be off-policy.
    """
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, stop_at_eos=False)
    tokens = right_padded(prompts, pad_id=policy.codec.pad_id)
    tokens = Tokens(tokens.ids.to(policy.device), tokens.mask.to(policy.device))
    seeds = [mixed_key(seed, row) >> 1 for row in range(len(prompts))]
    drawn: list[list[int]] = [[] for _ in prompts]
    eos = policy.codec.eos_id
    with torch.no_grad():
        for chosen in new_tokens(_forward(policy.model), tokens, sampling, seeds=seeds, stop_ids=frozenset()):
            for answer, token in zip(drawn, chosen, strict=True):
                if token is not None and eos not in answer[-1:]:
                    answer.append(token)
            if all(answer[-1:] == [eos] for answer in drawn):
                break
    return [
        Encoded(tuple(prompt), tuple(answer), truncated=answer[-1] != eos)
        for prompt, answer in zip(prompts, drawn, strict=True)
    ]


def score_with_penalty(
    score: Score, answers: Sequence[Encoded], settings: RolloutSettings
) -> Float[Tensor, " answers"]:
    """The scores, less the penalty of answers without an end."""
    scores = score(answers).float()
    if settings.missing_eos_penalty is None:
        return scores
    truncated = torch.tensor([answer.truncated for answer in answers])
    return scores - settings.missing_eos_penalty * truncated


def _forward(model: Any) -> Any:
    """What ``new_tokens`` calls: logits of the new places, and the cache.

    Sampling reads the layers with their adapter, so the base model's call is enough.
    """
    lm = causal_lm(model)

    def forward(ids: Tensor, mask: Tensor, editable: Tensor, cache: Any) -> tuple[Tensor, Any]:
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = lm(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits, output.past_key_values

    return forward
