"""Tokens of a batch spread over members of a group: the mean of their gradients is that of the whole batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from saelab.sae.architectures import new_sae
from saelab.sae.crosscoder import CrosscoderConfig
from saelab.sae.matryoshka import MatryoshkaConfig
from saelab.sae.transcoder import TranscoderConfig

D_IN, D_SAE, N = 12, 100, 40
DEAD = torch.arange(D_SAE) % 4 == 0


class Threads:
    """Members of a group in one process, each in a thread of its own."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier_, self.board = size, threading.Barrier(size, timeout=20), [None] * size

    def member(self, rank: int) -> Member:
        return Member(self, rank)


class Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = threads, rank, threads.size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.threads.board[self.rank] = tensor
        self.threads.barrier_.wait()
        tensors = list(self.threads.board)
        self.threads.barrier_.wait()
        return tensors

    def gather_to_first(self, tensor: Tensor) -> list[Tensor]:
        return self.gather(tensor) if self.rank == 0 else []

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor)).sum(0)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.size

    def smallest(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor)).amin(0)

    def any(self, mask: Tensor) -> Tensor:
        return torch.stack(self.gather(mask)).any(0)

    def barrier(self) -> None:
        self.threads.barrier_.wait()


@pytest.mark.parametrize(
    "config",
    [
        MatryoshkaConfig(d_sae=D_SAE, k=6, random_prefixes=3),
        TranscoderConfig(d_sae=D_SAE, k=6, activation="batchtopk", skip=True),
        TranscoderConfig(d_sae=D_SAE, k=6, activation="topk"),
        TranscoderConfig(d_sae=D_SAE, activation="relu"),
        CrosscoderConfig(d_sae=D_SAE, k=6, n_exclusive=10),
        CrosscoderConfig(d_sae=D_SAE, sparsity="l1"),
    ],
    ids=lambda config: f"{config.arch}_{getattr(config, 'activation', getattr(config, 'sparsity', ''))}",
)
def test_two_members_together_have_the_gradient_of_the_whole_batch(config, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")

    def fresh():
        return new_sae(config, d_in=D_IN, generator=torch.Generator().manual_seed(0)).double()

    whole = fresh()
    slots = () if whole.n_slots is None else (whole.n_slots,)
    acts = torch.randn(N, *slots, D_IN, dtype=torch.float64)
    acts[: N // 2] *= 3  # so that the halves would choose otherwise by themselves
    losses = whole.training_loss(acts, dead=DEAD, progress=0.5)
    losses.total.backward()

    threads = Threads(2)

    def half(rank: int):
        sae = fresh()
        sae.tokens = threads.member(rank)
        parts = sae.training_loss(acts.chunk(2)[rank], dead=DEAD, progress=0.5)
        parts.total.backward()
        return sae, parts

    with ThreadPoolExecutor(2) as pool:
        (first, of_first), (second, of_second) = pool.map(half, range(2))
    torch.testing.assert_close((of_first.total + of_second.total) / 2, losses.total)
    for name, parameter in whole.named_parameters():
        mean = (first.get_parameter(name).grad + second.get_parameter(name).grad) / 2
        torch.testing.assert_close(mean, parameter.grad, msg=lambda text, n=name: f"{n}: {text}")
    for one in (first, second):
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(one.get_buffer(name), buffer)
