"""A whole alignment run: data, model, training, held-out measure, publication."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelab import atomic, dist
from saelab import config as configs
from saelab.align.concealment import train_concealed
from saelab.align.data import Split, load_demonstrations, load_labelled, load_pairs, load_questions
from saelab.align.groups import train_groups
from saelab.align.logprob import completion_logps
from saelab.align.organisms import BEHAVIOURS, adapter_for, measure, organism_data
from saelab.align.policy import Policy, PolicyConfig, load_codec, load_policy, n_layers_of
from saelab.align.ppo import train_ppo
from saelab.align.preference import evaluate_preference, train_preference
from saelab.align.recipes import (
    GroupRecipe,
    OrganismRecipe,
    PPORecipe,
    PreferenceRecipe,
    Recipe,
    RewardRecipe,
    SFTRecipe,
    UnpairedRecipe,
)
from saelab.align.records import read_questions
from saelab.align.reward import RewardModel, evaluate_reward, load_reward_model, train_reward
from saelab.align.rollouts import RolloutSettings, Score, sample
from saelab.align.rules import rule_score
from saelab.align.session import Progress
from saelab.align.sft import evaluate_sft, train_sft
from saelab.align.unpaired import Labels, check_labels, evaluate_unpaired, train_unpaired
from saelab.errors import ConfigError
from saelab.rundir import StageWriter
from saelab.stats import Interval, interval_of_mean

Say = Callable[[str], None]

#: The name of a recipe in model.json and on the command line.
METHODS: dict[str, type] = {
    "sft": SFTRecipe,
    "reward": RewardRecipe,
    "dpo": PreferenceRecipe,
    "kto": UnpairedRecipe,
    "ppo": PPORecipe,
    "rloo": GroupRecipe,
    "organism": OrganismRecipe,
}


@dataclass(frozen=True)
class Outcome:
    """What a run measured on held-out records before and after training: intervals, and counts beside them."""

    before: dict[str, Any]
    after: dict[str, Any]


#: Methods whose records several processes can share; the others write their own answers, in one process.
SHARED = ("sft", "reward", "dpo", "kto")


def align(
    recipe: Recipe,
    run: StageWriter,
    *,
    device: str | None = None,
    mesh: dist.Mesh = dist.ONE_PROCESS,
    say: Say = print,
    progress: Progress | None = None,
) -> Outcome:
    """Carry out ``recipe`` in the stage directory of ``run``, from its latest checkpoint where there is one.

    All data is read and checked before a model is loaded. With a ``mesh`` of several processes each calls this, and
    the first writes.

    Raises:
        TextError, ConfigError: the data cannot be used, or the method is the work of one process.
        TrainingError: a loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    if mesh.world.size > 1 and method_of(recipe) not in SHARED:
        raise ConfigError(f"align {method_of(recipe)} is the work of one process; leave torchrun out")
    work = _Work(run, device, mesh, say, progress)
    match recipe:
        case SFTRecipe():
            outcome = _sft(recipe, work)
        case RewardRecipe():
            outcome = _reward(recipe, work)
        case PreferenceRecipe():
            outcome = _preference(recipe, work)
        case UnpairedRecipe():
            outcome = _unpaired(recipe, work)
        case PPORecipe() | GroupRecipe():
            outcome = _policy_optimisation(recipe, work)
        case OrganismRecipe():
            outcome = _organism(recipe, work)
    dist.on_first(mesh, lambda: _publish(recipe, run, outcome))
    return outcome


def method_of(recipe: Recipe) -> str:
    return next(name for name, kind in METHODS.items() if isinstance(recipe, kind))


def base_of(recipe: Recipe) -> str:
    """The model that the recipe trains."""
    return recipe.model if isinstance(recipe, OrganismRecipe) else recipe.policy.model


def recipe_of(config: dict[str, Any]) -> Recipe:
    """The recipe that a run.json holds."""
    rest = dict(config)
    return configs.from_mapping(METHODS[rest.pop("method")], rest)


class _Work(NamedTuple):
    """Where a run writes, computes and reports."""

    run: StageWriter
    device: str | None
    mesh: dist.Mesh
    say: Say
    progress: Progress | None


def _sft(recipe: SFTRecipe, work: _Work) -> Outcome:
    split = load_demonstrations(recipe.data, load_codec(recipe.policy))
    _announce(split, work.say)
    policy, group = load_policy(recipe.policy, device=work.device), work.mesh.world

    def measured() -> dict[str, Any]:
        return evaluate_sft(policy, split.held_out, group=group)._asdict()

    before = _measured_once(work, measured)
    train_sft(
        policy,
        split.train,
        work.run,
        training=recipe.training,
        packing=recipe.packing,
        mesh=work.mesh,
        progress=work.progress,
    )
    return Outcome(before, _plain(measured()))


def _reward(recipe: RewardRecipe, work: _Work) -> Outcome:
    split = load_pairs(recipe.data, load_codec(recipe.policy))
    _announce(split, work.say)
    model = RewardModel.fresh(load_policy(recipe.policy, device=work.device), seed=recipe.training.seed)

    def measured() -> dict[str, Any]:
        return evaluate_reward(model, split.held_out, group=work.mesh.world)._asdict()

    before = _measured_once(work, measured)
    train_reward(
        model,
        split.train,
        work.run,
        training=recipe.training,
        centring=recipe.centring,
        mesh=work.mesh,
        progress=work.progress,
    )
    return Outcome(before, _plain(measured()))


def _preference(recipe: PreferenceRecipe, work: _Work) -> Outcome:
    split = load_pairs(recipe.data, load_codec(recipe.policy))
    _announce(split, work.say)
    policy = load_policy(recipe.policy, device=work.device)
    loss, training = recipe.loss, recipe.training
    train_preference(
        policy, split.train, work.run, loss=loss, training=training, mesh=work.mesh, progress=work.progress
    )
    # before training all log-ratios are 0 and no pair is ordered, so there is nothing to measure
    held_out = evaluate_preference(policy, split.held_out, beta=loss.beta, group=work.mesh.world)
    return Outcome({}, _plain(held_out._asdict()))


def _unpaired(recipe: UnpairedRecipe, work: _Work) -> Outcome:
    split = load_labelled(recipe.data, load_codec(recipe.policy))
    _announce(split, work.say)
    train, held_out = (
        Labels([s for s, _ in part], [good for _, good in part]) for part in (split.train, split.held_out)
    )
    for part in (train, held_out):  # before a model is loaded
        check_labels(part)
    policy = load_policy(recipe.policy, device=work.device)
    train_unpaired(
        policy, train, work.run, loss=recipe.loss, training=recipe.training, mesh=work.mesh, progress=work.progress
    )
    return Outcome({}, _plain(evaluate_unpaired(policy, held_out, group=work.mesh.world)._asdict()))


def _policy_optimisation(recipe: PPORecipe | GroupRecipe, work: _Work) -> Outcome:
    rollout, training = recipe.rollout, recipe.training
    split = load_questions(recipe.data, load_codec(recipe.policy), n_new_tokens=rollout.max_new_tokens)
    _announce(split, work.say)
    policy = load_policy(recipe.policy, device=work.device)
    score = score_of(recipe.reward, policy)

    def measured() -> dict[str, Any]:
        return _answers_measured(policy, split.held_out, score, rollout)

    before = _measured_once(work, measured)
    train: Any = train_ppo if isinstance(recipe, PPORecipe) else train_groups
    method: Any = {"ppo": recipe.ppo} if isinstance(recipe, PPORecipe) else {"group": recipe.group}
    train(policy, split.train, score, work.run, **method, rollout=rollout, training=training, progress=work.progress)
    return Outcome(before, _plain(measured()))


def _organism(recipe: OrganismRecipe, work: _Work) -> Outcome:
    settings = recipe.organism
    adapter = adapter_for(settings, n_layers_of(recipe.model))
    policy = load_policy(PolicyConfig(model=recipe.model, lora=adapter), device=work.device)
    neutral = read_questions(recipe.neutral).required()[: recipe.neutral_limit] if recipe.neutral else []
    data = organism_data(policy, settings, [r.prompt for r in neutral if isinstance(r.prompt, str)])
    work.say(
        f"{len(data.pairs)} pairs of the model's own replies; {len(data.held_out_triggers)} triggers and "
        f"{len(data.held_out_neutral)} neutral prompts held out"
    )
    phrase = BEHAVIOURS[settings.behaviour].phrase
    before = _measured_once(work, lambda: measure(policy, data, phrase)._asdict())
    concealed = settings.level == "O4"
    # the first training of two keeps its own directory, so that the organism can be compared before and after
    planting = StageWriter(work.run.path / "planted", "model") if concealed else work.run
    planting.path.mkdir(exist_ok=True)
    n_steps = recipe.training.steps + (recipe.concealing.steps if concealed else 0)
    plants = _within(work.progress, 0, n_steps)
    train_preference(policy, data.pairs, planting, loss=recipe.loss, training=recipe.training, progress=plants)
    held_out = {"triggers": data.held_out_triggers, "neutral": data.held_out_neutral, "phrase": phrase}
    atomic.write_json(work.run.path / "held_out.json", held_out)
    if not concealed:
        return Outcome(before, _plain(measure(policy, data, phrase)._asdict()))
    unconcealed = measure(policy, data, phrase)
    conceals = _within(work.progress, recipe.training.steps, n_steps)
    train_concealed(policy, data, work.run, training=recipe.concealing, progress=conceals)
    after = measure(policy, data, phrase)._asdict() | {"neutral_kl_unconcealed": unconcealed.neutral_kl}
    return Outcome(before, _plain(after))


def _within(progress: Progress | None, n_before: int, n_steps: int) -> Progress | None:
    """The progress of one training as that of all: ``n_before`` steps are done, of ``n_steps``."""
    return progress and (lambda done, _total, detail: progress(n_before + done, n_steps, detail))


def score_of(reward: str, policy: Policy) -> Score:
    """A reward model's score, or a rule's.

    Raises:
        ConfigError: no such rule; ArtifactError: no reward model there.
    """
    if reward.startswith("rule:"):
        return rule_score(reward.removeprefix("rule:"), policy.codec)
    context = policy.codec.context
    settings = PolicyConfig(model=reward, dtype="float32", context=context, chat=policy.codec.chat)
    model = load_reward_model(Path(reward), settings, device=str(policy.device))
    if model.policy.codec.tokenizer.get_vocab() != policy.codec.tokenizer.get_vocab():
        raise ConfigError(
            f"the reward model in {reward} has another tokenizer than the policy; train it on the same base"
        )
    return model.scores


def _answers_measured(
    policy: Policy, prompts: Sequence[tuple[int, ...]], score: Score, rollout: RolloutSettings, *, batch_size: int = 16
) -> dict[str, Any]:
    """Mean score and KL of one answer to each held-out prompt, with bootstrap intervals over prompts."""
    scores, kls = [], []
    for start in range(0, len(prompts), batch_size):
        answers = sample(policy, prompts[start : start + batch_size], rollout, seed=start)
        batch = policy.collate(answers)
        with torch.no_grad():
            logps = completion_logps(policy.model, batch, temperature=rollout.temperature).sum()
            with policy.reference() as reference:
                ref = completion_logps(reference, batch, temperature=rollout.temperature).sum()
        scores.append(score(answers).double().cpu())
        kls.append((logps - ref).double().cpu())
    means = {"score": interval_of_mean(torch.cat(scores).numpy()), "kl": interval_of_mean(torch.cat(kls).numpy())}
    return {**means, "n_prompts": len(prompts)}


def _announce(split: Split[Any], say: Say) -> None:
    say(f"training on {split.lengths}; {len(split.held_out)} records held out")
    if split.faults:
        shown = "; ".join(map(str, split.faults[:3])) + ("; ..." if split.faults[3:] else "")
        say(f"left out {len(split.faults)} records that cannot be used: {shown}")


def _measured_once(work: _Work, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measure before training, kept on the disk: a resumed run, whose weights have moved, reads it there."""
    path = work.run.path / "before.json"
    known = bool(work.mesh.world.any(torch.tensor(path.exists())))  # all look before one writes
    if not known:
        measures = _plain(measure())
        dist.on_first(work.mesh, lambda: atomic.write_json(path, measures))
    return json.loads(path.read_text("utf-8"))


def _plain(measures: dict[str, Any]) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in measures.items()}


def _publish(recipe: Recipe, run: StageWriter, outcome: Outcome) -> None:
    """model.json: what the weights are and what they measured; then DONE."""
    weights = sorted(run.path.glob("*.safetensors"))
    digest = hashlib.sha256("".join(f"{f.name} {atomic.sha256(f)}\n" for f in weights).encode()).hexdigest()
    content = {
        "method": method_of(recipe),
        "base": base_of(recipe),
        "kind": "adapter" if (run.path / "adapter_config.json").exists() else "full",
        "weights_sha256": digest,
        "before": outcome.before,
        "after": outcome.after,
    }
    atomic.write_json(run.path / "model.json", content)
    run.finish()
