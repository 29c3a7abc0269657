"""A language model as explainer and as judge: it writes an explanation from examples, and is then put to the test.

detection   shown an explanation and a text: does it fit? AUC over texts in which the feature fires and is silent
fuzzing     shown a text with marked tokens: are the right ones marked? AUC over right and wrong marks, on active texts

The ideas are those of Bills et al. 2023 (language models can explain neurons) and of the delphi library's scorers of
these names; prompts and code are our own. An answer is read as the probability of "Yes" against "No", so no text has
to be parsed. The judge is any ``Critic``: a local model, or a server that speaks OpenAI's protocol.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int

from saelab.align.critics import Conversation, Critic
from saelab.align.records import Message
from saelab.errors import TextError
from saelab.features.contexts import Contexts, Drawn, as_texts
from saelab.models.load import Model
from saelab.stats import superiority

_OPEN, _CLOSE = "<<", ">>"

_EXPLAIN = (
    "Below are pieces of text. A detector fired on the tokens between << and >>.\n\n{examples}\n\nWhat do the marked "
    "tokens, or the text before them, have in common? Answer with one short phrase and nothing else."
)
_DETECT = (
    "A detector fires on: {explanation}\n\nText:\n{text}\n\nDoes the detector fire anywhere in this text? "
    "Answer Yes or No."
)
_FUZZ = (
    "A detector fires on: {explanation}\n\nIn the following text, the tokens on which it is said to fire stand between "
    "<< and >>:\n{text}\n\nAre these the right tokens? Answer Yes or No."
)
_ANSWERS = ("Yes", "No")


def ask_for_explanation(critic: Critic, examples: Contexts, model: Model, *, seed: int = 0) -> str:
    """One phrase on what makes a feature fire, by ``critic``, from marked examples.

    Raises:
        TextError: it answers nothing.
        AssetError: a server fails.
    """
    shown = "\n".join(f"{i + 1}. {text}" for i, text in enumerate(marked(examples, examples.fires, model)))
    conversation = (Message("user", _EXPLAIN.format(examples=shown)),)
    answer = critic.reply([conversation], max_new_tokens=40, seed=seed)[0]
    phrase = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    if not phrase:
        raise TextError(f"{critic.name} answers nothing when asked for an explanation; use a model that follows orders")
    return phrase


def detection_score(critic: Critic, explanation: str, drawn: Drawn, model: Model) -> float:
    """AUC of the judge's "Yes" over texts in which the feature fires and texts in which it is silent.

    Raises:
        AssetError: a server fails, or gives neither answer.
        ValueError: no texts on one side.
    """
    asked = (
        (_DETECT.format(explanation=explanation, text=text) for text in as_texts(contexts, model)) for contexts in drawn
    )
    active, silent = (_yes(critic, prompts) for prompts in asked)
    return superiority(active, silent)


def fuzzing_score(critic: Critic, explanation: str, active: Contexts, model: Model, *, seed: int = 0) -> float:
    """AUC of the judge's "Yes" over active texts with the firing tokens marked, and with as many others marked.

    Raises:
        AssetError: a server fails, or gives neither answer.
        ValueError: no texts.
    """
    wrong = wrong_marks(active.fires, seed=seed)
    asked = (
        (_FUZZ.format(explanation=explanation, text=text) for text in marked(active, marks, model))
        for marks in (active.fires, wrong)
    )
    right, others = (_yes(critic, prompts) for prompts in asked)
    return superiority(right, others)


def wrong_marks(fires: Bool[np.ndarray, "pieces length"], *, seed: int) -> Bool[np.ndarray, "pieces length"]:
    """As many tokens of each piece among those on which the feature is silent (all of them, if these are fewer)."""
    keys = np.random.default_rng(seed).random(fires.shape)
    keys[fires] = 2.0  # behind every silent token
    rank = keys.argsort(1).argsort(1)
    return (rank < fires.sum(1, keepdims=True)) & ~fires


def marked(contexts: Contexts, marks: Bool[np.ndarray, "pieces length"], model: Model) -> list[str]:
    """The pieces as text, each run of marked tokens between << and >>."""
    return [_marked(ids, row, model) for ids, row in zip(contexts.tokens, marks, strict=True)]


def _marked(ids: Int[np.ndarray, " length"], marks: Bool[np.ndarray, " length"], model: Model) -> str:
    edges = [0, *(np.flatnonzero(marks[1:] != marks[:-1]) + 1).tolist(), len(ids)]
    pieces = []
    for start, stop in pairwise(edges):
        text = model.tokenizer.decode(ids[start:stop].tolist())
        pieces.append(f"{_OPEN}{text}{_CLOSE}" if marks[start] else text)
    return "".join(pieces)


def _yes(critic: Critic, prompts: Iterable[str]) -> np.ndarray:
    """Log odds of "Yes" against "No" for each prompt."""
    odds = []
    for prompt in prompts:
        conversation: Conversation = (Message("user", prompt),)
        yes, no = critic.log_probabilities(conversation, _ANSWERS)
        odds.append(yes - no)  # at least one is finite, so this is a number or an infinity, which can be ordered
    return np.array(odds, float)
