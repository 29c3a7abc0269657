"""What the autoencoders are given: random tokens made of few directions, or a workspace's activations.

Data for peers in another process are files of bfloat16 bits (.npy of int16): half the size of float32, no pickle, and
both sides read the same numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def planted(
    n_tokens: int, width: int, *, n_directions: int, active: int, seed: int, draw: int = 0, device: str = "cpu"
) -> Tensor:
    """Sums of ``active`` of ``n_directions`` unit vectors with random lengths plus a little noise, [n_tokens, width].

    Mean square 1 an entry, as saelab's normalised activations have. ``seed`` chooses the directions and how often each
    is used (as 1/rank, as features of a language are), ``draw`` the tokens. Another device draws other numbers.
    """
    fixed = torch.Generator(device=device).manual_seed(seed)
    directions = F.normalize(torch.randn(n_directions, width, generator=fixed, device=device), dim=1)
    generator = torch.Generator(device=device).manual_seed(1_000_003 * seed + draw + 1)
    odds = 1 / torch.arange(1, n_directions + 1, device=device)
    chosen = torch.multinomial(odds, n_tokens * active, replacement=True, generator=generator).view(n_tokens, active)
    lengths = 0.5 + torch.rand(n_tokens, active, generator=generator, device=device)
    tokens = F.embedding_bag(chosen, directions, mode="sum", per_sample_weights=lengths)
    tokens += 0.05 * torch.randn(n_tokens, width, generator=generator, device=device)
    return tokens / tokens.pow(2).mean().sqrt()


def save_bits(acts: Tensor, path: Path) -> None:
    """Write ``acts`` rounded to bfloat16."""
    np.save(path, acts.to(torch.bfloat16).contiguous().view(torch.int16).numpy())


def read_bits(path: Path | str) -> Tensor:
    """What ``save_bits`` wrote, as a memory-mapped bfloat16 tensor."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).view(torch.bfloat16)
