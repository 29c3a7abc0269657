from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from activations_fake_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.activations.capture import CacheConfig, capture
from saelab.activations.loader import Batches, permuted
from saelab.activations.moments import moments
from saelab.activations.permutation import mixed_key
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig
from saelab.errors import ConfigError, TextError

HOOK = "blocks.1.hook_resid_post"


# --- the permutation


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permuted_is_a_bijection(n: int, key: int):
    assert sorted(permuted(np.arange(n), n, key)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 10, 16, 17, 99, 100, 101, 65535, 65536, 65537])
def test_permuted_is_a_bijection_at_awkward_sizes(n: int):
    assert (np.bincount(permuted(np.arange(n), n, 5), minlength=n) == 1).all()


def test_each_index_goes_its_way_whatever_else_is_asked():
    whole = permuted(np.arange(1000), 1000, 3)
    some = np.array([7, 999, 0, 7])
    assert permuted(some, 1000, 3).tolist() == whole[some].tolist()


def test_huge_ranges_work_without_a_table():
    n = 10**15
    out = permuted(np.arange(1000), n, 1)
    assert len(set(out.tolist())) == 1000
    assert 0 <= out.min() < n / 100 < n * 0.99 < out.max() < n


def test_the_permutation_is_part_of_the_format():
    # a resumed run must see the order it saw before, whatever the version of numpy
    assert permuted(np.arange(10), 10, 0).tolist() == [2, 9, 0, 7, 6, 8, 3, 5, 4, 1]
    assert mixed_key(0, 1) == 3069472533636442495


def test_the_order_looks_random():
    n = 4096
    out = permuted(np.arange(n), n, 11)
    # places are uniform: chi-square of first halves' places over 16 bins, 15 degrees of freedom
    counts = np.bincount(out[: n // 2] // (n // 16), minlength=16)
    assert ((counts - n / 32) ** 2 / (n / 32)).sum() < 40
    # no correlation between index and place, between neighbours, or between two keys
    other = permuted(np.arange(n), n, 12)
    for one, two in [(np.arange(n), out), (out[:-1], out[1:]), (out, other)]:
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(n)


def test_every_order_of_four_things_occurs_about_equally_often():
    orders: dict[tuple[int, ...], int] = {}
    for key in range(24 * 20):
        order = tuple(permuted(np.arange(4), 4, mixed_key(key)).tolist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 24
    assert max(orders.values()) < 45  # 20 are expected; a weak key schedule favours some orders


# --- batches


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ActivationStore]:
    """Captures a store with some tokens of a huge norm: those of the letters given."""
    folder = tmp_path_factory.mktemp("stores")

    def make(name: str, huge: str = "") -> ActivationStore:
        if not (folder / name).exists():
            file = folder / f"{name}.jsonl"
            lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}."} for i in range(30)]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            model = FakeModel()
            for letter in huge:
                model.tables[HOOK][ord(letter)] *= 1000
            model.tables[HOOK][FakeModel.bos_id] *= 5000
            text = TextConfig(source=str(file))
            config = CacheConfig(hook_names=(HOOK,), text=text, context=16, held_out=0.3, rows_per_shard=10)
            capture(config, folder / name, model=model)
        return ActivationStore.open(folder / name)

    return make


def rows_sorted(acts: torch.Tensor) -> torch.Tensor:
    return acts[np.lexsort(acts.numpy().T)]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_epoch_visits_every_token_but_bos_once(stored: Callable[..., ActivationStore], split: str):
    store = stored("plain")
    batches = Batches(store, HOOK, batch_size=1, seed=0, split=split)  # type: ignore[arg-type]
    rows = store.rows(split)  # type: ignore[arg-type]
    assert batches.n_tokens == len(rows) * 15
    assert batches.n_outliers == 0
    expected = [row * 16 + place for row in rows for place in range(1, 16)]
    orders = []
    for epoch in range(2):
        steps = range(epoch * batches.n_tokens, (epoch + 1) * batches.n_tokens)
        orders.append(np.concatenate([batches.positions(step) for step in steps]).tolist())
        assert sorted(orders[epoch]) == expected
    assert len({tuple(order) for order in [expected, *orders]}) == 3  # each epoch has an order of its own


def test_batches_are_the_vectors_at_their_positions(stored: Callable[..., ActivationStore]):
    store = stored("plain")
    batches = Batches(store, HOOK, batch_size=64, seed=0)
    assert batches.d_in == 8
    for step in (0, 1, 2, 3, 9, 3):
        batch = batches.at(step)
        assert batch.dtype == torch.float32
        torch.testing.assert_close(batch, store.gather(HOOK, batches.positions(step)).float(), rtol=0, atol=0)


def test_batches_straddle_epochs_without_loss(stored: Callable[..., ActivationStore]):
    batches = Batches(stored("plain"), HOOK, batch_size=100, seed=0)
    n = batches.n_tokens
    sequence = np.concatenate([batches.positions(step) for step in range(3 * n // 100 + 1)])
    for epoch in range(3):
        assert len(set(sequence[epoch * n : (epoch + 1) * n])) == n


def test_a_batch_depends_on_the_step_alone(stored: Callable[..., ActivationStore]):
    store = stored("plain")
    straight = [Batches(store, HOOK, batch_size=32, seed=4).at(step) for step in range(6)]
    batches = Batches(store, HOOK, batch_size=32, seed=4)
    for step in (5, 0, 1, 2, 4, 3):
        torch.testing.assert_close(batches.at(step), straight[step], rtol=0, atol=0)
    other = Batches(store, HOOK, batch_size=32, seed=5)
    assert not torch.equal(other.at(0), straight[0])


def test_a_batch_that_the_caller_changes_is_not_handed_out_again(stored: Callable[..., ActivationStore]):
    batches = Batches(stored("plain"), HOOK, batch_size=32, seed=0)
    first = batches.at(0).clone()
    batches.at(0).zero_()
    torch.testing.assert_close(batches.at(0), first, rtol=0, atol=0)


def test_outliers_are_left_out_and_counted(stored: Callable[..., ActivationStore]):
    store = stored("huge", huge="D7")
    plain = Batches(store, HOOK, batch_size=10, seed=0, outlier_factor=None)
    batches = Batches(store, HOOK, batch_size=10, seed=0)
    train = store.tokens(store.rows("train"))[:, 1:]
    n_huge = int(((train == ord("D")) | (train == ord("7"))).sum())
    assert n_huge > 5
    assert batches.n_outliers == n_huge
    assert (plain.n_outliers, plain.norm_limit) == (0, None)
    assert batches.n_tokens == plain.n_tokens - n_huge
    seen = np.concatenate([batches.positions(step) for step in range(batches.n_tokens // 10)])
    assert len(set(seen)) == len(seen)
    tokens = store.tokens(store.rows("all")).flatten()[seen]
    assert not set(tokens.tolist()) & {ord("D"), ord("7"), FakeModel.bos_id}
    assert float(batches.statistics().mean_norm) < batches.norm_limit < plain.statistics().mean_norm


def test_too_large_a_batch_and_an_empty_split_are_refused(stored: Callable[..., ActivationStore], tmp_path: Path):
    store = stored("plain")
    with pytest.raises(ConfigError, match=r"batch_size must be between 1 and the .* train tokens"):
        Batches(store, HOOK, batch_size=10**6, seed=0)
    with pytest.raises(ConfigError, match="did you mean"):
        Batches(store, "blocks.1.hook_resid_pots", batch_size=1, seed=0)
    (tmp_path / "one.txt").write_text("one document " * 10)
    text = TextConfig(source=str(tmp_path / "one.txt"))
    lone = capture(CacheConfig(hook_names=(HOOK,), text=text, context=16), tmp_path / "lone", model=FakeModel())
    with pytest.raises(TextError, match="has no held_out rows"):
        Batches(lone, HOOK, batch_size=1, seed=0, split="held_out")


# --- statistics


def test_statistics_are_those_of_the_split_without_bos(stored: Callable[..., ActivationStore]):
    store = stored("plain")
    stats = Batches(store, HOOK, batch_size=1, seed=0).statistics()
    acts = store.acts(HOOK, store.rows("train"))[:, 1:].flatten(0, 1).double()
    assert stats.n_tokens == len(acts)
    torch.testing.assert_close(stats.mean.double(), acts.mean(0), rtol=1e-6, atol=1e-6)
    assert stats.mean_norm == pytest.approx(float(acts.norm(dim=1).mean()), rel=1e-6)
    assert stats.median_norm == pytest.approx(float(acts.norm(dim=1).median()), rel=1e-6)
    assert stats.centred_norm == pytest.approx(float((acts - acts.mean(0)).square().sum(1).mean().sqrt()), rel=1e-6)
    assert stats.gamma == pytest.approx(float(acts.mean(0).norm() / acts.std(0, correction=0).norm()), rel=1e-6)


def test_a_part_of_the_statistics_is_spread_over_the_split(stored: Callable[..., ActivationStore]):
    batches = Batches(stored("plain"), HOOK, batch_size=1, seed=0)
    whole, part = batches.statistics(), batches.statistics(120)
    assert part.n_tokens == 120
    assert whole.n_tokens == batches.n_tokens
    assert batches.statistics(10**9).n_tokens == batches.n_tokens
    assert part.mean_norm == pytest.approx(whole.mean_norm, rel=0.1)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_a_large_offset_costs_the_variance_no_digits(offset: float):
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(1000, 16, generator=generator) + offset for _ in range(5)]
    acts = torch.cat(blocks).double()
    stats = moments(blocks)
    expected = float((acts - acts.mean(0)).square().sum(1).mean().sqrt())
    assert stats.centred_norm == pytest.approx(expected, rel=1e-5)
    assert stats.gamma == pytest.approx(float(acts.mean(0).norm()) / expected, rel=1e-5)


def test_statistics_do_not_depend_on_the_blocks():
    acts = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    one, many = moments([acts]), moments([acts[:0], *acts.split(7)])
    assert one.n_tokens == many.n_tokens
    torch.testing.assert_close(one.mean, many.mean)
    assert one.centred_norm == pytest.approx(many.centred_norm, rel=1e-6)


def test_constant_activations_have_no_spread():
    stats = moments([torch.ones(5, 3)])
    assert (stats.centred_norm, stats.gamma) == (0.0, math.inf)


def test_no_tokens_have_no_statistics():
    with pytest.raises(TextError, match="no tokens"):
        moments([torch.empty(0, 3)])
