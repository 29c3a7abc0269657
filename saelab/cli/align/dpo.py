"""saelab align dpo and kto: learning from preferences, of pairs and of single answers."""

from __future__ import annotations

from typing import Annotated

import typer

from saelab.cli.align.common import (
    BatchSize,
    Data,
    HeldOut,
    LearningRate,
    Model,
    Out,
    Rank,
    Seed,
    Steps,
    carry_out,
    flags_of,
)
from saelab.cli.console import AsJson, ConfigFile, Device, Overrides, PrintConfig
from saelab.errors import ConfigError


def dpo(
    data: Data = None,
    model: Model = None,
    loss: Annotated[
        str | None, typer.Option(help="sigmoid (DPO), ipo, hinge, simpo, ...; several with weights: sigmoid,nll=0.1")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Strength of the pull to the reference.")] = None,
    held_out: HeldOut = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    rank: Rank = None,
    seed: Seed = None,
    out: Out = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Train on preferences directly: DPO, IPO, SimPO, CPO, other relatives and mixes of them.

    Records hold prompt, chosen and rejected. Measured by the order of held-out pairs.
    """
    flags = flags_of(
        data=data, held_out=held_out, model=model, steps=steps, batch_size=batch_size, lr=lr, rank=rank, seed=seed,
        loss__beta=beta, loss__terms=terms_of(loss) if loss else None,
    )  # fmt: skip
    carry_out(
        "dpo", flags, rank=rank, config=config, overrides=set_, print_config=print_config, out=out, device=device,
        json=json,
    )  # fmt: skip


def kto(
    data: Data = None,
    model: Model = None,
    loss: Annotated[str | None, typer.Option(help="kto, or apo_zero.")] = None,
    beta: Annotated[float | None, typer.Option(help="Strength of the pull to the reference.")] = None,
    held_out: HeldOut = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    rank: Rank = None,
    seed: Seed = None,
    out: Out = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Train on single answers that are called good or bad, without pairs: KTO.

    Records hold prompt, completion and a label that is true or false. Measured by held-out good and bad answers.
    """
    flags = flags_of(
        data=data, held_out=held_out, model=model, steps=steps, batch_size=batch_size, lr=lr, rank=rank, seed=seed,
        loss__beta=beta, loss__kind=loss,
    )  # fmt: skip
    carry_out(
        "kto", flags, rank=rank, config=config, overrides=set_, print_config=print_config, out=out, device=device,
        json=json,
    )  # fmt: skip


def terms_of(text: str) -> dict[str, float]:
    """``sigmoid,nll=0.1`` as {"sigmoid": 1.0, "nll": 0.1}."""
    terms = {}
    for part in text.split(","):
        name, equals, weight = part.strip().partition("=")
        try:
            terms[name] = float(weight) if equals else 1.0
        except ValueError:
            raise ConfigError(f"--loss has {part!r}, but a weight is a number; write for example nll=0.1") from None
    return terms
