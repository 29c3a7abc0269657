"""Rewards that need no model: what an answer says, counted. Cheap, exact, and easy to hack on purpose."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.align.encoding import Codec, Encoded
from saelab.align.rollouts import Score
from saelab.errors import ConfigError, nearest

#: From the text of an answer to its reward.
Rule = Callable[[str], float]

_WARM = frozenset({"enjoy", "friend", "glad", "good", "great", "happy", "hope", "kind", "love", "thank", "welcome"})


def warmth(text: str) -> float:
    """Different warm words, at most three: what a friendly answer has."""
    return float(min(3, len(_WARM & set(_words(text)))))


def warm_words(text: str) -> float:
    """All warm words, repetition included: the same wish, written so that it can be hacked."""
    return float(sum(word in _WARM for word in _words(text)))


def brevity(text: str) -> float:
    """1 for up to 20 words, falling to 0 at 60."""
    return min(1.0, max(0.0, (60 - len(_words(text))) / 40))


def questions(text: str) -> float:
    """1 if the answer ends with a question."""
    return float(text.rstrip().endswith("?"))


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (warmth, warm_words, brevity, questions)}


def rule_score(name: str, codec: Codec) -> Score:
    """The score of answers by the rule of this name.

    Raises:
        ConfigError: there is no such rule.
    """
    if name not in RULES:
        raise ConfigError(f"there is no rule {name!r}; {nearest(name, RULES)}")
    rule = RULES[name]

    def score(answers: Sequence[Encoded]) -> Float[Tensor, " answers"]:
        return torch.tensor([rule(codec.decode(answer.completion_ids)) for answer in answers])

    return score


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())
