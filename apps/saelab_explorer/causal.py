"""Does a feature matter where it fires? Take it away on its own texts, and as a control another one as active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import saelab as sl
from saelab.stats import Interval, interval_of_mean

if TYPE_CHECKING:
    from torch import Tensor

    from saelab_explorer.live import Live

#: Texts that are run, and tokens that are named.
N_TEXTS, N_TOKENS = 8, 6

Progress = Callable[[int, int], None]


class Ablation(NamedTuple):
    """One text: what the token after the peak loses when the feature is taken away."""

    token: str
    """The token at the peak."""
    act: float
    kl: float
    """KL(clean || ablated) of the next token, in nats."""
    control: int
    """The other feature, of those active at the peak the one whose activation is nearest."""
    control_kl: float


@dataclass(frozen=True)
class CausalCheck:
    """What taking a feature away does on the texts it fires on most."""

    texts: tuple[Ablation, ...]
    """Those on which it fires when the excerpt is read alone, with another active feature to compare with."""
    n_read: int
    supported: tuple[tuple[str, float], ...]
    """Tokens whose mean probability falls most without it, and by how much."""
    held_back: tuple[tuple[str, float], ...]
    """Tokens whose mean probability rises most without it."""

    @property
    def advantage(self) -> Interval | None:
        """Mean KL of the feature minus that of its control, in nats; resampled over texts, None for fewer than 2."""
        if len(self.texts) < 2:
            return None
        return interval_of_mean(np.array([text.kl - text.control_kl for text in self.texts]))


def causal_check(ready: Live, record: sl.FeatureRecord, *, progress: Progress) -> CausalCheck:
    """Ablate the feature in its ``N_TEXTS`` strongest excerpts and see what changes right after the peak."""
    examples = record.top_examples[:N_TEXTS]
    texts: list[Ablation] = []
    changes: list[Tensor] = []
    for n, example in enumerate(examples):
        outcome = _ablated(ready, record.index, example)
        if outcome is not None:
            texts.append(outcome[0])
            changes.append(outcome[1])
        progress(n + 1, len(examples))
    if not changes:
        return CausalCheck((), len(examples), (), ())
    change = sum(changes[1:], changes[0]) / len(changes)
    falls, rises = (change * sign for sign in (-1, 1))
    return CausalCheck(tuple(texts), len(examples), _largest(ready, falls), _largest(ready, rises))


def _ablated(ready: Live, feature: int, example: sl.Example) -> tuple[Ablation, Tensor] | None:
    """The ablation in one excerpt, with the change of every next token's probability."""
    import torch

    model, sae = ready
    ids = torch.tensor([[model.bos_id, *example.token_ids]])
    peak, hook_name = example.peak + 1, sae.metadata.hook_name
    with torch.inference_mode():
        acts = model.capture(ids, [hook_name])[hook_name][0, peak : peak + 1]
        codes = sae.sparse_codes(acts.to(sae.device, torch.float32))
        active = {int(i): float(act) for i, act in zip(codes.features, codes.values, strict=True) if act > 0}
        own = active.pop(feature, 0.0)
        if not own or not active:
            return None
        control = min(active, key=lambda i: abs(active[i] - own))
        clean = _next_logps(model, ids, peak)
        without, other = (_next_logps(model, ids, peak, sae.feature(i)) for i in (feature, control))
    outcome = Ablation(example.token, own, _kl(clean, without), control, _kl(clean, other))
    return outcome, without.exp() - clean.exp()


def _next_logps(model: sl.Model, ids: Tensor, position: int, ablated: object = None) -> Tensor:
    if ablated is None:
        return model.logits(ids)[0, position].log_softmax(-1)
    with sl.steer(model, ablated, mode="ablate"):  # type: ignore[arg-type]
        return model.logits(ids)[0, position].log_softmax(-1)


def _kl(clean: Tensor, edited: Tensor) -> float:
    return float((clean.exp() * (clean - edited)).sum())


def _largest(ready: Live, change: Tensor) -> tuple[tuple[str, float], ...]:
    top = change.topk(min(N_TOKENS, len(change)))
    tokens = ready.model.str_tokens(top.indices.tolist())
    return tuple((token, value) for token, value in zip(tokens, top.values.tolist(), strict=True) if value > 1e-4)
