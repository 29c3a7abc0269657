"""Token sets and n-grams: the feature fires on these tokens, after these tokens, on these sequences of two or three."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saelab.features.explainers.items import Family, ItemExplainer
from saelab.features.explainers.text import Text
from saelab.features.label import listed, quoted

#: Places before the position that the families read, furthest first; 0 is the position itself.
_NGRAMS = ((1,), (2,), (1, 0), (2, 0), (2, 1, 0))


def token_sets(text: Text) -> ItemExplainer:
    """The token is one of these."""
    return ItemExplainer("token set", [ngram_family(text, (0,))], text)


def ngrams(text: Text) -> ItemExplainer:
    """The token before is one of these, or the one before that; or two or three tokens are one of these sequences."""
    return ItemExplainer("n-gram", [ngram_family(text, offsets) for offsets in _NGRAMS], text)


def ngram_family(text: Text, offsets: tuple[int, ...]) -> Family:
    """The tokens at these places before each position."""
    shown = np.stack([text.before(n) for n in offsets], 1).astype(np.int64)
    shown[(shown < 0).any(1)] = -1
    width = len(text.vocabulary) + 1
    keys = ((shown + 1) * width ** np.arange(len(offsets))[::-1]).sum(1)
    _, first, item = np.unique(keys, return_index=True, return_inverse=True)
    vocabulary = text.vocabulary

    def describe(meanings: Sequence[Sequence[int]]) -> str:
        if len(offsets) == 1:
            tokens = listed([vocabulary[ids[0]] for ids in meanings])
            return {0: tokens, 1: f"after {tokens}", 2: f"two after {tokens}", -1: f"before {tokens}"}[offsets[0]]
        gap = " -> ... -> " if offsets == (2, 0) else " -> "
        shown = [gap.join(quoted(vocabulary[t]) for t in ids) for ids in meanings[:3]]
        return ", ".join(shown) + (", ..." if len(meanings) > 3 else "")

    def named(meanings: Sequence[Sequence[int]]) -> tuple[int, ...]:
        if offsets[-1] > 0:
            return ()
        return tuple(dict.fromkeys(ids[-1] for ids in meanings))

    return Family(item.reshape(-1), shown[first], describe, named)
