from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from activations_fake_model import HOOKS, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.activations.capture import CacheConfig, capture
from saelab.activations.loader import Batches
from saelab.activations.quantise import LARGEST, dequantised, quantised
from saelab.activations.stacked import Slot, StackedBatches
from saelab.activations.store import ActivationStore, token_bytes
from saelab.activations.text import TextConfig
from saelab.errors import ArtifactError, ConfigError

HOOK = "blocks.0.hook_resid_post"
SMALL = ["int8", "float8_e4m3fn"]
DTYPES = [torch.int8, torch.float8_e4m3fn]


def bound(acts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest error of each number, as the docstring of ``quantised`` promises it."""
    largest = acts.abs().amax(-1, keepdim=True)
    if dtype == torch.int8:
        return (largest / 254).expand_as(acts)
    return torch.maximum(acts.abs() / 16, largest / 448 / 1024)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 20), st.integers(1, 40), st.sampled_from([1.0, 3.0]))
def test_the_error_of_each_number_stays_within_its_bound(
    dtype: torch.dtype, seed: int, exponent: float, width: int, power: float
):
    noise = torch.randn(5, 3, width, generator=torch.Generator().manual_seed(seed))
    acts = noise.sign() * noise.abs() ** power * 2.0**exponent  # the higher the power, the heavier the tails
    back = dequantised(*quantised(acts, dtype))
    assert back.dtype == torch.float32
    assert ((back - acts).abs() <= bound(acts, dtype) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_are_reached(dtype: torch.dtype):
    # halfway between two steps: 0.5 of 127 for int8, 17 (between 16 and 18) of 448 for float8
    half, most = (0.5, 127.0) if dtype == torch.int8 else (17.0, 448.0)
    acts = torch.tensor([[most, half]])
    error = (dequantised(*quantised(acts, dtype)) - acts).abs()[0, 1]
    assert float(error) == pytest.approx(0.5 if dtype == torch.int8 else 1.0)
    assert float(error) <= float(bound(acts, dtype)[0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_and_the_signs_survive(dtype: torch.dtype):
    acts = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    values, scale = quantised(acts, dtype)
    assert (values.float().abs().amax(-1) == LARGEST[dtype]).all()
    mirrored = quantised(-acts, dtype)
    torch.testing.assert_close(mirrored.values.float(), -values.float(), rtol=0, atol=0)
    torch.testing.assert_close(mirrored.scale, scale, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_zeros_stay_zeros(dtype: torch.dtype):
    values, scale = quantised(torch.zeros(2, 3, 4), dtype)
    assert not dequantised(values, scale).any()
    assert scale.shape == (2, 3)
    assert not scale.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_feel_the_others(dtype: torch.dtype):
    acts = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    loud = torch.cat([acts, torch.full((1, 8), 1e6)])
    torch.testing.assert_close(dequantised(*quantised(loud, dtype))[:4], dequantised(*quantised(acts, dtype)))


# --- stores

Make = Callable[[str], ActivationStore]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("stores")
    lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}."} for i in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = TextConfig(source=str(folder / "text.jsonl"))

    def make(dtype: str) -> ActivationStore:
        if not (folder / dtype).exists():
            config = CacheConfig(
                hook_names=tuple(HOOKS), text=text, context=16, held_out=0.3, rows_per_shard=12, dtype=dtype
            )  # type: ignore[arg-type]
            capture(config, folder / dtype, model=FakeModel())
        return ActivationStore.open(folder / dtype, verify="full")

    return make


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("hook_name", list(HOOKS))
def test_a_small_store_reads_as_what_its_model_computes_within_the_bound(stored: Make, dtype: str, hook_name: str):
    store, exact = stored(dtype), stored("float32")
    rows = store.rows("all")
    acts, expected = store.acts(hook_name, rows), exact.acts(hook_name, rows)
    assert acts.dtype == torch.float32
    assert float((acts - expected).abs().max()) > 0
    assert ((acts - expected).abs() <= bound(expected, getattr(torch, dtype)) * (1 + 1e-5)).all()
    positions = np.random.default_rng(0).integers(0, store.n_rows * store.context, 300)
    torch.testing.assert_close(store.gather(hook_name, positions), acts.flatten(0, 1)[positions], rtol=0, atol=0)
    assert store.acts(hook_name, rows[:0]).shape == (0, 16, HOOKS[hook_name])


@pytest.mark.parametrize("dtype", SMALL)
def test_batches_of_a_small_store_are_near_those_of_an_exact_one(stored: Make, dtype: str):
    small, exact = (Batches(stored(name), HOOK, batch_size=64, seed=0) for name in (dtype, "float32"))
    torch.testing.assert_close(small.at(3), exact.at(3), rtol=0.07, atol=0.02)
    assert small.statistics().mean_norm == pytest.approx(exact.statistics().mean_norm, rel=0.01)
    slots = [Slot(stored(dtype), HOOK), Slot(stored("bfloat16"), HOOK)]
    stacked = StackedBatches(slots, batch_size=64, seed=0).at(3)
    torch.testing.assert_close(stacked[:, 0], small.at(3), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", SMALL)
def test_a_wide_token_takes_about_half_the_space(stored: Make, dtype: str):
    assert token_bytes("bfloat16", [576]) == 1152 + 8
    assert token_bytes(dtype, [576]) == 576 + 4 + 8  # type: ignore[arg-type]
    assert token_bytes(dtype, HOOKS.values()) == 8 + 3 * 4 + 20  # type: ignore[arg-type]
    for kind in (dtype, "bfloat16", "float32"):
        manifest = stored(kind).manifest
        n_bytes = sum(shard.bytes for shard in manifest.shards)
        header = 1000 * len(manifest.shards)
        expected = manifest.n_tokens * token_bytes(kind, HOOKS.values()) + manifest.n_rows  # type: ignore[arg-type]
        assert expected < n_bytes < expected + header


@pytest.mark.parametrize("dtype", SMALL)
def test_a_shard_without_its_scales_is_found_by_opening(stored: Make, dtype: str, tmp_path: Path):
    import shutil

    shutil.copytree(stored(dtype).path, tmp_path / "store")
    file = tmp_path / "store" / "shard_00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"scale.', b'"scare.', 1))
    with pytest.raises(ArtifactError, match=r"shard_00000.safetensors is damaged: it lacks the tensors"):
        ActivationStore.open(tmp_path / "store")


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_also_by_small_dtypes(stored: Make, dtype: str, value: float, tmp_path: Path):
    model = FakeModel()
    model.tables[HOOK][ord("t"), 3] = value
    text = stored("float32").manifest.text
    config = CacheConfig(hook_names=(HOOK,), text=text, context=16, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="hold values that are no"):
        capture(config, tmp_path / "out", model=model)


def test_an_unknown_dtype_names_those_that_there_are():
    from saelab import config as configs

    with pytest.raises(ConfigError, match=r"dtype must be one of 'bfloat16', .* 'int8', 'float8_e4m3fn', got 'int4'"):
        configs.load(CacheConfig, None, ["dtype=int4"])
