"""Find features by running the model: which of them fire on this text, and where?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from saelab.errors import ArtifactError, ShapeError, TextError
from saelab.features.records import SearchHit

if TYPE_CHECKING:
    from saelab.features.encoders import Encoder
    from saelab.features.index import FeatureIndex
    from saelab.models.load import Model
    from saelab.sae.base import SAE

Ranking = Literal["max", "sum", "count"]


@dataclass(frozen=True)
class TextCodes:
    """The features active on a text, as triples sorted by position and then by feature. BOS is left out."""

    tokens: tuple[str, ...]
    """Without BOS."""
    token_ids: tuple[int, ...]
    positions: Int[np.ndarray, " active"]
    """Index into ``tokens``."""
    features: Int[np.ndarray, " active"]
    values: Float[np.ndarray, " active"]

    def acts_of(self, feature: int) -> tuple[float, ...]:
        """Activation of one feature on every token."""
        acts = np.zeros(len(self.tokens))
        chosen = self.features == feature
        acts[self.positions[chosen]] = self.values[chosen]
        return tuple(acts.tolist())

    def at(self, position: int) -> list[tuple[int, float]]:
        """The features active on one token with their activations, strongest first.

        Raises:
            ShapeError: there is no such token.
        """
        if not 0 <= position < len(self.tokens):
            raise ShapeError(f"there is no token {position}; the text has tokens 0 to {len(self.tokens) - 1}")
        chosen = np.flatnonzero(self.positions == position)
        order = chosen[np.argsort(-self.values[chosen], kind="stable")]
        return [(int(self.features[i]), float(self.values[i])) for i in order]


def encode_text(model: Model, sae: SAE, text: str, *, max_tokens: int | None = None) -> TextCodes:
    """Run ``model`` on ``text`` as far as the SAE's hook and encode every token but BOS.

    Raises:
        TextError: the text is empty, or has more than ``max_tokens`` tokens.
    """
    import torch

    tokens = model.to_tokens(text)
    n_tokens = tokens.ids.shape[1] - 1
    if n_tokens < 1:
        raise TextError("there is no text to read; type at least one word")
    if max_tokens is not None and n_tokens > max_tokens:
        raise TextError(f"the text has {n_tokens} tokens, the limit is {max_tokens}; shorten it")
    hook_name = sae.metadata.hook_name
    with torch.inference_mode():
        acts = model.capture(tokens.ids, [hook_name])[hook_name][0, 1:]
        codes = sae.sparse_codes(acts.to(sae.W_dec.device, torch.float32))
        fires = codes.values > 0
        ids = tokens.ids[0, 1:].tolist()
        return TextCodes(
            tokens=tuple(model.str_tokens(ids)),
            token_ids=tuple(ids),
            positions=codes.rows[fires].cpu().numpy(),
            features=codes.features[fires].cpu().numpy(),
            values=codes.values[fires].float().cpu().numpy(),
        )


def rank_features(
    codes: TextCodes,
    index: FeatureIndex,
    *,
    n: int = 10,
    by: Ranking = "max",
    discount_dense: bool = True,
    max_density: float | None = None,
) -> list[SearchHit]:
    """The features of a text, best first: by their maximum or sum over its tokens, or by the tokens they fire on.

    ``discount_dense`` multiplies the score by ln(1 / density), as search engines discount frequent words (inverse
    document frequency, Sparck Jones 1972): a feature that fires everywhere says little about this text. ``max_density``
    leaves out the features that fire on a larger share of the indexed tokens.

    Raises:
        ArtifactError: the index describes fewer features than fired, so it belongs to another SAE.
    """
    if len(codes.features) and codes.features.max() >= index.n_features:
        raise ArtifactError(
            f"feature {codes.features.max()} fires, but {index.path} holds {index.n_features}; give this SAE's index"
        )
    highest = np.zeros(index.n_features)
    np.maximum.at(highest, codes.features, codes.values)
    score = {
        "max": lambda: highest.copy(),
        "sum": lambda: np.bincount(codes.features, weights=codes.values, minlength=index.n_features),
        "count": lambda: np.bincount(codes.features, minlength=index.n_features).astype(np.float64),
    }[by]()
    density = index.column("density")
    if discount_dense:
        # a feature that never fired in the indexed text counts as one that fired once
        score *= np.log(1 / np.clip(density, 1 / max(index.n_tokens, 2), 1))
    if max_density is not None:
        score[density > max_density] = 0
    order = np.lexsort((-highest, -score))[:n]
    labels = index.column("label")
    return [
        SearchHit(int(i), float(score[i]), labels[i], float(density[i]), _where(codes, int(i), float(highest[i])))
        for i in order
        if score[i] > 0
    ]


def features_in_text(
    model: Model,
    sae: SAE,
    index: FeatureIndex,
    text: str,
    *,
    n: int = 10,
    by: Ranking = "max",
    discount_dense: bool = True,
    max_density: float | None = None,
) -> list[SearchHit]:
    """The features that fire on ``text``, best first; see ``rank_features`` for the order.

    Raises:
        TextError: the text is empty.
        ArtifactError: the index belongs to another SAE.
    """
    codes = encode_text(model, sae, text)
    return rank_features(codes, index, n=n, by=by, discount_dense=discount_dense, max_density=max_density)


def _where(codes: TextCodes, feature: int, highest: float) -> str:
    acts = codes.acts_of(feature)
    peak = codes.tokens[int(np.argmax(acts))]
    n_fired = sum(act > 0 for act in acts)
    return f'{highest:.2f} on "{peak}", fires on {n_fired} of {len(acts)} tokens'


def search_by_meaning(index: FeatureIndex, encoder: Encoder, query: str, *, n: int = 10) -> list[SearchHit]:
    """The features whose labels and examples mean something similar to ``query``, by the cosine of their embeddings.

    A feature is described by its label and the text of its three strongest examples; dead ones by nothing.

    Raises:
        TextError: the query is empty.
    """
    if not query.strip():
        raise TextError("there is nothing to look for; type at least one word")
    alive = np.flatnonzero(index.column("n_fired") > 0)
    vectors = encoder.embed([_described(index, int(i)) for i in alive] + [query])
    cosine = vectors[:-1] @ vectors[-1]
    order = np.argsort(-cosine, kind="stable")[:n]
    labels, density = index.column("label"), index.column("density")
    return [
        SearchHit(int(i), float(c), labels[i], float(density[i]), f"cosine {c:.2f} by {encoder.name}")
        for i, c in zip(alive[order], cosine[order], strict=True)
    ]


def _described(index: FeatureIndex, feature: int) -> str:
    record = index.feature(feature)
    pieces = [
        "".join(example.tokens[max(0, example.peak - 8) : example.peak + 3]) for example in record.top_examples[:3]
    ]
    return "; ".join([record.label.text, *pieces])
