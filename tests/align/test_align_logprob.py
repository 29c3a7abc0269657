"""Log-probabilities of answers: exact on a model of known probabilities, and equal to TRL's on its models."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers_for_tests import words
from torch import nn

from saelab.align.advantages import kl_estimate
from saelab.align.encoding import Batch, Codec, Encoded, collate, pack
from saelab.align.logprob import (
    completion_logps,
    hidden_states,
    log_collisions,
    logps_of_hidden,
    packed_logps,
    unembedding,
)
from saelab.align.losses.pairwise import PairLogps, length_desensitised, on_policy_weights, sigmoid_loss
from saelab.align.losses.policy import grpo_loss
from saelab.align.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from saelab.align.policy import LoraSettings, with_adapter
from saelab.errors import ConfigError, TextError

TRL = json.loads((Path(__file__).parent / "trl_1.16.0.json").read_text())


class Bigrams(nn.Module):
    """A causal language model whose next token depends on the last alone, by a table of logits."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace()
        self.head = nn.Linear(table.shape[1], table.shape[1], bias=False)
        nn.init.eye_(self.head.weight)

    @property
    def base_model(self):
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.table[input_ids])

    def get_output_embeddings(self):
        return self.head


def test_they_are_the_table_entries_of_a_bigram_model():
    torch.manual_seed(0)
    model = Bigrams(torch.randn(6, 6))
    table = model.table.log_softmax(1)
    batch = collate([Encoded((1, 2), (3, 4, 5), False), Encoded((4,), (4, 0), False)], pad_id=0)
    result = completion_logps(model, batch)
    expected = [table[2, 3] + table[3, 4] + table[4, 5], table[4, 4] + table[4, 0]]
    torch.testing.assert_close(result.sum(), torch.stack(expected))
    torch.testing.assert_close(result.mean(), torch.stack([expected[0] / 3, expected[1] / 2]))
    assert result.mask.sum(1).tolist() == [3, 2]
    assert (result.logps[~result.mask] == 0).all()


def test_all_answers_together_have_probability_one():
    """Every sequence of up to 3 tokens that ends with EOS, and every one of 3 tokens that does not."""
    torch.manual_seed(1)
    model, eos, n_vocab = Bigrams(torch.randn(5, 5)), 0, 5
    others = range(1, n_vocab)
    answers = [(*start, eos) for n in range(3) for start in itertools.product(others, repeat=n)]
    answers += list(itertools.product(others, repeat=3))
    batch = collate([Encoded((2, eos, 3), answer, False) for answer in answers], pad_id=eos)
    assert completion_logps(model, batch).sum().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_temperature_is_that_of_the_sampling_distribution():
    torch.manual_seed(0)
    model = Bigrams(torch.randn(6, 6))
    batch = collate([Encoded((1,), (3,), False)], pad_id=0)
    expected = (model.table / 0.7).log_softmax(1)[1, 3]
    torch.testing.assert_close(completion_logps(model, batch, temperature=0.7).sum()[0], expected)


def llm(arch: str, seed: int) -> nn.Module:
    """The model of the recording: it has two layers of width 16 and weights from the seed alone."""
    torch.manual_seed(seed)
    common = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    if arch == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            **common,
        )
        kind = transformers.LlamaForCausalLM
    else:
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **common
        )
        kind = transformers.GPT2LMHeadModel
    config._attn_implementation = "eager"
    return kind(config).float().eval()


def recorded_batch(arch: str) -> Batch:
    dpo = TRL[arch]["dpo"]["batch"]
    attended, completion = (torch.tensor(dpo[name]) for name in ("attention_mask", "completion_mask"))
    n_total = attended.sum(1)
    return Batch(ids=torch.tensor(dpo["input_ids"]), n_prompt=n_total - completion.sum(1), n_total=n_total)


@pytest.fixture(params=["llama", "gpt2"])
def arch(request):
    if transformers.__version__ != TRL["versions"]["transformers"]:
        pytest.skip(f"the models were recorded with transformers {TRL['versions']['transformers']}")
    return request.param


def test_log_probabilities_equal_trls(arch):
    batch, dpo = recorded_batch(arch), TRL[arch]["dpo"]
    for name, seed in (("policy", 1), ("ref", 2)):
        logps = completion_logps(llm(arch, seed), batch).sum()
        expected = torch.tensor(dpo["logps"][f"{name}_chosen"] + dpo["logps"][f"{name}_rejected"])
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_whole_step_equals_trls(arch):
    batch, model = recorded_batch(arch), llm(arch, 1)
    policy = completion_logps(model, batch)
    with torch.no_grad():
        ref = completion_logps(llm(arch, 2), batch).sum()
    n = policy.mask.sum(1)
    loss = sigmoid_loss(PairLogps(*policy.sum().chunk(2), *ref.chunk(2), *n.chunk(2)), beta=0.1).loss.mean()
    loss.backward()
    norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None))
    expected = TRL[arch]["dpo"]["losses"]["sigmoid|beta=0.1"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-4)


def step_of(arch: str, *, length_alpha: float | None = None) -> tuple[PairLogps, torch.Tensor]:
    """The recorded pairs under policy and reference, and the weights of WPO."""
    batch, model = recorded_batch(arch), llm(arch, 1)
    hidden, W_U = hidden_states(model, batch), unembedding(model)
    policy = logps_of_hidden(hidden, W_U, batch)
    with torch.no_grad():
        ref = completion_logps(llm(arch, 2), batch)
    n = policy.mask.sum(1)
    shorter = torch.minimum(*n.chunk(2)).repeat(2)
    alpha = 1.0 if length_alpha is None else length_alpha
    sums, ref_sums = (length_desensitised(x.logps, x.mask, shorter, alpha=alpha) for x in (policy, ref))
    weights = on_policy_weights(policy.logps, log_collisions(hidden, W_U, batch), policy.mask).chunk(2)
    return PairLogps(*sums.chunk(2), *ref_sums.chunk(2), *n.chunk(2)), weights[0] * weights[1]


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["ld_alpha=0.5", "use_weighting=True"])
def test_length_and_on_policy_weights_equal_trls(arch, beta, kind):
    pairs, weights = step_of(arch, length_alpha=0.5 if kind.startswith("ld") else None)
    loss = sigmoid_loss(pairs, beta=beta).loss
    ours = (loss * weights).mean() if kind.startswith("use") else loss.mean()
    expected = TRL[arch]["dpo"]["losses"][f"sigmoid|beta={beta}|{kind}"]["loss"]
    assert ours.item() == pytest.approx(expected, rel=1e-5)


GROUP_CASES = [
    ("grpo|token", {"aggregation": "sequences"}),
    ("grpo|sequence", {"aggregation": "sequences", "ratio_of": "sequence"}),
    ("bnpo|token", {"aggregation": "tokens"}),
    ("dapo|token", {"aggregation": "tokens"}),
    ("dr_grpo|token", {"aggregation": "constant"}),
    ("cispo|token", {"aggregation": "tokens", "surrogate": "cispo", "ratio_cap": 0.2}),
]


@pytest.mark.parametrize(("name", "options"), GROUP_CASES, ids=[case[0] for case in GROUP_CASES])
def test_group_losses_equal_trls(name, options):
    """Of the Llama alone: the recording pads on the left without positions, which only rotary models do not notice."""
    if transformers.__version__ != TRL["versions"]["transformers"]:
        pytest.skip(f"the models were recorded with transformers {TRL['versions']['transformers']}")
    recorded = TRL["llama"]["grpo"]
    columns = {key: torch.tensor(values) for key, values in recorded["inputs"].items()}
    answers = []
    for row in range(len(columns["prompt_ids"])):
        prompt = columns["prompt_ids"][row][columns["prompt_mask"][row].bool()].tolist()
        answer = columns["completion_ids"][row][columns["completion_mask"][row].bool()].tolist()
        answers.append(Encoded(tuple(prompt), tuple(answer), truncated=False))
    policy = completion_logps(llm("llama", 1), collate(answers, pad_id=0))
    mask = columns["completion_mask"].bool()
    logps = torch.zeros(mask.shape).masked_scatter(mask, policy.logps[policy.mask])
    # TRL weighs its KL by the ratio, because the answers were drawn from the old policy
    log_ratio = (logps - columns["old_logps"]).where(mask, 0.0)
    if "sequence" in name:
        log_ratio = (log_ratio.sum(1) / mask.sum(1))[:, None]
    kl = kl_estimate(logps, columns["ref_logps"], estimator="k3") * log_ratio.exp()
    ours = grpo_loss(logps, columns["old_logps"], columns["advantages"], mask, kl=kl, beta=0.04, **options).loss
    assert ours.item() == pytest.approx(recorded[name], rel=1e-5)


def test_a_collision_is_two_equal_draws():
    torch.manual_seed(0)
    model = Bigrams(torch.randn(6, 6))
    batch = collate([Encoded((1, 2), (3, 4), False), Encoded((4,), (5,), False)], pad_id=0)
    found = log_collisions(hidden_states(model, batch), unembedding(model), batch)
    exact = model.table.softmax(1).square().sum(1).log()
    torch.testing.assert_close(
        found,
        torch.stack(
            [torch.stack([exact[0] * 0, exact[2], exact[3]]), torch.stack([exact[4], exact[0] * 0, exact[0] * 0])]
        ),
    )


def test_losses_without_reference_equal_trls(arch):
    recorded, model = TRL[arch]["orpo_cpo_simpo"], llm(arch, 1)
    batches = {}
    for kind in ("chosen", "rejected"):
        n_total = torch.tensor(recorded["batch"][f"{kind}_attention_mask"]).sum(1)
        n_answer = (torch.tensor(recorded["batch"][f"{kind}_labels"]) != -100).sum(1)
        ids = torch.tensor(recorded["batch"][f"{kind}_input_ids"])
        batches[kind] = Batch(ids=ids, n_prompt=n_total - n_answer, n_total=n_total)
    logps = {kind: completion_logps(model, batch) for kind, batch in batches.items()}
    chosen, rejected = logps["chosen"].sum(), logps["rejected"].sum()
    n_chosen, n_rejected = (logps[kind].mask.sum(1) for kind in ("chosen", "rejected"))

    cpo = cpo_loss(chosen, rejected, n_chosen, beta=0.1, alpha=1.0).loss.mean()
    assert cpo.item() == pytest.approx(recorded["cpo|sigmoid|beta=0.1|alpha=1"]["loss"], rel=1e-5)
    simpo = simpo_loss(chosen, rejected, n_chosen, n_rejected, beta=2.0, gamma=1.0).loss.mean()
    assert simpo.item() == pytest.approx(recorded["simpo|beta=2|gamma=1"]["loss"], rel=1e-5)

    # ORPO's likelihood counts the prompt too, from the second token on
    whole = batches["chosen"]
    everything = completion_logps(
        model, Batch(ids=whole.ids, n_prompt=torch.ones_like(whole.n_prompt), n_total=whole.n_total)
    )
    nll = -everything.sum() / everything.mask.sum(1).float().mean()
    orpo = orpo_loss(nll, chosen, rejected, n_chosen, n_rejected, beta=0.1)
    metrics = recorded["orpo|beta=0.1"]
    assert nll.mean().item() == pytest.approx(metrics["metrics"]["eval_nll_loss"], rel=1e-5)
    assert orpo.loss.mean().item() == pytest.approx(metrics["loss"], rel=1e-5)
    assert orpo.log_odds_ratio.mean().item() == pytest.approx(metrics["metrics"]["eval_log_odds_ratio"], rel=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_neither_padding_nor_company_changes_a_log_probability(arch):
    """On a model of learned positions too, where a wrong position would show."""
    model, codec = llm(arch, 3), Codec(words(), context=40)
    sequences = [codec.encode("a b c", "d e"), codec.encode("f", "g h i j k l"), codec.encode("m n", "o")]
    together = completion_logps(model, collate(sequences, pad_id=0)).sum()
    alone = torch.cat([completion_logps(model, collate([s], pad_id=0)).sum() for s in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_sequences_have_the_log_probabilities_and_gradients_of_separate_ones(kind, implementation):
    """Of learned positions too; the widths make one row, several, and one with padding."""
    model, codec = llm(kind, 3), Codec(words(), context=40)
    model.config._attn_implementation = implementation
    sequences = [
        codec.encode("a b c", "d e"), codec.encode("f", "g h i j k l"), codec.encode("m n", "o"),
        codec.encode("p q r s", "t"),
    ]  # fmt: skip
    alone = torch.cat([completion_logps(model, collate([s], pad_id=0)).sum() for s in sequences])
    weights = torch.arange(1.0, 5.0)
    (expected,) = torch.autograd.grad((weights * alone).sum(), unembedding(model))
    for width in (8, 14, 40):
        packed = pack(sequences, width=width, pad_id=0)
        assert packed.ids.shape[1] <= width
        together = packed_logps(model, packed)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad((weights * together).sum(), unembedding(model))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert len(pack(sequences, width=40, pad_id=0).ids) == 1
    with pytest.raises(TextError, match="a sequence of 8 tokens does not fit into a row of 7"):
        pack(sequences, width=7, pad_id=0)


def test_attention_that_would_see_across_packed_sequences_is_refused():
    model = llm("llama", 3)
    model.config._attn_implementation = "flex_attention"
    packed = pack([Encoded((4,), (5, 2), False)], width=8, pad_id=0)
    with pytest.raises(ConfigError, match="packing needs attention of the kind sdpa or eager"):
        packed_logps(model, packed)


def test_an_adapter_is_seen_and_can_be_left_out():
    model = llm("llama", 1)
    batch = recorded_batch("llama")
    plain = completion_logps(model, batch).sum().detach()
    adapted = with_adapter(model, LoraSettings(rank=2, targets=("q_proj",)))
    torch.testing.assert_close(completion_logps(adapted, batch).sum().detach(), plain)  # B starts at zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert (completion_logps(adapted, batch).sum() - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(completion_logps(adapted, batch).sum().detach(), plain, rtol=0, atol=0)


def test_heads_that_do_more_than_multiply_are_refused():
    model = llm("llama", 1)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        completion_logps(model, recorded_batch("llama"))
