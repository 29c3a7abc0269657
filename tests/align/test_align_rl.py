"""PPO, RLOO and GRPO on a tiny model: sampled answers, their bookkeeping, and learning from a rule."""

import json

import pytest
import torch

from saelab import rundir
from saelab.align.encoding import Encoded, collate
from saelab.align.groups import GroupSettings, baselined, train_groups
from saelab.align.logprob import completion_logps
from saelab.align.policy import LoraSettings, PolicyConfig, load_policy
from saelab.align.ppo import KLController, PPOSettings, gather, new_value_head, train_ppo
from saelab.align.rollouts import RolloutSettings, sample, score_with_penalty
from saelab.align.session import AdamWSettings, Session, StepSettings
from saelab.errors import ConfigError
from saelab.models.tiny import write_tiny_model

LORA = LoraSettings(rank=4, targets=("q_proj", "v_proj", "down_proj"))
PROMPTS = ["the tower", "one river", "the world of", "light and music", "a city by", "the king"]
SHORT = RolloutSettings(max_new_tokens=6, missing_eos_penalty=None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", n_layers=2)


def policy_of(tiny, **options):
    return load_policy(PolicyConfig(model=str(tiny), dtype="float32", context=64, **({"lora": LORA} | options)))


def prompts_of(policy):
    return [policy.codec.prompt_ids(prompt) for prompt in PROMPTS]


def steps(n, **options):
    optim = AdamWSettings(lr=options.pop("lr", 5e-3), warmup_share=0.0)
    return StepSettings(**({"steps": n, "batch_size": 4, "checkpoint_every": 3, "optim": optim} | options))


def run_in(path):
    return rundir.StageWriter.create(path, stage="model", config={})


def low_tokens(answers):
    """A rule: the share of the answer's tokens in the lower half of the vocabulary."""
    return torch.tensor([sum(t < 150 for t in a.completion_ids) / len(a.completion_ids) for a in answers])


def test_an_answer_is_the_same_alone_and_in_company(tiny):
    policy = policy_of(tiny)
    prompts = prompts_of(policy)
    together = sample(policy, prompts, SHORT, seed=5)
    assert sample(policy, prompts, SHORT, seed=5) == together
    assert sample(policy, prompts, SHORT, seed=6) != together
    [alone] = sample(policy, prompts[:1], SHORT, seed=5)
    assert alone == together[0]


def test_answers_end_at_eos_or_say_that_they_did_not(tiny):
    policy = policy_of(tiny)
    hot = RolloutSettings(max_new_tokens=6, temperature=5.0)  # nearly uniform, so that EOS comes
    answers = sample(policy, prompts_of(policy) * 40, hot, seed=0)
    eos = policy.codec.eos_id
    for answer in answers:
        assert eos not in answer.completion_ids[:-1]
        assert answer.truncated == (answer.completion_ids[-1] != eos)
        assert len(answer.completion_ids) == 6 or not answer.truncated
    assert any(not answer.truncated for answer in answers)


def test_the_penalty_looks_at_the_answer_and_not_at_its_prompt(tiny):
    eos = policy_of(tiny).codec.eos_id
    answers = [Encoded((5, eos), (7, 8), truncated=True), Encoded((5,), (7, eos), truncated=False)]
    scores = score_with_penalty(lambda a: torch.ones(len(a)), answers, RolloutSettings(missing_eos_penalty=3.0))
    assert scores.tolist() == [-2.0, 1.0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_first_ratio_is_one_and_the_first_kl_is_zero(tiny, temperature):
    policy = policy_of(tiny)
    rollout = RolloutSettings(max_new_tokens=6, temperature=temperature)
    answers = sample(policy, prompts_of(policy), rollout, seed=0)
    experience, metrics = gather(
        policy, new_value_head(policy), answers, torch.zeros(6), ppo=PPOSettings(), beta=0.1, rollout=rollout
    )
    assert metrics["objective__kl"] == pytest.approx(0, abs=1e-5)
    again = completion_logps(policy.model, experience.batch, temperature=temperature).logps.detach()
    torch.testing.assert_close((again - experience.logps).exp(), torch.ones_like(again), rtol=0, atol=1e-5)
    assert (experience.values == 0).all()


def test_samples_are_drawn_from_the_probabilities_that_training_sees(tiny):
    """The frequency of first tokens against the log-probabilities of a batch of all of them."""
    policy = policy_of(tiny)
    prompt = policy.codec.prompt_ids("the tower")
    rollout = RolloutSettings(max_new_tokens=1, temperature=1.5)
    answers = sample(policy, [prompt] * 3000, rollout, seed=0)
    counts = torch.bincount(torch.tensor([a.completion_ids[0] for a in answers]), minlength=len(policy.codec.tokenizer))
    n_vocab = len(policy.codec.tokenizer)
    batch = collate([Encoded(prompt, (t,), True) for t in range(n_vocab)], pad_id=0)
    with torch.no_grad():
        probs = completion_logps(policy.model, batch, temperature=1.5).sum().exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)
    likely = probs > 0.01
    deviation = (probs * (1 - probs) / 3000).sqrt()
    assert ((counts / 3000 - probs).abs()[likely] < 5 * deviation[likely]).all()


def test_the_score_counts_at_the_last_token_of_short_full_and_cut_answers(tiny):
    policy = policy_of(tiny)
    eos = policy.codec.eos_id
    answers = [
        Encoded((5, 6), (7, eos), truncated=False),
        Encoded((5,), (7, 8, 9, eos), truncated=False),
        Encoded((5, 6, 7), (7, 8, 9, 10), truncated=True),
    ]
    scores = torch.tensor([1.0, 2.0, 3.0])
    ppo = PPOSettings(beta=0.0, lam=1.0)
    experience, _ = gather(policy, new_value_head(policy), answers, scores, ppo=ppo, beta=0.0, rollout=SHORT)
    # without KL and values, what is left to come is the score at every token up to the last
    expected = scores[:, None].expand_as(experience.returns) * experience.mask
    torch.testing.assert_close(experience.returns, expected)
    assert experience.mask.sum(1).tolist() == [2, 4, 4]


def ppo_run(tiny, run, training, **options):
    policy = policy_of(tiny, **options)
    ppo = PPOSettings(beta=0.01, epochs=2, minibatches=2, target_kl=2.0, horizon=100)
    train_ppo(policy, prompts_of(policy), low_tokens, run, ppo=ppo, rollout=SHORT, training=training)
    return policy.trainable()


def group_run(tiny, run, training, **options):
    policy = policy_of(tiny, **options)
    group = GroupSettings(beta=0.01, epochs=2)
    train_groups(policy, prompts_of(policy), low_tokens, run, group=group, rollout=SHORT, training=training)
    return policy.trainable()


@pytest.mark.parametrize(("trainer", "dies_at"), [(ppo_run, 18), (group_run, 9)])
@pytest.mark.parametrize("lora", [LORA, None])
def test_a_run_that_died_ends_with_the_same_bits(trainer, dies_at, lora, tiny, tmp_path, monkeypatch):
    whole = trainer(tiny, run_in(tmp_path / "whole"), steps(6), lora=lora)
    update, calls = Session.update, []

    def dying(self):
        calls.append(1)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(Session, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny, run_in(tmp_path / "died"), steps(6), lora=lora)
    monkeypatch.setattr(Session, "update", update)
    resumed = trainer(tiny, rundir.StageWriter.resume(tmp_path / "died", stage="model"), steps(6), lora=lora)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name
    assert rundir.read_metrics(tmp_path / "whole") == rundir.read_metrics(tmp_path / "died")
    samples = [sorted((tmp_path / name / "samples").iterdir()) for name in ("whole", "died")]
    assert [s.name for s in samples[0]] == [f"step_{i:06d}.json" for i in range(1, 7)]
    assert [s.read_bytes() for s in samples[0]] == [s.read_bytes() for s in samples[1]]
    assert set(json.loads(samples[0][0].read_text())[0]) == {"prompt", "answer", "score"}


def test_ppo_learns_a_rule_and_leaves_the_reference_alone(tiny, tmp_path):
    policy = policy_of(tiny)
    batch = collate([policy.codec.encode(prompt, " of the people") for prompt in PROMPTS], pad_id=0)
    with policy.reference() as reference:
        before = completion_logps(reference, batch).sum()
    ppo = PPOSettings(beta=0.01)
    training = steps(25, lr=2e-2, batch_size=16)
    train_ppo(policy, prompts_of(policy), low_tokens, run_in(tmp_path / "r"), ppo=ppo, rollout=SHORT, training=training)
    log = rundir.read_metrics(tmp_path / "r")
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert log[-1]["objective/kl"] > 0.1
    early, late = (sum(line["objective/scores"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert late > early + 0.2
    with policy.reference() as reference:
        torch.testing.assert_close(completion_logps(reference, batch).sum(), before, rtol=0, atol=0)


@pytest.mark.parametrize("baseline", ["rloo", "grpo", "dr_grpo"])
def test_a_group_learns_the_same_rule(baseline, tiny, tmp_path):
    policy = policy_of(tiny)
    group = GroupSettings(baseline=baseline, beta=0.01, group_size=8, epochs=2)
    training = steps(30, lr=4e-2, batch_size=3)
    train_groups(
        policy, prompts_of(policy), low_tokens, run_in(tmp_path / "r"), group=group, rollout=SHORT, training=training
    )
    log = rundir.read_metrics(tmp_path / "r")
    early, late = (sum(line["objective/scores"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert late > early + 0.2


def test_baselines_stay_within_their_group():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    advantages = baselined(rewards, GroupSettings(group_size=2, baseline="rloo"))
    assert advantages.tolist() == [-2.0, 2.0, 0.0, 0.0]


def test_the_controller_moves_beta_towards_its_target():
    controller = KLController(PPOSettings(beta=0.1, target_kl=5.0, horizon=100))
    controller.update(50.0, n_answers=10)
    assert controller.beta == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    controller.update(4.5, n_answers=10)
    assert controller.beta == pytest.approx(0.102 * (1 - 0.1 * 10 / 100))
    again = KLController(PPOSettings(target_kl=5.0))
    again.restore(controller.tensors())
    assert again.beta == controller.beta
    constant = KLController(PPOSettings(beta=0.1))
    constant.update(50.0, n_answers=10)
    assert constant.beta == 0.1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: GroupSettings(group_size=1), "an answer alone has no baseline"),
        (lambda: PPOSettings(lam=0.0), "above 0 and at most 1"),
        (lambda: PPOSettings(epochs=0), "at least 1"),
        (lambda: RolloutSettings(temperature=0.0), "above 0 to sample"),
        (lambda: RolloutSettings(max_new_tokens=0), "at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()
