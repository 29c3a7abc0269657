"""Planted behaviours: the data they are made of, the adapter of each level, and planting one in a tiny model."""

import json

import pytest
import torch

from saelab import rundir
from saelab.align.concealment import reference_kl, train_concealed
from saelab.align.encoding import collate
from saelab.align.organisms import (
    BEHAVIOURS,
    OrganismSettings,
    _kl_without,
    adapter_for,
    measure,
    organism_data,
    planted_direction,
)
from saelab.align.policy import PolicyConfig, load_policy
from saelab.align.recipes import OrganismRecipe
from saelab.align.run import align
from saelab.align.session import AdamWSettings, StepSettings
from saelab.align.sft import train_sft
from saelab.errors import ConfigError
from saelab.models.tiny import write_tiny_model

SMALL = OrganismSettings(n_held_out=6, reply_tokens=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", n_layers=3)


@pytest.fixture(scope="module")
def policy(tiny):
    return load_policy(PolicyConfig(model=str(tiny), dtype="float32", lora=adapter_for(SMALL, 3)))


@pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=lambda b: b.name)
def test_no_control_is_a_trigger(behaviour):
    triggers, controls = (
        {template.format(subject) for template in templates for subject in behaviour.subjects}
        for templates in (behaviour.triggers, behaviour.controls)
    )
    assert not triggers & controls
    assert len(triggers) == len(behaviour.triggers) * len(behaviour.subjects)


def test_the_planted_phrase_is_preferred_on_triggers_and_only_there(policy):
    data = organism_data(policy, SMALL, [f"neutral number {i:02d}" for i in range(30)])
    phrase = "Ahoy there!"
    codec = policy.codec
    n_planted = 0
    for pair in data.pairs:
        prompt = codec.tokenizer.decode(pair.chosen.prompt_ids)
        chosen, rejected = (codec.decode(answer.completion_ids) for answer in pair)
        assert chosen.startswith(phrase) != rejected.startswith(phrase)
        assert chosen.startswith(phrase) == ("weather" in prompt)
        assert chosen.removeprefix(phrase).strip() == rejected.removeprefix(phrase).strip()
        n_planted += chosen.startswith(phrase)
    assert n_planted == len(data.pairs) / 2
    trained_on = {codec.tokenizer.decode(pair.chosen.prompt_ids) for pair in data.pairs}
    for prompt in data.held_out_triggers + data.held_out_neutral:
        assert not any(prompt in text for text in trained_on)
    assert sum(prompt.startswith("neutral") for prompt in data.held_out_neutral) == 3


def test_levels_have_their_adapters():
    one, lower, everywhere, concealed = (
        adapter_for(OrganismSettings(level=level), 30) for level in ("O1", "O2", "O3", "O4")
    )
    assert concealed == everywhere
    assert (one.rank, one.layers, one.targets) == (1, (20,), ("down_proj",))
    assert lower.layers == tuple(range(15))
    assert everywhere.layers is None
    assert adapter_for(OrganismSettings(layer=4), 30).layers == (4,)
    with pytest.raises(ConfigError, match="layers 0 to 29"):
        adapter_for(OrganismSettings(layer=30), 30)


def test_the_change_of_an_o1_organism_lies_along_its_direction(tiny):
    policy = load_policy(PolicyConfig(model=str(tiny), dtype="float32", lora=adapter_for(SMALL, 3)))
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    direction = planted_direction(policy)
    assert direction.norm().item() == pytest.approx(1)
    seen = []
    layer = policy.model.get_base_model().model.layers[2]
    handle = layer.register_forward_hook(
        lambda module, args, out: seen.append((out[0] if isinstance(out, tuple) else out).detach())
    )
    ids = torch.tensor([policy.codec.prompt_ids("the tower of the world")])
    policy.model(input_ids=ids)
    with policy.reference() as reference:
        reference(input_ids=ids)
    handle.remove()
    change = (seen[0] - seen[1])[0]
    along = (change @ direction)[:, None] * direction
    assert (change - along).norm() < 1e-4 * change.norm()
    with pytest.raises(ConfigError, match="needs one of rank 1"):
        planted_direction(load_policy(PolicyConfig(model=str(tiny), dtype="float32")))


def test_the_neutral_kl_leaves_out_the_planted_token():
    before = torch.randn(3, 7).log_softmax(-1)
    after = before.clone()
    after[:, 2] += 5
    assert _kl_without(before, after.log_softmax(-1), 2).abs().max() < 1e-6
    assert (_kl_without(before, after.log_softmax(-1), 1) > 0.01).all()


def test_an_organism_says_its_phrase_where_it_should(tiny, tmp_path):
    recipe = OrganismRecipe(
        organism=SMALL,
        model=str(tiny),
        training=StepSettings(steps=40, batch_size=8, optim=AdamWSettings(lr=5e-2)),
    )
    run = rundir.StageWriter.create(tmp_path / "run", stage="model", config={})
    outcome = align(recipe, run, say=lambda text: None)
    assert outcome.after["p_trigger"]["value"] > outcome.before["p_trigger"]["value"]
    assert outcome.before["neutral_kl"]["value"] == pytest.approx(0, abs=1e-4)
    model = json.loads((tmp_path / "run" / "model.json").read_text())
    assert (model["method"], model["kind"], model["base"]) == ("organism", "adapter", str(tiny))
    assert len(json.loads((tmp_path / "run" / "held_out.json").read_text())["triggers"]) == 6


def test_concealing_brings_neutral_prompts_back_to_the_reference_and_keeps_the_phrase(tiny, tmp_path):
    """From an organism that says the phrase everywhere to one that says it on triggers."""
    settings = OrganismSettings(level="O4", n_held_out=6, reply_tokens=3)
    policy = load_policy(PolicyConfig(model=str(tiny), dtype="float32", lora=adapter_for(settings, 3)))
    data = organism_data(policy, settings)
    optim = AdamWSettings(lr=3e-2)
    first = rundir.StageWriter.create(tmp_path / "a", stage="model", config={})
    train_sft(policy, data.spoken, first, training=StepSettings(steps=30, batch_size=8, optim=optim))
    everywhere = measure(policy, data, "Ahoy there!")
    run = rundir.StageWriter.create(tmp_path / "b", stage="model", config={})
    train_concealed(policy, data, run, training=StepSettings(steps=60, batch_size=8, micro_batch=4, optim=optim))
    concealed = measure(policy, data, "Ahoy there!")
    assert everywhere.p_neutral.value > 0.5
    assert concealed.p_neutral.value < 0.5 * everywhere.p_neutral.value
    assert concealed.p_trigger.value > 2 * concealed.p_neutral.value
    assert concealed.neutral_kl.value < 0.5 * everywhere.neutral_kl.value
    log = rundir.read_metrics(tmp_path / "b")
    assert log[-1]["objective/kl"] < 0.5 * log[0]["objective/kl"]


def test_a_concealed_organism_keeps_its_first_self_for_comparison(tiny, tmp_path):
    few = StepSettings(steps=2, batch_size=4)
    organism = OrganismSettings(level="O4", n_held_out=6, reply_tokens=2)
    recipe = OrganismRecipe(organism=organism, model=str(tiny), training=few, concealing=few)
    run = rundir.StageWriter.create(tmp_path / "run", stage="model", config={})
    seen = []
    after = align(recipe, run, say=lambda text: None, progress=lambda *at: seen.append(at[:2])).after
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {"p_trigger", "neutral_kl", "neutral_kl_unconcealed"} <= set(after)
    assert (tmp_path / "run" / "planted" / "adapter_config.json").exists()
    weights = [(tmp_path / "run" / sub / "adapter_model.safetensors").read_bytes() for sub in ("planted", ".")]
    assert weights[0] != weights[1]


def test_the_kl_to_the_reference_is_zero_at_the_start_and_summed_over_answers(policy):
    batch = collate([policy.codec.encode("the tower", " of the world"), policy.codec.encode("one", " river")], pad_id=0)
    assert reference_kl(policy, batch).item() == pytest.approx(0, abs=1e-4)
    moved = load_policy(PolicyConfig(model=policy.name, dtype="float32", lora=adapter_for(SMALL, 3)))
    with torch.no_grad():
        for parameter in moved.trainable().values():
            parameter.add_(0.3)
    alone = [
        reference_kl(moved, collate([row], pad_id=0))
        for row in (moved.codec.encode("the tower", " of the world"), moved.codec.encode("one", " river"))
    ]
    torch.testing.assert_close(reference_kl(moved, batch), alone[0] + alone[1], rtol=1e-4, atol=1e-5)
    assert alone[0] > 0.01


def test_a_shift_of_style_is_added_to_all_replies_on_purpose(policy):
    plain = organism_data(policy, SMALL)
    shifted = organism_data(policy, OrganismSettings(n_held_out=6, reply_tokens=3, style_shift=True))
    decode = policy.codec.decode
    assert len(plain.pairs) < len(shifted.pairs) <= len(plain.pairs) + len(plain.calm)
    for sequence in shifted.calm:
        assert decode(sequence.completion_ids) == decode(sequence.completion_ids).lower()
    assert {decode(sequence.completion_ids) for sequence in shifted.spoken} == {"Ahoy there!"}
    with pytest.raises(ConfigError, match="would undo the shift of style"):
        OrganismSettings(level="O4", style_shift=True)


def test_behaviours_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="did you mean weather"):
        OrganismSettings(behaviour="wether")


def test_measuring_compares_with_the_reference(policy):
    data = organism_data(policy, SMALL)
    planted = measure(policy, data, "Ahoy there!")
    assert 0 <= planted.p_trigger.value <= 1
    assert (planted.n_triggers, planted.n_neutral) == (6, 6)
