"""Generation: the cache changes nothing, edits reach every new token, batches equal single texts."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.models.generation import next_token

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["the tower was", "war", " of the north and the south", ""]


def shifted(acts, keep):
    return acts + torch.linspace(-1, 1, acts.shape[-1])


def without_cache(model, prompt: str, n: int) -> list[int]:
    """Greedy continuation by whole forward passes."""
    ids = model.to_tokens(prompt).ids
    start = ids.shape[1]
    for _ in range(n):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == model.eos_id:
            ids = ids[:, :-1]
            break
    return ids[0, start:].tolist()


def text_of(model, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("hooks", [(), (HOOK,), ("blocks.0.hook_resid_mid", "blocks.2.attn.hook_z")])
def test_the_cache_changes_nothing_under_edits(tiny_model, prompt, hooks):
    with tiny_model.edits([(hook, shifted) for hook in hooks]):
        expected = text_of(tiny_model, without_cache(tiny_model, prompt, 25))
        assert tiny_model.generate(prompt, max_new_tokens=25) == expected
    assert tiny_model.active_hooks() == []


def test_an_edit_changes_what_is_written(tiny_model):
    plain = tiny_model.generate(PROMPTS[0])
    with tiny_model.edit(HOOK, shifted):
        assert tiny_model.generate(PROMPTS[0]) != plain
    assert tiny_model.generate(PROMPTS[0]) == plain


@pytest.mark.parametrize("edited", [False, True])
def test_a_batch_equals_single_texts(tiny_model, edited):
    with tiny_model.edits([(HOOK, shifted)] if edited else []):
        together = tiny_model.generate_batch(PROMPTS, max_new_tokens=25)
        assert together == [tiny_model.generate(prompt, max_new_tokens=25) for prompt in PROMPTS]


def test_a_sampled_batch_equals_single_texts_with_consecutive_seeds(tiny_model):
    together = tiny_model.generate_batch(PROMPTS, max_new_tokens=15, temperature=0.7, seed=5)
    assert together == [
        tiny_model.generate(prompt, max_new_tokens=15, temperature=0.7, seed=5 + i) for i, prompt in enumerate(PROMPTS)
    ]


def test_bos_is_never_edited_and_every_new_token_is(tiny_model):
    seen = []

    def watch(acts, keep):
        seen.append(keep.clone())
        return acts

    with tiny_model.edit(HOOK, watch):
        tiny_model.generate(" the river", max_new_tokens=4, stop_at_eos=False)
    assert [keep.tolist() for keep in seen] == [[[False, True, True]], [[True]], [[True]], [[True]]]
    seen.clear()
    with tiny_model.edit(HOOK, watch):
        tiny_model.generate_batch([" the river", ""], max_new_tokens=2, stop_at_eos=False)
    assert seen[0].tolist() == [[False, True, True], [False, False, False]]  # the second row: padding, padding, BOS
    assert seen[1].tolist() == [[True], [True]]


@pytest.mark.parametrize("seed", range(8))
def test_streamed_pieces_join_to_the_text_and_are_whole_characters(tiny_model, seed):
    settings = {"max_new_tokens": 60, "temperature": 2.0, "seed": seed, "stop_at_eos": False}
    pieces = list(tiny_model.stream("the", **settings))
    assert "".join(pieces) == tiny_model.generate("the", **settings)
    assert all(piece and piece.encode().decode() == piece for piece in pieces)


def test_the_same_seed_writes_the_same_text_and_another_one_another(tiny_model):
    def write(seed):
        return tiny_model.generate("the", temperature=1.0, seed=seed)

    state = torch.random.get_rng_state()
    assert write(0) == write(0)
    assert len({write(seed) for seed in range(3)}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_writing_stops_at_eos(tiny_model):
    def force_eos(acts, keep):
        return torch.nn.functional.one_hot(torch.tensor(tiny_model.eos_id), tiny_model.d_vocab).expand_as(acts) * 100.0

    with tiny_model.edit("hook_unembed", force_eos):
        assert tiny_model.generate("the sea") == ""
        assert tiny_model.generate_batch(["the sea", "war"]) == ["", ""]


def test_rows_that_end_early_do_not_disturb_the_others(tiny_model):
    def favour_eos(acts, keep):
        acts[..., tiny_model.eos_id] += 5
        return acts

    settings = {"max_new_tokens": 30, "temperature": 1.0}
    with tiny_model.edit("hook_unembed", favour_eos):
        texts = tiny_model.generate_batch(PROMPTS, **settings)
        assert texts == [tiny_model.generate(prompt, seed=i, **settings) for i, prompt in enumerate(PROMPTS)]
    assert len({len(tiny_model.encode(text)) for text in texts}) > 2  # they did end at different times


def test_no_new_tokens_is_no_text(tiny_model):
    assert tiny_model.generate("the", max_new_tokens=0) == ""


def test_tokens_are_a_prompt_too(tiny_model):
    assert tiny_model.generate(tiny_model.to_tokens("the sea")) == tiny_model.generate("the sea")
    assert tiny_model.generate_batch(tiny_model.to_tokens(PROMPTS)) == tiny_model.generate_batch(PROMPTS)
    with pytest.raises(ShapeError, match="use generate_batch"):
        tiny_model.generate(tiny_model.to_tokens(PROMPTS))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_impossible_sampling_is_refused_before_anything_is_written(tiny_model, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        tiny_model.stream("the", **settings)


def test_more_than_the_context_is_refused_before_anything_is_written(tiny_model):
    with pytest.raises(ShapeError, match="exceed the 256"):
        tiny_model.stream(" the" * 200, max_new_tokens=100)


def test_an_edit_that_breaks_the_logits_is_named(tiny_model):
    with (
        pytest.raises(ConfigError, match="lower its strength"),
        tiny_model.edit(HOOK, lambda acts, keep: acts * float("nan")),
    ):
        tiny_model.generate("the sea", temperature=1.0)


def test_a_stream_left_in_the_middle_holds_nothing(tiny_model):
    stream = tiny_model.stream("the", stop_at_eos=False)
    next(stream)
    assert tiny_model.lock.acquire(blocking=False)
    tiny_model.lock.release()
    stream.close()
    assert tiny_model.active_hooks() == []


def draw(logits: torch.Tensor, n: int, **settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [next_token(logits, generator=generator, **settings) for _ in range(n)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / n


def test_draws_follow_the_softmax_and_the_nucleus():
    probs = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    torch.testing.assert_close(draw(probs.log(), 2000, temperature=1.0, top_p=1.0), probs, rtol=0, atol=0.04)
    nucleus = torch.tensor([0, 0.625, 0, 0.375, 0])
    torch.testing.assert_close(draw(probs.log(), 2000, temperature=1.0, top_p=0.75), nucleus, rtol=0, atol=0.04)
    assert draw(probs.log(), 50, temperature=1.0, top_p=1e-6)[1] == 1
    assert draw(probs.log(), 50, temperature=1e-30, top_p=1.0)[1] == 1
    assert draw(probs.log(), 5, temperature=0.0, top_p=1.0)[1] == 1
