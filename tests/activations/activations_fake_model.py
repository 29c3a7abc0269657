"""A stand-in for a language model: its activations are a formula of token and place, so tests know every value."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saelab.errors import ConfigError, nearest
from saelab.models.load import Model

#: Widths of the hooks it has.
HOOKS = {"blocks.0.hook_resid_post": 8, "blocks.1.hook_resid_post": 8, "blocks.1.attn.hook_z": 4}


class FakeTokenizer:
    """Spells byte b as "<b>"; ``other`` gives some of them another spelling."""

    def __init__(self, n: int = 257, other: Mapping[int, str] | None = None) -> None:
        self._n = n
        self._other = other or {}

    def __len__(self) -> int:
        return self._n

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._other.get(i, f"<{i}>") for i in ids]


class FakeModel(Model):
    """One token a byte, BOS 256."""

    bos_id = 256
    context = 512  # type: ignore[assignment]

    def __init__(self, *, widths: dict[str, int] = HOOKS, seed: int = 0, seconds_per_forward: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.widths = widths
        self.tables = {hook: torch.randn(257, width, generator=generator) for hook, width in widths.items()}
        self.weights_sha256 = f"{seed:064d}"  # type: ignore[misc]
        self.seconds_per_forward = seconds_per_forward
        self.n_forwards = 0
        self.tokenizer = FakeTokenizer()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def check_hook(self, name: str) -> str:
        if name not in self.widths:
            raise ConfigError(f"no hook {name}; {nearest(name, self.widths)}")
        return name

    def hook_width(self, name: str) -> int:
        return self.widths[self.check_hook(name)]

    def capture(self, ids: Tensor, hook_names: Sequence[str], mask: Tensor | None = None) -> dict[str, Tensor]:
        time.sleep(self.seconds_per_forward)
        self.n_forwards += 1
        place = torch.arange(ids.shape[1])[:, None] / 100
        return {hook: self.tables[hook][ids] + place for hook in hook_names}
