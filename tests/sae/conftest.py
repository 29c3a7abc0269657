"""Every test draws the same random numbers each time it runs, alone or among others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE, SAEConfig, SAELoss


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Trained(NamedTuple):
    sae: SAE
    explained_variance: float
    l0: float
    losses: list[SAELoss]


@pytest.fixture
def trained_on_toys() -> Callable[..., Trained]:
    """Trains an SAE of width 48 for 200 steps on sums of 24 sparse directions in 16 dimensions, L0 2.4 of them."""

    def train(config: SAEConfig, *, steps: int = 200, lr: float = 1e-2) -> Trained:
        generator = torch.Generator().manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)

        def batch(n_tokens: int) -> torch.Tensor:
            on = torch.rand(n_tokens, 24, generator=generator) < 0.1
            strengths = 0.5 + torch.rand(n_tokens, 24, generator=generator)
            return (on * strengths) @ directions * (16 / (2.4 * 1.08)) ** 0.5  # mean |acts|^2 about 16

        sae = new_sae(config, d_in=16, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
        losses = []
        for step in range(steps):
            loss = sae.training_loss(batch(256), progress=step / (steps - 1))
            loss.total.backward()
            losses.append(loss._replace(total=loss.total.detach()))
            sae.project_decoder_grad_()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            sae.normalise_decoder_()
        acts = batch(2048)
        with torch.no_grad():
            unexplained = (sae(acts) - acts).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum()
            l0 = (sae.encode(acts) != 0).sum(1).double().mean()
        return Trained(sae, 1 - float(unexplained), float(l0), losses)

    return train
