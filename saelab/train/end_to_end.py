"""End-to-end training: what the model makes of the reconstruction counts too, not its squared error alone.

    L = L_architecture + coefficient * mean over tokens of KL(p_clean || p_spliced)      (Braun et al. 2024, 2405.12241)

p are the model's next-token distributions, as it is and with the SAE's reconstruction in place of the activations at
its hook. The model is frozen; gradients pass through the layers above the hook into the SAE. The divergence is taken on
whole rows of tokens, a few for each step, beside the shuffled tokens of the architecture's own loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from saelab.activations.permutation import mixed_key, permuted
from saelab.activations.store import ActivationStore, Split
from saelab.errors import ConfigError, TextError
from saelab.models.load import Model
from saelab.sae.base import SAE
from saelab.train.normaliser import Normaliser


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    coefficient: float = 1.0
    """Weight of the divergence (nats a token) against the reconstruction's unexplained share."""
    rows: int = 2
    """Rows of tokens that the model reads in a step, twice each."""

    def __post_init__(self) -> None:
        if not self.coefficient > 0:
            raise ConfigError(f"end_to_end.coefficient must be above 0, got {self.coefficient}; leave end_to_end out")
        if self.rows < 1:
            raise ConfigError(f"end_to_end.rows must be at least 1, got {self.rows}; raise it")


@runtime_checkable
class TokenRows(Protocol):
    """Whole rows of tokens, BOS first; those of a step are a function of the step alone."""

    def at(self, step: int) -> Int64[Tensor, "rows seq"]: ...


class StoredRows:
    """Rows of a store in an order made from the seed, each once in an epoch.

    Raises:
        TextError: the split is empty.
    """

    def __init__(self, store: ActivationStore, *, n_rows: int, seed: int, split: Split = "train") -> None:
        self.store, self.n_rows, self.seed = store, n_rows, seed
        self._rows = store.rows(split)
        if not len(self._rows):
            raise TextError(f"{store.path} has no {split} rows; capture more documents, or change held_out")

    def at(self, step: int) -> Int64[Tensor, "rows seq"]:
        """Rows [step, step + 1) * n_rows of the endless sequence."""
        numbers = range(step * self.n_rows, (step + 1) * self.n_rows)
        return self.store.tokens(np.array([self._row(number) for number in numbers]))

    def _row(self, number: int) -> int:
        epoch, index = divmod(number, len(self._rows))
        return int(self._rows[permuted(np.array([index]), len(self._rows), mixed_key(self.seed, epoch))[0]])


class OutputLoss:
    """The divergence that an SAE at ``hook_name`` of ``model`` causes. Holds no state that a step changes.

    Tokens whose norm exceeds ``norm_limit`` pass unchanged, as training leaves them out of its batches.

    Raises:
        ConfigError: the model has no such hook.
    """

    def __init__(
        self,
        config: EndToEndConfig,
        model: Model,
        hook_name: str,
        rows: TokenRows,
        *,
        norm_limit: float | None = None,
    ) -> None:
        self.coefficient = config.coefficient
        self.model, self.rows, self.norm_limit = model, rows, norm_limit
        self.hook_name = model.check_hook(hook_name)

    @classmethod
    def on_store(
        cls,
        config: EndToEndConfig,
        store: ActivationStore,
        model: Model,
        hook_name: str,
        *,
        seed: int,
        norm_limit: float | None = None,
    ) -> OutputLoss:
        """For training on ``store``, whose activations must be ``model``'s.

        Raises:
            ArtifactError: they are another model's.
            ConfigError: the store or the model has no such hook.
            TextError: the store has no training rows.
        """
        store.check_model(model.weights_sha256)
        rows = StoredRows(store, n_rows=config.rows, seed=seed)
        return cls(config, model, store.check_hook(hook_name), rows, norm_limit=norm_limit)

    def divergence(self, sae: SAE, normalise: Normaliser, *, step: int) -> Float[Tensor, ""]:
        """KL(clean || spliced) in nats, the mean over the step's tokens but BOS, which is never replaced.

        ``sae`` works on normalised activations, as it does in training; it is spliced in as at inference.
        """

        def spliced(acts: Float[Tensor, "rows seq d_in"], keep: Bool[Tensor, "rows seq"]) -> Tensor:
            tokens = acts.flatten(0, 1).to(sae.dtype)
            recon = normalise.inverse(sae(normalise(tokens)))
            if self.norm_limit is not None:
                usual = torch.linalg.vector_norm(tokens, dim=1, keepdim=True) <= self.norm_limit
                recon = torch.where(usual, recon, tokens)
            return recon.view_as(acts)

        ids = self.rows.at(step).to(self.model.device)
        clean = self.model.logits(ids)
        with self.model.edit(self.hook_name, spliced):
            edited = self.model.logits(ids, with_gradients=True)
        return token_kl(clean[:, 1:], edited[:, 1:]).mean()


def token_kl(
    logits: Float[Tensor, "*tokens d_vocab"], other_logits: Float[Tensor, "*tokens d_vocab"]
) -> Float[Tensor, "*tokens"]:
    """KL(p || q) in nats of the distributions that the logits describe, for each token."""
    logps, other_logps = F.log_softmax(logits, dim=-1), F.log_softmax(other_logits, dim=-1)
    return F.kl_div(other_logps, logps, reduction="none", log_target=True).sum(-1)
