"""What patching and attribution measure: one number for each run of a text, made from its logits.

A metric is any function from the next-token logits of a batch of runs of *one* text (the same tokens, other edits) to
one value a run. Where gradients are taken through it, it must be differentiable; those here are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError, ShapeError, TextError
from saelab.models.divergence import kl_divergence
from saelab.models.load import Model

Metric = Callable[[Float[Tensor, "runs seq d_vocab"]], Float[Tensor, " runs"]]


def logit_difference(right: int | Sequence[int], wrong: int | Sequence[int], *, position: int = -1) -> Metric:
    """Logit of the ``right`` token minus that of the ``wrong`` one after ``position``; of several, their means.

    Unlike log-probabilities it is linear in the logits, so contributions to it add up (Wang et al. 2022, arXiv
    2211.00593, section 3).

    Raises:
        ConfigError: no token on one side, or the same on both.
        ShapeError: when called, for a token outside the vocabulary or a position outside the text.
    """
    ours, theirs = _token_ids(right), _token_ids(wrong)
    if not ours or not theirs or set(ours) == set(theirs):
        raise ConfigError(f"a logit difference needs two different tokens, got {ours} and {theirs}; name both")

    def metric(logits: Float[Tensor, "runs seq d_vocab"]) -> Float[Tensor, " runs"]:
        last = _at(logits, position, [*ours, *theirs])
        return last[:, ours].mean(1) - last[:, theirs].mean(1)

    return metric


def log_probability(target: int | Sequence[int], *, position: int = -1) -> Metric:
    """Log-probability in nats that the token after ``position`` is ``target``, or one of several.

    Raises:
        ConfigError: no token.
        ShapeError: when called, for a token outside the vocabulary or a position outside the text.
    """
    ids = _token_ids(target)
    if not ids:
        raise ConfigError("a log-probability needs at least one token, got none; name it")

    def metric(logits: Float[Tensor, "runs seq d_vocab"]) -> Float[Tensor, " runs"]:
        return _at(logits, position, ids).log_softmax(-1)[:, ids].logsumexp(1)

    return metric


def probability(target: int | Sequence[int], *, position: int = -1) -> Metric:
    """Probability between 0 and 1 that the token after ``position`` is ``target``, or one of several.

    Raises:
        ConfigError: no token.
        ShapeError: when called, for a token outside the vocabulary or a position outside the text.
    """
    logp = log_probability(target, position=position)
    return lambda logits: logp(logits).exp()


def divergence_from(clean_logits: Float[Tensor, "1 seq d_vocab"], *, position: int = -1) -> Metric:
    """KL(clean || run) in nats of the next-token distributions after ``position``: 0 for a run that is like the clean
    one, and larger the further away it is.

    Raises:
        ShapeError: when called, for a position outside the text.
    """
    clean = _at(clean_logits.detach(), position, []).log_softmax(-1)

    def metric(logits: Float[Tensor, "runs seq d_vocab"]) -> Float[Tensor, " runs"]:
        return kl_divergence(clean, _at(logits, position, []).log_softmax(-1))

    return metric


def one_token(model: Model, text: str) -> int:
    """The id of an answer that is a single token, written as it would stand in the text: ``" Paris"``, with its space.

    Raises:
        TextError: the text is empty, or more than one token.
    """
    ids = model.encode(text)
    if len(ids) != 1:
        raise TextError(
            f"an answer must be one token of {model.name}, but {text!r} is {len(ids)} "
            f"({', '.join(map(repr, model.str_tokens(ids)))}); use its first token, leading space included"
        )
    return ids[0]


def _token_ids(tokens: int | Sequence[int]) -> list[int]:
    return [tokens] if isinstance(tokens, int) else list(tokens)


def _at(logits: Float[Tensor, "runs seq d_vocab"], position: int, ids: list[int]) -> Float[Tensor, "runs d_vocab"]:
    seq, d_vocab = logits.shape[1:]
    if not -seq <= position < seq:
        raise ShapeError(f"there is no position {position}: the text has {seq} tokens; choose one of them")
    if ids and not 0 <= min(ids) <= max(ids) < d_vocab:
        raise ShapeError(f"the tokens {ids} are not all among the model's {d_vocab}; were they another tokenizer's?")
    return logits[:, position]
