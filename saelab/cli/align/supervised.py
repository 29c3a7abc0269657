"""saelab align sft and reward: training on records alone, with the same options."""

from __future__ import annotations

from collections.abc import Callable

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


def verb(method: str, help_text: str) -> Callable[..., None]:
    """The verb that carries out ``method``."""

    def run(
        data: Data = None,
        model: Model = None,
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
            data=data, held_out=held_out, model=model, steps=steps, batch_size=batch_size, lr=lr, rank=rank, seed=seed
        )
        carry_out(
            method, flags, rank=rank, config=config, overrides=set_, print_config=print_config, out=out, device=device,
            json=json,
        )  # fmt: skip

    run.__doc__ = help_text
    return run


sft = verb(
    "sft",
    """Imitate demonstrations: the loss is on the answers alone.

    Records hold prompt and completion, or messages of which the last is the assistant's.
    """,
)

reward = verb(
    "reward",
    """Train a reward model on preferences: one number at the last token of an answer.

    Records hold prompt, chosen and rejected. Measured by its agreement with held-out pairs, beside the longer answer.
    """,
)
