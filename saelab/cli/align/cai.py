"""saelab align cai and review: Constitutional AI, and a person's corrections."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.align.common import Data, Model, Out, Seed
from saelab.cli.console import AsJson, Device, emit, progress_bar, say
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.align.critics import Critic


def cai(
    prompts: Data = None,
    model: Model = None,
    rounds: Annotated[int, typer.Option(help="Rounds of critique and revision.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Use only so many prompts, the first ones.")] = None,
    principles: Annotated[Path | None, typer.Option(help="TOML file of principles; by default saelab's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, critique and revision.")] = 96,
    server: Annotated[
        str | None, typer.Option(help="Ask an OpenAI-compatible server, http://host/v1, instead of a local model.")
    ] = None,
    review: Annotated[int, typer.Option(help="Cases to put aside for a person.")] = 20,
    seed: Seed = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted run in this directory.")] = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Let a model criticise, revise and judge its own answers by written principles (Constitutional AI).

    Writes revisions, a set for SFT, pairs for DPO or a reward model, and a queue of doubtful cases for a person
    (saelab align review). The key of a server is read from the environment variable OPENAI_API_KEY.
    """
    from saelab import config as configs
    from saelab import dist, rundir
    from saelab.align.constitution import ConstitutionSettings, read_constitution
    from saelab.align.constitution_run import run_constitution

    dist.refuse_several("align cai")
    if resume is not None:
        if prompts or out:
            raise ConfigError(f"--resume takes its settings from {resume}/run.json; leave out the other settings")
        plain = dict(rundir.read_run(resume, "constitution")["config"])
        if (resume / "DONE").exists():
            raise ConfigError(f"{resume} is finished, there is nothing to resume")
        run = rundir.StageWriter.resume(resume, stage="constitution")
    else:
        if prompts is None or out is None:
            raise ConfigError("align cai needs prompts and a directory to write to; give a file of prompts and --out")
        settings = ConstitutionSettings(
            principles=None if principles is None else str(principles),
            rounds=rounds, max_new_tokens=max_new_tokens, seed=seed or 0,
        )  # fmt: skip
        plain = {"prompts": prompts, "limit": limit, "model": model or "demo", "server": server, "review": review}
        plain["settings"] = configs.to_mapping(settings)
        rundir.refuse_taken(out)
        run = None
    settings = configs.from_mapping(ConstitutionSettings, plain["settings"])
    words = _prompts(plain["prompts"], plain["limit"])
    written = read_constitution(settings.principles)
    if run is None:
        assert out is not None
        run = rundir.StageWriter.create(out, stage="constitution", config=plain)
    critic = _critic(plain, device=device)
    say(f"{len(words)} prompts, {settings.rounds} rounds, {len(written)} principles; {critic.name} criticises")
    with progress_bar("cai") as progress:
        summary = run_constitution(
            critic, words, written, run, settings=settings, n_review=plain["review"], progress=progress
        )
    if json:
        emit({"path": str(run.path), **summary._asdict()})
    say(
        f"{summary.n_changed} of {summary.n_prompts} answers were revised, {summary.n_revision_preferred} revisions "
        f"preferred; next: saelab align sft {run.path}/sft.jsonl, saelab align dpo {run.path}/pairs.jsonl, or decide "
        f"the {summary.n_review} cases in {run.path}/review.jsonl and run saelab align review {run.path}"
    )


def review(run: Annotated[Path, typer.Argument(help="Directory that saelab align cai wrote.")]) -> None:
    """Apply a person's decisions: fill in "first", "second" or "drop" in review.jsonl, then run this."""
    from saelab.align.constitution_run import apply_review

    say(f"{apply_review(run)} decisions are in {run}/pairs.jsonl")


def _prompts(source: str, limit: int | None) -> list[str]:
    from saelab.align.records import read_questions

    records = read_questions(source).required()[:limit]
    return [r.prompt if isinstance(r.prompt, str) else r.prompt[-1].content for r in records]


def _critic(plain: dict[str, Any], *, device: str | None) -> Critic:
    import os

    from saelab.align.critics import LocalCritic, ServerCritic
    from saelab.align.policy import PolicyConfig, load_policy

    if plain["server"]:
        return ServerCritic(plain["server"], plain["model"], api_key=os.environ.get("OPENAI_API_KEY"))
    return LocalCritic(load_policy(PolicyConfig(model=plain["model"], context=2048), device=device, trainable=False))
