"""saelab align ppo and rloo: training on a reward, with the same options."""

from __future__ import annotations

from collections.abc import Callable
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


def verb(method: str, beta_setting: str, help_text: str) -> Callable[..., None]:
    """The verb that carries out ``method``, whose KL coefficient is the setting of this name."""

    def run(
        data: Data = None,
        model: Model = None,
        reward: Annotated[
            str | None, typer.Option(help="Directory of a reward model, or a rule: rule:warmth, rule:brevity, ...")
        ] = None,
        beta: Annotated[float | None, typer.Option(help="KL coefficient, in units of the score a nat.")] = None,
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
        flags = flags_of(
            data=data, held_out=held_out, model=model, steps=steps, batch_size=batch_size, lr=lr, rank=rank, seed=seed,
            reward=reward, **{beta_setting: beta},
        )  # fmt: skip
        carry_out(
            method, flags, rank=rank, config=config, overrides=set_, print_config=print_config, out=out, device=device,
            json=json,
        )  # fmt: skip

    run.__doc__ = help_text
    return run


ppo = verb(
    "ppo",
    "ppo__beta",
    """Optimise a reward by PPO: clipped steps on the policy's own answers, a value head, a KL penalty.

    Records hold a prompt. Measured by score and KL of answers to held-out prompts.
    """,
)

rloo = verb(
    "rloo",
    "group__beta",
    """Optimise a reward with a group of answers as its own baseline: RLOO, GRPO, Dr. GRPO.

    Records hold a prompt. Measured by score and KL of answers to held-out prompts.
    """,
)
