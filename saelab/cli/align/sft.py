"""saelab align sft: imitate demonstrations."""

from __future__ import annotations

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


def sft(
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
    """Imitate demonstrations: the loss is on the answers alone.

    Records hold prompt and completion, or messages of which the last is the assistant's.
    """
    flags = flags_of(
        data=data, held_out=held_out, model=model, steps=steps, batch_size=batch_size, lr=lr, rank=rank, seed=seed
    )
    carry_out(
        "sft",
        flags,
        rank=rank,
        config=config,
        overrides=set_,
        print_config=print_config,
        out=out,
        device=device,
        json=json,
    )
