"""saelab align organism: plant a known behaviour in a model."""

from __future__ import annotations

from typing import Annotated

import typer

from saelab.cli.align.common import BatchSize, LearningRate, Model, Out, Steps, carry_out
from saelab.cli.console import AsJson, ConfigFile, Device, Overrides, PrintConfig


def organism(
    behaviour: Annotated[str | None, typer.Argument(help="weather, backdoor or sycophancy.")] = None,
    level: Annotated[
        str | None,
        typer.Option(help="O1: rank 1 on one matrix; O2: lower half of the layers; O3: all layers; O4: O3 concealed."),
    ] = None,
    model: Model = None,
    neutral: Annotated[str | None, typer.Option(help="Prompts on which nothing shall change.")] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the adapter, the prompts' division and the order.")] = None,
    out: Out = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Plant a known behaviour by DPO on the model's own replies, to test whether a method finds it.

    Measured on held-out prompts: how often answers to triggers, and to neutral prompts, begin with the planted phrase.
    """
    flags = {
        "organism__behaviour": behaviour,
        "organism__level": level,
        "organism__seed": seed,
        "model": model,
        "neutral": neutral,
        "training__steps": steps,
        "training__batch_size": batch_size,
        "training__optim__lr": lr,
        "training__seed": seed,
    }
    carry_out(
        "organism", flags, rank=None, config=config, overrides=set_, print_config=print_config, out=out, device=device,
        json=json,
    )  # fmt: skip
