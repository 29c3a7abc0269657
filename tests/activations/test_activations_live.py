from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from activations_fake_model import FakeModel

from saelab.activations.capture import CacheConfig, capture
from saelab.activations.live import LiveBatches
from saelab.activations.loader import Batches
from saelab.activations.text import TextConfig
from saelab.errors import ArtifactError, ConfigError, TextError

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def config(tmp_path: Path) -> CacheConfig:
    lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}."} for i in range(30)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = TextConfig(source=str(tmp_path / "text.jsonl"))
    return CacheConfig(hook_names=(HOOK,), text=text, context=16, held_out=0.3, dtype="float32", batch_rows=4)


def live(config: CacheConfig, model: FakeModel | None = None, **changes: object) -> LiveBatches:
    settings = {"batch_size": 20, "seed": 0, "chunk_rows": 8} | changes
    return LiveBatches(model or FakeModel(), config, HOOK, **settings)  # type: ignore[arg-type]


def in_order(acts: torch.Tensor) -> torch.Tensor:
    return acts[np.lexsort(acts.numpy().T)]


def test_one_pass_gives_the_training_tokens_of_the_store(config: CacheConfig, tmp_path: Path):
    store = capture(config, tmp_path / "out", model=FakeModel())
    rows = store.rows("train")
    n_chunks = len(rows) // 8
    assert n_chunks > 2
    batches = live(config, outlier_factor=None)
    assert batches.n_tokens == len(rows) * 15
    seen = torch.cat([batches.at(step) for step in range(n_chunks * 8 * 15 // 20)])
    expected = store.acts(HOOK, rows[: n_chunks * 8])[:, 1:].flatten(0, 1)
    torch.testing.assert_close(in_order(seen), in_order(expected), rtol=0, atol=0)
    assert not torch.equal(seen, expected)


def test_each_chunk_is_captured_once_when_steps_increase(config: CacheConfig):
    model = FakeModel()
    batches = live(config, model)
    for step in range(12):  # 240 tokens: two chunks of 120
        batches.at(step)
    assert model.n_forwards == 2 * 2


def test_a_batch_depends_on_the_step_alone(config: CacheConfig):
    straight = live(config)
    expected = [straight.at(step) for step in range(40)]  # several passes over the text
    for step in (39, 0, 17, 5, 6, 38):
        torch.testing.assert_close(live(config).at(step), expected[step], rtol=0, atol=0)
        torch.testing.assert_close(straight.at(step), expected[step], rtol=0, atol=0)
    assert not torch.equal(live(config, seed=1).at(0), expected[0])


def test_batches_straddle_chunks(config: CacheConfig):
    small, large = live(config, batch_size=10), live(config, batch_size=70)
    expected = torch.cat([small.at(step) for step in range(14)])
    torch.testing.assert_close(torch.cat([large.at(0), large.at(1)]), expected, rtol=0, atol=0)


def test_outliers_are_replaced_and_counted(config: CacheConfig):
    model = FakeModel()
    model.tables[HOOK][ord("D")] *= 1000
    batches = live(config, model, batch_size=120)
    batch = batches.at(0)
    assert batch.shape == (120, 8)
    assert batches.n_outliers > 0
    assert float(batch.norm(dim=1).max()) < 100
    assert batches.statistics().n_tokens == 120 - batches.n_outliers


def test_statistics_agree_with_those_of_a_store(config: CacheConfig, tmp_path: Path):
    store = capture(config, tmp_path / "out", model=FakeModel())
    stored = Batches(store, HOOK, batch_size=1, seed=0).statistics()
    batches = live(config, chunk_rows=len(store.rows("train")))
    assert batches.statistics().n_tokens == stored.n_tokens
    torch.testing.assert_close(batches.statistics().mean, stored.mean)
    assert batches.statistics().centred_norm == pytest.approx(stored.centred_norm, rel=1e-6)
    assert live(config).statistics(200).n_tokens == 240


def test_statistics_leave_the_first_chunk_ready(config: CacheConfig):
    model = FakeModel()
    batches = live(config, model)
    batches.statistics(200)
    batches.at(0)
    assert model.n_forwards == 2 * 2


def test_bad_settings_and_text_without_training_rows_are_refused(config: CacheConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match="raise chunk_rows"):
        live(config, batch_size=121)
    (tmp_path / "text.jsonl").write_text("")
    with pytest.raises(TextError, match="gives no training row"):
        live(config).at(0)


# --- reading ahead


def test_reading_ahead_changes_no_batch_and_captures_no_chunk_more(config: CacheConfig):
    model, straight = FakeModel(), live(config)
    batches = live(config, model, n_steps=18)  # 360 tokens: three chunks of 120, two forward passes each
    for step in range(18):
        torch.testing.assert_close(batches.at(step), straight.at(step), rtol=0, atol=0)
    batches._chunks._thread.shutdown()
    assert model.n_forwards == 3 * 2
    assert batches.n_outliers == straight.n_outliers


def test_the_next_chunk_is_captured_while_the_caller_works(config: CacheConfig):
    def waited(n_steps: int | None) -> float:
        batches = live(config, FakeModel(seconds_per_forward=0.05), n_steps=n_steps)
        for step in range(18):
            batches.at(step)
            time.sleep(0.04)  # a chunk takes 6 steps, 0.24 s, and its capture 0.1 s
        return batches.stall_s

    alone, ahead = waited(None), waited(18)
    assert alone > 0.3
    assert ahead < 0.6 * alone  # the first chunk has to be waited for, the two others come meanwhile


def test_closing_stops_the_capture_ahead(config: CacheConfig):
    model = FakeModel(seconds_per_forward=0.02)
    batches = live(config, model, n_steps=10**6, chunk_rows=80)
    batches.at(0)
    n_forwards = model.n_forwards
    batches.close()
    batches._chunks._thread.shutdown()  # as the end of the process does
    assert model.n_forwards <= n_forwards + 2


def test_an_error_in_the_background_reaches_the_caller(config: CacheConfig):
    model = FakeModel(seconds_per_forward=0.02)
    batches = live(config, model, n_steps=18)
    batches.at(0)
    model.tables[HOOK][:] = torch.nan  # while the second chunk is captured, or before
    with pytest.raises(ArtifactError, match="hold values that are no float32 numbers"):
        for step in range(18):
            batches.at(step)
