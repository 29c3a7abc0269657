"""The mistakes that alignment code makes most often: those that no other file tests, and the list of all of them."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from test_align_logprob import llm
from tokenizers_for_tests import words

from saelab.align.encoding import Codec, Encoded, EncodedPair, collate
from saelab.align.logprob import completion_logps, logps_of_hidden
from saelab.align.losses.pairwise import ipo_loss
from saelab.align.losses.policy import grpo_loss, ppo_policy_loss, ppo_value_loss
from saelab.align.policy import Policy
from saelab.align.ppo import PPOSettings, gather, new_value_head
from saelab.align.preference import pair_logps, reference_logps
from saelab.align.reward import RewardModel
from saelab.align.rollouts import RolloutSettings, sample

ROOT = Path(__file__).parents[2]


def policy_of(kind: str, *, seed: int = 3, pad_is_eos: bool = False) -> Policy:
    return Policy(llm(kind, seed), Codec(words(pad_is_eos=pad_is_eos), context=40), name=kind)


def test_lengths_are_the_numbers_of_tokens_that_were_scored():
    """Where the first token of an answer follows one token alone, a mask that was not shifted counts one too many."""
    policy = policy_of("llama")
    pair = EncodedPair(Encoded((1,), (5, 6, 2), False), Encoded((1,), (7, 2), False))
    other = EncodedPair(Encoded((1, 8, 9), (5, 2), False), Encoded((1, 8, 9), (7, 6, 5, 2), False))
    reference = reference_logps(policy, [pair, other], batch_size=2)
    logps = pair_logps(llm("llama", 4), [pair, other], reference, torch.arange(2), policy)
    assert (logps.n_chosen.tolist(), logps.n_rejected.tolist()) == ([3, 2], [2, 4])
    by_hand = (logps.chosen_ratio[0] / 3 - logps.rejected_ratio[0] / 2 - 5).square()
    torch.testing.assert_close(ipo_loss(logps, beta=0.1).loss[0], by_hand)
    # without any prompt, what cannot be scored is not counted either
    bare = completion_logps(policy.model, collate([Encoded((), (5, 6, 2), False)], pad_id=0))
    assert bare.mask.sum().item() == (bare.logps != 0).sum().item() == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_rewards_do_not_depend_on_padding_even_where_positions_are_learned(kind, pad_is_eos):
    model = RewardModel.fresh(policy_of(kind, pad_is_eos=pad_is_eos))
    encode = model.policy.codec.encode
    # an EOS within the prompt is not the end
    sequences = [encode("a <eos> b", "c"), encode("d", "e f g h i j k"), encode("l m", "n o")]
    with torch.no_grad():
        alone = torch.cat([model.raw_scores([sequence]) for sequence in sequences])
        torch.testing.assert_close(model.raw_scores(sequences), alone, rtol=1e-5, atol=1e-5)
        hidden = model.policy.model.base_model(torch.tensor([[4, 2, 5, 6, 2]])).last_hidden_state[0, -1]
        torch.testing.assert_close(alone[0], model.head(hidden)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampling_pads_without_moving_positions(kind):
    """Prompts of unlike length are padded on the left there; a model of learned positions would notice."""
    policy = policy_of(kind)
    prompts = [policy.codec.prompt_ids(text) for text in ("a b c d e f g", "h", "i j k")]
    settings = RolloutSettings(max_new_tokens=5, missing_eos_penalty=None)
    together = sample(policy, prompts, settings, seed=1)
    with torch.no_grad():
        for answer in together:
            greedy_start = Encoded(answer.prompt_ids, answer.completion_ids, answer.truncated)
            assert torch.isfinite(completion_logps(policy.model, collate([greedy_start], pad_id=0)).sum()).all()
    assert sample(policy, prompts[:1], settings, seed=1)[0] == together[0]
    # at so low a temperature the answer is the likeliest one of the unpadded prompt
    cold = RolloutSettings(max_new_tokens=1, temperature=1e-4, missing_eos_penalty=None)
    for prompt, answer in zip(prompts, sample(policy, prompts, cold, seed=0), strict=True):
        logits = policy.model(torch.tensor([prompt])).logits[0, -1]
        assert answer.completion_ids == (int(logits.argmax()),)


def test_what_is_logged_of_a_batch_does_not_see_its_padding():
    torch.manual_seed(0)
    logps, old, advantages, values, returns = torch.randn(5, 3, 4).unbind()
    mask = torch.arange(4) < torch.tensor([4, 1, 2])[:, None]
    garbage, none = torch.full((3, 3), 50.0), torch.zeros(3, 3, dtype=torch.bool)
    wide = [torch.cat([x.where(mask, 9.0), garbage * (i + 1)], 1) for i, x in enumerate((logps, old, advantages))]
    wide_mask = torch.cat([mask, none], 1)
    for short, padded in zip(
        ppo_policy_loss(logps, old, advantages, mask), ppo_policy_loss(*wide, wide_mask), strict=True
    ):
        torch.testing.assert_close(padded, short)
    for short, padded in zip(
        grpo_loss(logps, old, advantages[:, 0], mask), grpo_loss(*wide[:2], advantages[:, 0], wide_mask), strict=True
    ):
        torch.testing.assert_close(padded, short)
    more = [torch.cat([x, garbage], 1) for x in (values, old, returns)]
    for short, padded in zip(ppo_value_loss(values, old, returns, mask), ppo_value_loss(*more, wide_mask), strict=True):
        torch.testing.assert_close(padded, short)


def test_entropy_and_kl_of_answers_are_those_of_each_alone():
    policy, ppo = policy_of("llama"), PPOSettings()
    rollout = RolloutSettings(missing_eos_penalty=None)
    answers = [Encoded((4, 5), (6, 2), False), Encoded((7,), (8, 9, 10, 11, 12, 2), False)]

    def logged(some):
        scores = torch.zeros(len(some))
        return gather(policy, new_value_head(policy), some, scores, ppo=ppo, beta=0.1, rollout=rollout)[1]

    alone, both = [logged([answer]) for answer in answers], logged(answers)
    for name in ("objective/entropy", "objective/kl", "val/length"):
        key = name.replace("/", "__")
        assert both[key] == pytest.approx((alone[0][key] + alone[1][key]) / 2, rel=1e-5, abs=1e-6)


def test_log_probabilities_of_a_bfloat16_model_are_added_up_in_float32():
    """In bfloat16 a sum beyond 256 cannot grow by less than 2."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 401, 16, dtype=torch.bfloat16)
    W_U = torch.randn(30, 16, dtype=torch.bfloat16)
    ids = torch.randint(30, (1, 401))
    batch = collate([Encoded(tuple(ids[0, :1].tolist()), tuple(ids[0, 1:].tolist()), False)], pad_id=0)
    result = logps_of_hidden(hidden, W_U, batch)
    exact = (hidden[0, :-1].double() @ W_U.double().T).log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert result.logps.dtype == torch.float32
    assert result.sum().item() == pytest.approx(exact.item(), rel=1e-3)


def test_heads_start_where_they_say_nothing_or_have_deviation_one():
    policy = policy_of("llama")
    value = new_value_head(policy)
    assert not value.weight.any()
    assert not value.bias.any()
    wide = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=30, hidden_size=1024, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    head = RewardModel.fresh(Policy(wide, policy.codec, name="wide")).head
    assert head.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert not head.bias.any()


def test_each_pitfall_of_the_list_names_tests_that_exist():
    if not (ROOT / "docs" / "alignment.md").exists():
        pytest.skip("the documentation is not installed")
    table = (ROOT / "docs" / "alignment.md").read_text("utf-8").split("## Twenty pitfalls")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 21))
    known = {
        name
        for file in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= known, set(named) - known
