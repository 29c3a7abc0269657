"""SFT, reward model and preferences on a tiny model: they learn, resume to the bit, and parts equal the whole."""

import json
import math
from pathlib import Path

import pytest
import torch

from saelab import rundir
from saelab.align.data import DataConfig
from saelab.align.encoding import Encoded, EncodedPair
from saelab.align.policy import LoraSettings, PolicyConfig, load_policy
from saelab.align.preference import (
    LossSettings,
    evaluate_preference,
    pair_logps,
    preference_loss,
    reference_logps,
    train_preference,
)
from saelab.align.recipes import UnpairedRecipe
from saelab.align.reward import RewardModel, evaluate_reward, load_reward_model, train_reward
from saelab.align.run import align
from saelab.align.session import AdamWSettings, Order, Session, StepSettings
from saelab.align.sft import answer_nll, evaluate_sft, train_sft
from saelab.align.unpaired import Labels, UnpairedSettings, evaluate_unpaired, mismatched, train_unpaired
from saelab.checkpoint import Checkpoints
from saelab.errors import ConfigError, TextError, TrainingError
from saelab.models.tiny import write_tiny_model

LORA = LoraSettings(rank=4, targets=("q_proj", "v_proj", "down_proj"))
PROMPTS = [
    "the tower",
    "one river",
    "the world of",
    "light and music",
    "a city by",
    "the king",
    "old house",
    "north sea",
]
GOOD, BAD = (
    [" of the people", " with the light", " and other time"],
    [" was not", " but from her", " which had been one"],
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", n_layers=2)


def policy_config(tiny, **options):
    return PolicyConfig(model=str(tiny), dtype="float32", context=64, **({"lora": LORA} | options))


def pairs_for(policy, prompts=PROMPTS):
    encode = policy.codec.encode
    return [EncodedPair(encode(prompt, GOOD[i % 3]), encode(prompt, BAD[i % 2])) for i, prompt in enumerate(prompts)]


def settings(**options):
    optim = AdamWSettings(lr=options.pop("lr", 5e-3))
    return StepSettings(**({"steps": 12, "batch_size": 4, "checkpoint_every": 5, "seed": 3, "optim": optim} | options))


def run_in(path):
    return rundir.StageWriter.create(path, stage="model", config={})


def sft(tiny, run, training, **options):
    policy = load_policy(policy_config(tiny, **options))
    demonstrations = [pair.chosen for pair in pairs_for(policy)]
    train_sft(policy, demonstrations, run, training=training)
    return policy.trainable()


def dpo(tiny, run, training, *, loss=None, **options):
    policy = load_policy(policy_config(tiny, **options))
    train_preference(policy, pairs_for(policy), run, loss=loss or LossSettings(), training=training)
    return policy.trainable()


def reward(tiny, run, training, **options):
    model = RewardModel.fresh(load_policy(policy_config(tiny, **options)))
    train_reward(model, pairs_for(model.policy), run, training=training)
    return model.trainable()


def kto(tiny, run, training, **options):
    policy = load_policy(policy_config(tiny, **options))
    train_unpaired(policy, labels_for(policy), run, loss=UnpairedSettings(beta=0.5), training=training)
    return policy.trainable()


def labels_for(policy):
    """Good and bad answers in turn."""
    answers = [pair.chosen if i % 2 else pair.rejected for i, pair in enumerate(pairs_for(policy))]
    return Labels(answers, [bool(i % 2) for i in range(len(answers))])


TRAINERS = [sft, dpo, reward, kto]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("lora", [LORA, None])
def test_a_run_that_died_ends_with_the_same_bits(trainer, lora, tiny, tmp_path, monkeypatch):
    whole = trainer(tiny, run_in(tmp_path / "whole"), settings(), lora=lora)
    update, calls = Session.update, []

    def dying(self):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(Session, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny, run_in(tmp_path / "died"), settings(), lora=lora)
    monkeypatch.setattr(Session, "update", update)
    resumed = trainer(tiny, rundir.StageWriter.resume(tmp_path / "died", stage="model"), settings(), lora=lora)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name
    logs = [rundir.read_metrics(tmp_path / name) for name in ("whole", "died")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(1, 13))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_batch_in_parts_is_one_step_of_the_whole(trainer, tiny, tmp_path):
    """Answers differ in length, so a mean of means would show."""
    whole = trainer(tiny, run_in(tmp_path / "whole"), settings(steps=2))
    for size in (1, 2, 3):
        parts = trainer(tiny, run_in(tmp_path / f"parts{size}"), settings(steps=2, micro_batch=size))
        for name, parameter in whole.items():
            torch.testing.assert_close(parts[name], parameter, rtol=1e-3, atol=1e-5)
    logs = [rundir.read_metrics(tmp_path / name)[0]["loss"] for name in ("whole", "parts1", "parts3")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert logs[0] == pytest.approx(logs[2], rel=1e-5)


@pytest.mark.parametrize("option", [{"length_alpha": 0.3}, {"on_policy": True}])
def test_weights_within_and_of_pairs_change_what_is_learned_and_hold_in_parts_too(option, tiny, tmp_path):
    plain = dpo(tiny, run_in(tmp_path / "plain"), settings(steps=2))
    whole = dpo(tiny, run_in(tmp_path / "whole"), settings(steps=2), loss=LossSettings(**option))
    parts = dpo(tiny, run_in(tmp_path / "parts"), settings(steps=2, micro_batch=1), loss=LossSettings(**option))
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(parameter, plain[name], atol=1e-4) for name, parameter in whole.items())


def test_packed_demonstrations_teach_what_separate_ones_do(tiny, tmp_path):
    curves = {}
    for packing in (False, True):
        policy = load_policy(policy_config(tiny))
        demonstrations = [pair.chosen for pair in pairs_for(policy)]
        run = run_in(tmp_path / str(packing))
        train_sft(policy, demonstrations, run, training=settings(steps=8, batch_size=6, micro_batch=3), packing=packing)
        curves[packing] = [line["loss"] for line in rundir.read_metrics(run.path)]
    assert curves[True] == pytest.approx(curves[False], abs=1e-5)


def test_mixes_with_a_likelihood_weigh_tokens_alike_in_parts_too(tiny, tmp_path):
    loss = LossSettings(terms={"sigmoid": 1.0, "nll": 0.5})
    whole = dpo(tiny, run_in(tmp_path / "whole"), settings(steps=2), loss=loss)
    parts = dpo(tiny, run_in(tmp_path / "parts"), settings(steps=2, micro_batch=1), loss=loss)
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-3, atol=1e-5)


def test_sft_makes_demonstrations_probable(tiny, tmp_path):
    policy = load_policy(policy_config(tiny))
    demonstrations = [pair.chosen for pair in pairs_for(policy)]
    before = evaluate_sft(policy, demonstrations)
    train_sft(policy, demonstrations, run_in(tmp_path / "run"), training=settings(steps=30, lr=2e-2))
    after = evaluate_sft(policy, demonstrations)
    assert after.nll.high < before.nll.low
    assert after.n_tokens == sum(len(d.completion_ids) for d in demonstrations)
    log = rundir.read_metrics(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"]
    # what the log calls loss is the mean over the batch's tokens
    order = Order(len(demonstrations), batch_size=4, micro_batch=None, seed=3)
    first = [demonstrations[i] for i in order.batch(0)]
    fresh = load_policy(policy_config(tiny))
    with torch.no_grad():
        expected = answer_nll(fresh, first).sum() / sum(len(d.completion_ids) for d in first)
    assert log[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_dpo_starts_at_the_loss_of_a_coin_and_learns_to_prefer(tiny, tmp_path):
    policy = load_policy(policy_config(tiny))
    pairs = pairs_for(policy)
    train_preference(policy, pairs, run_in(tmp_path / "run"), loss=LossSettings(), training=settings(steps=30, lr=2e-2))
    log = rundir.read_metrics(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["rewards/accuracies"] == 1.0
    held_out = evaluate_preference(policy, pairs, beta=0.1)
    assert held_out.accuracy.value == 1.0
    assert held_out.margin.low > 0
    assert held_out.n_pairs == len(pairs)


def test_the_reference_of_a_resumed_run_is_the_start_and_not_the_checkpoint(tiny, tmp_path):
    dpo(tiny, run_in(tmp_path / "run"), settings(steps=10))
    policy = load_policy(policy_config(tiny))
    pairs = pairs_for(policy)
    before = reference_logps(policy, pairs, batch_size=4)
    Session(rundir.StageWriter.resume(tmp_path / "run", stage="model"), settings(), policy.trainable())
    after = reference_logps(policy, pairs, batch_size=4)
    assert torch.equal(before.chosen, after.chosen)
    records = torch.arange(len(pairs))
    logps = pair_logps(policy.model, pairs, after, records, policy)
    assert logps.chosen_ratio.abs().max() > 1e-3  # the checkpoint's weights are in place


def test_displacement_is_logged_and_warned_of(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("saelab.align.preference._DISPLACED_STEPS", 3)
    policy = load_policy(policy_config(tiny))
    pushing_down = LossSettings(terms={"sigmoid": 1.0, "nll": -1.0})
    training = settings(steps=12, lr=2e-2)
    train_preference(policy, pairs_for(policy), run_in(tmp_path / "run"), loss=pushing_down, training=training)
    log = rundir.read_metrics(tmp_path / "run")
    assert {"logps/chosen_shift", "logps/chosen_fallen"} <= set(log[0])
    assert log[-1]["logps/chosen_fallen"] == 1.0
    assert log[-1]["logps/chosen_shift"] < 0
    assert "the probability goes elsewhere" in caplog.text


@pytest.mark.parametrize("kind", ["kto", "apo_zero"])
def test_unpaired_labels_lift_the_good_above_the_bad(kind, tiny, tmp_path):
    policy = load_policy(policy_config(tiny))
    data, loss = labels_for(policy), UnpairedSettings(kind=kind, beta=0.2)
    train_unpaired(policy, data, run_in(tmp_path / "run"), loss=loss, training=settings(steps=40, lr=2e-2))
    quality = evaluate_unpaired(policy, data)
    assert quality.separation == 1.0
    assert quality.good_shift.low > quality.bad_shift.high
    assert (quality.n_good, quality.n_bad) == (4, 4)
    log = rundir.read_metrics(tmp_path / "run")
    # at the start policy and reference are one: KL 0, and every answer at the middle of the sigmoid
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert log[0]["kl"] == 0.0
    assert log[-1]["rewards/chosen"] > log[-1]["rewards/rejected"]


def test_labelled_records_of_a_file_train_and_are_measured(tiny, tmp_path):
    rows = [{"prompt": f"{p} {w}", "completion": GOOD[0] if g else BAD[0], "label": g} for p in PROMPTS[:6]
            for w in ("of", "and", "by") for g in (True, False)]  # fmt: skip
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(tmp_path / "labelled.jsonl"), held_out_share=0.4)
    recipe = UnpairedRecipe(data=data, policy=policy_config(tiny), training=settings(steps=6, lr=2e-2))
    outcome = align(recipe, run_in(tmp_path / "run"), say=lambda text: None)
    assert outcome.after["separation"] > 0.9
    assert outcome.after["n_good"] == outcome.after["n_bad"]
    model = json.loads((tmp_path / "run" / "model.json").read_text())
    assert (model["method"], model["kind"]) == ("kto", "adapter")
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_ktos_mismatched_answers_are_those_of_trl(arch):
    batch = json.loads((Path(__file__).parent / "trl_1.16.0.json").read_text())[arch]["kto"]["batch"]

    def encoded(prefix):
        rows = zip(
            *(batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
        )
        found = []
        for ids, attended, answer in rows:
            n_total, n_answer = sum(attended), sum(answer)
            found.append(Encoded(tuple(ids[: n_total - n_answer]), tuple(ids[n_total - n_answer : n_total]), False))
        return found

    assert mismatched(encoded(""), context=64) == encoded("KL_")
    cut = mismatched(encoded(""), context=5)[1]
    assert cut.truncated
    assert cut.n_tokens == 5


def test_labels_of_one_kind_and_batches_of_one_are_refused(tiny, tmp_path, caplog):
    policy = load_policy(policy_config(tiny))
    answers, _ = labels_for(policy)
    run, loss = run_in(tmp_path / "run"), UnpairedSettings()
    with pytest.raises(TextError, match="8 answers are labelled good and 0 bad"):
        train_unpaired(policy, Labels(answers, [True] * 8), run, loss=loss, training=settings())
    with pytest.raises(ConfigError, match="KTO needs at least 2 answers a batch"):
        train_unpaired(policy, labels_for(policy), run, loss=loss, training=settings(batch_size=1))
    few = Labels(answers, [True] * 7 + [False])
    train_unpaired(policy, few, run, loss=loss, training=settings(steps=1))
    assert "7 good answers against 1 bad ones" in caplog.text
    assert "loss.undesirable_weight to 7.00" in caplog.text


def test_a_reward_model_learns_its_pairs_and_is_loaded_as_it_was(tiny, tmp_path):
    config = policy_config(tiny)
    model = RewardModel.fresh(load_policy(config))
    pairs = pairs_for(model.policy)
    train_reward(model, pairs, run_in(tmp_path / "run"), training=settings(steps=30, lr=2e-2))
    quality = evaluate_reward(model, pairs)
    assert quality.accuracy.value == 1.0
    assert 0 <= quality.calibration_error <= 0.5
    assert quality.length_accuracy == sum(
        len(p.chosen.completion_ids) > len(p.rejected.completion_ids) for p in pairs
    ) / len(pairs)
    scores = model.scores([pair.chosen for pair in pairs])
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    again = load_reward_model(tmp_path / "run", policy_config(tmp_path / "run"))
    torch.testing.assert_close(again.scores([pair.chosen for pair in pairs]), scores, rtol=1e-3, atol=1e-3)
    assert not list(again.trainable()) or not any(p.requires_grad for p in again.trainable().values())


def test_a_reward_is_read_at_the_last_token_whatever_the_padding(tiny):
    model = RewardModel.fresh(load_policy(policy_config(tiny)))
    sequences = [pair.chosen for pair in pairs_for(model.policy)] + [pair.rejected for pair in pairs_for(model.policy)]
    with torch.no_grad():
        alone = torch.cat([model.raw_scores([sequence]) for sequence in sequences])
        torch.testing.assert_close(model.raw_scores(sequences), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "cpo", "nll", "dpop", "ipo", "exo", "cdpo", "robust", "hinge"])
def test_every_loss_can_be_chosen_by_name(name, tiny):
    policy = load_policy(policy_config(tiny))
    pairs = pairs_for(policy)
    logps = pair_logps(policy.model, pairs, reference_logps(policy, pairs, batch_size=8), torch.arange(8), policy)
    single = preference_loss(logps, LossSettings(terms={name: 2.0})).loss
    assert torch.isfinite(single).all()
    once = preference_loss(logps, LossSettings(terms={name: 1.0})).loss
    torch.testing.assert_close(single, 2 * once)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"terms": {"sigmoide": 1.0}}, "'sigmoide' is no loss"),
        ({"terms": {}}, "is empty"),
        ({"beta": 0.0}, "above 0"),
        ({"length_alpha": 1.5}, "between 0 and 1"),
    ],
)
def test_losses_without_meaning_are_refused(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        LossSettings(**options)


def test_a_loss_over_the_whole_batch_is_not_taken_apart(tiny, tmp_path):
    with pytest.raises(ConfigError, match="aot compares all pairs"):
        dpo(tiny, run_in(tmp_path / "r"), settings(micro_batch=1), loss=LossSettings(terms={"aot": 1.0}))


def test_a_loss_that_is_no_number_stops_before_it_changes_a_weight(tiny, tmp_path, monkeypatch):
    run = run_in(tmp_path / "run")
    real, seen = preference_loss, []

    def poisoned(pairs, settings, **options):
        seen.append(1)
        result = real(pairs, settings, **options)
        return result._replace(loss=result.loss * torch.nan) if len(seen) == 7 else result

    monkeypatch.setattr("saelab.align.preference.preference_loss", poisoned)
    with pytest.raises(TrainingError, match="became nan at step 6"):
        dpo(tiny, run, settings())
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [5]


def test_checkpoints_on_a_schedule_stay(tiny, tmp_path):
    sft(tiny, run_in(tmp_path / "run"), settings(checkpoint_every=2, keep_every=4))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4, 8, 10, 12]


def test_every_epoch_sees_every_record_once():
    order = Order(10, batch_size=3, micro_batch=2, seed=1)
    seen = [int(i) for step in range(10) for i in order.batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert [len(part) for part in order.parts(0)] == [2, 1]
    with pytest.raises(ConfigError, match="no records"):
        Order(0, batch_size=1, micro_batch=None, seed=0)


def test_the_log_is_json_with_names_that_users_of_trl_know(tiny, tmp_path):
    dpo(tiny, run_in(tmp_path / "run"), settings(steps=1))
    [line] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    names = {"loss", "learning_rate", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies"}
    assert names | {"rewards/margins", "logps/chosen", "logps/rejected"} <= set(json.loads(line))
