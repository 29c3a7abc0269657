"""The trained model and its reference, on a tiny model in the layout of Hugging Face."""

import pytest
import torch

from saelab.align.encoding import collate
from saelab.align.logprob import completion_logps
from saelab.align.policy import LoraSettings, PolicyConfig, load_policy
from saelab.errors import ConfigError
from saelab.models.tiny import write_tiny_model

LORA = LoraSettings(rank=2, targets=("q_proj", "down_proj"), layers=(0, 1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def policy(path, **options):
    return load_policy(PolicyConfig(model=str(path), context=64, **options))


def batch_of(policy):
    sequences = [policy.codec.encode("the tower", " of the world"), policy.codec.encode("one", " river")]
    return collate(sequences, pad_id=policy.codec.pad_id)


def step(policy, lr=0.1):
    loss = -completion_logps(policy.model, batch_of(policy)).sum().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter -= lr * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("lora", [LORA, None])
def test_the_reference_is_the_model_before_training(tiny, lora):
    trained = policy(tiny, lora=lora)
    batch = batch_of(trained)
    with trained.reference() as reference:
        before = completion_logps(reference, batch).sum()
    torch.testing.assert_close(completion_logps(trained.model, batch).sum(), before, rtol=0, atol=0)
    step(trained)
    step(trained)
    with trained.reference() as reference:
        after = completion_logps(reference, batch).sum()
        assert not after.requires_grad
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (completion_logps(trained.model, batch).sum() - before).abs().max() > 1e-3


def test_only_the_adapter_of_the_chosen_layers_is_trained_and_in_float32(tiny):
    names = policy(tiny, lora=LORA).trainable()
    assert all("lora_" in name for name in names)
    assert {name.split("layers.")[1][0] for name in names} == {"0", "1"}
    assert all(parameter.dtype == torch.float32 for parameter in names.values())
    assert policy(tiny, lora=None).trainable()["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("lora", [LORA, None])
def test_a_saved_policy_loads_with_what_it_learned(tiny, tmp_path, lora):
    trained = policy(tiny, lora=lora, dtype="float32")
    step(trained)
    trained.save(tmp_path / "saved")
    again = policy(tmp_path / "saved", lora=LORA, dtype="float32")
    batch = batch_of(trained)
    expected = completion_logps(trained.model, batch).sum()
    torch.testing.assert_close(completion_logps(again.model, batch).sum(), expected, rtol=1e-4, atol=1e-4)
    with again.reference() as reference:  # of the second training: where the first ended
        torch.testing.assert_close(completion_logps(reference, batch).sum(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"targets": ("q_project",)}, "'q_project', but the model's matrices are"),
        ({"layers": (3,)}, "has 3, but the model has layers 0 to 2"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"targets": ()}, "nothing to train"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tiny, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        policy(tiny, lora=LoraSettings(**options))
