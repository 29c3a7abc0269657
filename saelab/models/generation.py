"""Writing text token by token with a KV cache: one forward pass over the prompt, then one position at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.models.tokens import Tokens, behind_first, left_padded

#: ``forward(ids [batch, new], mask [batch, total], editable [batch, new], cache) -> (logits, cache)``
Forward = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop."""

    max_new_tokens: int = 40
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability; 1 is no cut."""
    seed: int = 0
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}; give a count of tokens")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}; try 1.0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (no cut), got {self.top_p}; try 0.9")


def new_tokens(
    forward: Forward, tokens: Tokens, sampling: Sampling, *, seeds: Sequence[int], stop_ids: frozenset[int]
) -> Iterator[list[int | None]]:
    """The next token of every row, step after step; None for a row that has ended. Stops when all have.

    ``seeds`` has one number a row, so a row draws the same tokens whatever stands beside it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ended = [False] * len(seeds)
    ids, mask = left_padded(tokens)
    editable, cache = behind_first(mask), None
    for _ in range(sampling.max_new_tokens):
        logits, cache = forward(ids, mask, editable, cache)
        last = logits[:, -1].float().cpu()
        chosen = [
            next_token(row, temperature=sampling.temperature, top_p=sampling.top_p, generator=generator)
            for row, generator in zip(last, generators, strict=True)
        ]
        if sampling.stop_at_eos:
            ended = [before or token in stop_ids for before, token in zip(ended, chosen, strict=True)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, chosen, strict=True)]
        ids = torch.tensor(chosen, device=ids.device)[:, None]
        editable = torch.ones_like(ids, dtype=torch.bool)
        mask = torch.cat([mask, editable], 1)


def next_token(
    logits: Float[Tensor, " d_vocab"], *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """The likeliest token at temperature 0, else a draw from ``softmax(logits / temperature)`` within the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches ``top_p`` (Holtzman et al. 2020,
    arXiv 1904.09751, eq. 2 and 3).

    Raises:
        ConfigError: the logits are not numbers, as happens under far too strong edits.
    """
    if not logits.max().isfinite():
        raise ConfigError("the next token's logits are not numbers; an edit is too strong, lower its strength")
    if temperature == 0:
        return int(logits.argmax())
    probs = ((logits - logits.max()) / temperature).softmax(0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        outside = ordered.cumsum(0) - ordered >= top_p  # the likelier ones reach top_p without this one
        probs = probs.index_fill(0, order[outside], 0.0)
    return int(torch.multinomial(probs, 1, generator=generator))
