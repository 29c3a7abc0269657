from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from activations_fake_model import FakeModel

from saelab.activations.capture import CacheConfig, capture
from saelab.activations.loader import Batches
from saelab.activations.stacked import DifferenceBatches, Slot, StackedBatches, check_pair
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig
from saelab.errors import ArtifactError, ConfigError, ShapeError, TextError

LOW, HIGH, NARROW = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"

Make = Callable[..., ActivationStore]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Captures the model with this seed; the tokens of the letters ``huge`` have a huge norm at the higher hook."""
    folder = tmp_path_factory.mktemp("stores")

    def make(seed: int, huge: str = "", *, n_documents: int = 30, first: int = 0, **changes: object) -> ActivationStore:
        name = f"{seed}{huge}{n_documents}-{first}{''.join(map(str, changes.values()))}"
        if not (folder / name).exists():
            numbers = range(first, first + n_documents)
            lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}."} for i in numbers]
            (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            model = FakeModel(seed=seed)
            for letter in huge:
                model.tables[HIGH][ord(letter)] *= 1000
            settings = {"context": 16, "held_out": 0.3, "rows_per_shard": 10, "dtype": "float32"} | changes
            text = TextConfig(source=str(folder / "text.jsonl"))
            config = CacheConfig(hook_names=(LOW, HIGH, NARROW), text=text, **settings)  # type: ignore[arg-type]
            capture(config, folder / name, model=model)
        return ActivationStore.open(folder / name)

    return make


def test_each_slot_is_what_batches_of_it_alone_give(stored: Make):
    store = stored(0)
    stacked = StackedBatches([Slot(store, LOW), Slot(store, HIGH)], batch_size=50, seed=3)
    for i, hook in enumerate((LOW, HIGH)):
        alone = Batches(store, hook, batch_size=50, seed=3)
        assert stacked.n_tokens == alone.n_tokens
        for step in (0, 1, 2, 7, 30, 1):
            batch = stacked.at(step)
            assert batch.shape == (50, 2, 8)
            torch.testing.assert_close(batch[:, i], alone.at(step), rtol=0, atol=0)
        ours, theirs = stacked.statistics(200)[i], alone.statistics(200)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=0)
        assert (ours.centred_norm, ours.n_tokens) == (theirs.centred_norm, theirs.n_tokens)
    assert (stacked.d_in, stacked.n_outliers) == (8, 0)


def test_slots_of_paired_stores_hold_the_same_tokens(stored: Make):
    first, second = stored(0), stored(1)
    stacked = StackedBatches([Slot(first, HIGH), Slot(second, HIGH)], batch_size=40, seed=0, split="held_out")
    positions = stacked.positions(2)
    rows, places = np.divmod(positions, 16)
    tokens = first.tokens(rows)[np.arange(40), places]
    for i, seed in enumerate((0, 1)):
        expected = FakeModel(seed=seed).tables[HIGH][tokens] + torch.from_numpy(places)[:, None] / 100
        torch.testing.assert_close(stacked.at(2)[:, i], expected)
    assert set(rows) <= set(first.rows("held_out"))


def test_a_token_that_is_an_outlier_in_one_slot_is_left_out_of_all(stored: Make):
    first, second = stored(0, huge="D"), stored(1, huge="7")
    slots = [Slot(first, HIGH), Slot(second, HIGH), Slot(second, LOW)]
    stacked = StackedBatches(slots, batch_size=10, seed=0)
    alone = [Batches(*slot, batch_size=10, seed=0) for slot in slots]
    assert [batches.n_outliers > 0 for batches in alone] == [True, True, False]
    assert stacked.n_outliers == sum(batches.n_outliers for batches in alone)
    assert stacked.norm_limits == tuple(batches.norm_limit for batches in alone)
    seen = np.concatenate([stacked.positions(step) for step in range(stacked.n_tokens // 10)])
    assert len(set(seen)) == len(seen)
    letters = set(first.tokens(first.rows("all")).flatten()[seen].tolist())
    assert not letters & {ord("D"), ord("7"), FakeModel.bos_id}
    everything = StackedBatches(slots, batch_size=10, seed=0, outlier_factor=None)
    assert everything.n_tokens == stacked.n_tokens + stacked.n_outliers
    assert {stats.n_tokens for stats in stacked.statistics()} == {stacked.n_tokens}


def test_an_epoch_of_a_pair_visits_every_token_once(stored: Make):
    stacked = StackedBatches([Slot(stored(0), LOW), Slot(stored(1), LOW)], batch_size=1, seed=0)
    positions = np.concatenate([stacked.positions(step) for step in range(stacked.n_tokens)])
    rows = stored(0).rows("train")
    assert sorted(positions.tolist()) == [row * 16 + place for row in rows for place in range(1, 16)]


def test_differences_are_second_minus_first(stored: Make):
    first, second = stored(0), stored(1)
    difference = DifferenceBatches(first, second, HIGH, batch_size=32, seed=5)
    stacked = StackedBatches([Slot(first, HIGH), Slot(second, HIGH)], batch_size=32, seed=5)
    for step in (0, 1, 20):
        batch = stacked.at(step)
        torch.testing.assert_close(difference.at(step), batch[:, 1] - batch[:, 0], rtol=0, atol=0)
    assert difference.n_tokens == stacked.n_tokens
    assert difference.d_in == 8
    rows = first.rows("train")
    acts = (second.acts(HIGH, rows) - first.acts(HIGH, rows))[:, 1:].flatten(0, 1)
    stats = difference.statistics()
    torch.testing.assert_close(stats.mean, acts.mean(0))
    assert stats.n_tokens == len(acts)


def test_large_differences_are_no_outliers_by_themselves(stored: Make):
    store = stored(0)
    assert DifferenceBatches(store, stored(0, huge="D"), HIGH, batch_size=1, seed=0).n_outliers > 0
    same = DifferenceBatches(store, store, HIGH, batch_size=1, seed=0)  # all differences are 0, and so is their median
    assert same.n_outliers == 0
    assert not same.at(0).any()


def test_slots_of_different_widths_are_refused(stored: Make):
    store = stored(0)
    with pytest.raises(ShapeError, match=r"has width 8, but blocks.1.attn.hook_z .* has 4; choose hooks of one width"):
        StackedBatches([Slot(store, LOW), Slot(store, NARROW)], batch_size=1, seed=0)


def test_one_slot_is_refused(stored: Make):
    with pytest.raises(ConfigError, match="at least 2 slots, got 1"):
        StackedBatches([Slot(stored(0), LOW)], batch_size=1, seed=0)
    with pytest.raises(ConfigError, match="did you mean"):
        StackedBatches([Slot(stored(0), LOW), Slot(stored(0), "blocks.0.hook_resid_pots")], batch_size=1, seed=0)


def test_stores_of_different_tokens_are_refused_in_one_sentence(stored: Make):
    store = stored(0)
    others = [
        (stored(0, n_documents=20), "rows of 16 tokens"),
        (stored(0, context=12), "of 12; capture the second model with"),
        (stored(0, held_out=0.9), "rows"),
        (stored(0, first=1), "rows|differ"),
    ]
    for other, words in others:
        with pytest.raises(ArtifactError, match=words) as caught:
            StackedBatches([Slot(store, LOW), Slot(other, LOW)], batch_size=1, seed=0)
        assert "\n" not in str(caught.value)
        with pytest.raises(ArtifactError):
            DifferenceBatches(store, other, LOW, batch_size=1, seed=0)


def test_one_other_token_far_into_the_store_is_found(stored: Make, monkeypatch: pytest.MonkeyPatch):
    first, second = stored(0), stored(1)
    check_pair(first, second)
    for part, words in (
        ("tokens", "differ from row 25 on"),
        ("doc", "differ from row 25 on"),
        ("held_out", "hold out"),
    ):
        tampered = ActivationStore(second.path, second.manifest)
        shard = {name: tensor.clone() for name, tensor in tampered._shard(2).items()}
        shard[part].view(10, -1)[5, 0] ^= 1
        monkeypatch.setitem(tampered._mapped, 2, shard)
        with pytest.raises(ArtifactError, match=words):
            check_pair(first, tampered)


def test_an_empty_split_is_refused(stored: Make):
    lone = stored(0, n_documents=3, held_out=0.0)
    with pytest.raises(TextError, match="has no held_out rows"):
        StackedBatches([Slot(lone, LOW), Slot(lone, HIGH)], batch_size=1, seed=0, split="held_out")


def test_the_time_spent_waiting_is_counted(stored: Make):
    store = stored(0)
    stacked = StackedBatches([Slot(store, LOW), Slot(store, HIGH)], batch_size=50, seed=0)
    assert stacked.stall_s == 0
    stacked.at(0)
    first = stacked.stall_s
    assert first > 0
    stacked.at(100)
    assert stacked.stall_s > first
