"""saelab align: the table of its verbs."""

from __future__ import annotations

from collections.abc import Callable

import typer

from saelab.cli.align import cai, dpo, organism, overopt, resume, rewarded, supervised

app = typer.Typer(
    help="Train a model on demonstrations, preferences and rewards: SFT, DPO and relatives, KTO, PPO, RLOO, GRPO, CAI.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
VERBS: dict[str, Callable[..., None]] = {
    "sft": supervised.sft,
    "reward": supervised.reward,
    "dpo": dpo.dpo,
    "kto": dpo.kto,
    "ppo": rewarded.ppo,
    "rloo": rewarded.rloo,
    "cai": cai.cai,
    "review": cai.review,
    "organism": organism.organism,
    "overopt": overopt.overopt,
    "resume": resume.resume,
}
for _name, _function in VERBS.items():
    app.command(_name)(_function)
