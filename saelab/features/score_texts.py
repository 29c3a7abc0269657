"""Scores that need no judge: do a feature's examples resemble each other, and does its explanation make them likelier?

example embedding   texts in which the feature fires lie nearer to its examples than texts in which it is silent do
surprisal           the explanation, put in front, lowers the model's loss on the former more than on the latter

Both are areas under the ROC curve: 0.5 is chance, 1 perfect. The ideas are those of the delphi library's scorers of
these names; here the examples come from the fitting documents and the texts from the scoring ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.features.contexts import Contexts, Drawn, as_texts
from saelab.features.encoders import Encoder
from saelab.models.load import Model
from saelab.stats import superiority

#: In front of a text: with the explanation, and in its place.
_EXPLAINED = "The following text is an example of: {}\n\n"
_NEUTRAL = "The following text is an example of: various unrelated words\n\n"


def example_embedding_score(encoder: Encoder, examples: Contexts, drawn: Drawn, model: Model) -> float:
    """AUC of the cosine to the mean embedding of ``examples``.

    Raises:
        ValueError: no examples, or no texts on one side.
    """
    pieces = [as_texts(contexts, model) for contexts in (examples, drawn.active, drawn.silent)]
    if not all(pieces):
        raise ValueError("the example embedding score needs examples and texts of both kinds")
    vectors = encoder.embed([text for texts in pieces for text in texts])
    ends = np.cumsum([len(texts) for texts in pieces])
    centre = vectors[: ends[0]].mean(0)
    near = vectors @ centre
    return superiority(near[ends[0] : ends[1]], near[ends[1] :])


def surprisal_score(model: Model, explanation: str, drawn: Drawn) -> float:
    """AUC of the drop of the mean loss of a text's tokens, from a neutral sentence in front to the explanation.

    Raises:
        ValueError: no texts on one side.
    """
    prompts = [model.encode(template) for template in (_EXPLAINED.format(explanation), _NEUTRAL)]
    drops = []
    for contexts in drawn:
        told, neutral = (losses_behind(model, prompt, contexts.tokens) for prompt in prompts)
        drops.append(neutral - told)
    return superiority(*drops)


@torch.inference_mode()
def losses_behind(
    model: Model, prompt: Sequence[int], tokens: Int[np.ndarray, "pieces length"], *, batch_size: int = 16
) -> Float[np.ndarray, " pieces"]:
    """Mean loss in nats of the tokens of each piece, read behind BOS and ``prompt``."""
    n_front = len(prompt) + 1
    losses = []
    for start in range(0, len(tokens), batch_size):
        pieces = torch.from_numpy(tokens[start : start + batch_size]).long()
        front = torch.tensor([model.bos_id, *prompt]).expand(len(pieces), -1)
        logits = model.logits(torch.cat([front, pieces], 1))[:, n_front - 1 : -1]
        losses.append(-logits.log_softmax(-1).gather(2, pieces.to(logits.device)[..., None])[..., 0].mean(1).cpu())
    return torch.cat(losses).double().numpy() if losses else np.empty(0)
