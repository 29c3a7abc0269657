from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from saelab import config as configs
from saelab import rundir
from saelab.activations.capture import capture
from saelab.activations.settings import CacheConfig
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig
from saelab.errors import ConfigError
from saelab.models.load import load_model
from saelab.models.tiny import write_tiny_model
from saelab.sae.architectures import CONFIG_OF, new_sae
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.plan import (
    Timing,
    measured_model,
    measured_step,
    memory_bytes,
    memory_bytes_together,
    plan_capture,
    plan_training,
    text_size,
    training_disk,
    training_memory,
)

HOOK = "blocks.1.hook_resid_post"
WIDTH = 256


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "wide", n_layers=2, d_model=WIDTH, n_heads=4)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "counting.txt"
    paragraphs = (" ".join(f"{i * 7919 % 9973} and the {i * j % 89} of" for j in range(60)) for i in range(300))
    file.write_text("\n\n".join(paragraphs), "utf-8")
    return file


def cache_config(model_dir: Path, text_file: Path, tokens: int, **settings: object) -> CacheConfig:
    return CacheConfig(
        model=str(model_dir), hook_names=(HOOK,), text=TextConfig(source=str(text_file)), tokens=tokens, **settings
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    config = cache_config(model_dir, text_file, 40_000, rows_per_shard=64)
    return capture(config, tmp_path_factory.mktemp("runs") / "mine" / "activations")


def of(parts: tuple, name: str) -> int:
    return sum(part.n_bytes for part in parts if part.name == name)


def bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("arch", sorted(CONFIG_OF))
def test_weights_and_adam_are_counted_exactly(arch: str):
    config = TrainConfig(sae=CONFIG_OF[arch](d_sae=64), tokens=1000, batch_size=100)
    sae = new_sae(config.sae, d_in=16)
    n_bytes = sum(4 * parameter.numel() for parameter in sae.parameters())
    memory = training_memory(config, 16)
    assert of(memory, "weights") == n_bytes
    assert of(memory, "Adam's two moments") == 2 * n_bytes
    assert memory_bytes(config, 16) == sum(part.n_bytes for part in memory)


def test_a_dense_step_has_gradients_and_a_weight_average_counts():
    sparse = TrainConfig(sae=TopKConfig(d_sae=4096, k=8), tokens=1000, batch_size=100)
    dense = TrainConfig(sae=ReLUConfig(d_sae=4096), tokens=1000, batch_size=100)
    averaged = TrainConfig(sae=TopKConfig(d_sae=4096, k=8), tokens=1000, batch_size=100, ema_decay=0.99)
    weights = of(training_memory(sparse, 64), "weights")
    assert of(training_memory(sparse, 64), "gradients") == 0
    assert of(training_memory(dense, 64), "gradients") == weights
    assert memory_bytes(averaged, 64) - memory_bytes(sparse, 64) == weights
    assert training_disk(averaged, 64) == training_disk(sparse, 64)  # no checkpoint is due


def test_opening_a_huge_store_may_take_more_than_training_on_it():
    config = TrainConfig(sae=TopKConfig(d_sae=64, k=8), tokens=1000, batch_size=100)
    names = {part.name for part in training_memory(config, 16, n_tokens=10**9)}
    assert names == {"Python and libraries", "norms of all activations"}


def test_steps_passes_and_half_the_width_are_told():
    config = TrainConfig(sae=TopKConfig(d_sae=4096, k=8), tokens=100_000, batch_size=1000)
    plan = plan_training(config, 64, n_tokens=25_000, step=Timing(0.1, 0.05, 0.2, 5))
    assert (plan.n_tokens, plan.n_steps, plan.passes) == (100_000, 100, 4.0)
    assert plan.seconds == Timing(pytest.approx(10), pytest.approx(5), pytest.approx(20), 5)
    (half,) = plan.cheaper
    assert half.memory_bytes is not None
    assert half.memory_bytes < plan.memory_bytes
    assert half.seconds == pytest.approx(5)
    narrowest = TrainConfig(sae=TopKConfig(d_sae=8, k=8), tokens=1000, batch_size=100)
    assert plan_training(narrowest, 64).cheaper == ()


def test_the_disk_of_a_capture_is_foreseen(model_dir: Path, text_file: Path, store: ActivationStore):
    config = cache_config(model_dir, text_file, 40_000, rows_per_shard=64)
    plan = plan_capture(config, [WIDTH])
    assert plan.n_tokens == store.manifest.n_tokens
    assert bytes_under(store.path) == pytest.approx(plan.disk_bytes, rel=0.02)
    eighths = next(other for other in plan.cheaper if "int8" in other.change)
    assert eighths.disk_bytes == pytest.approx(plan.disk_bytes / 2, rel=0.05)


def test_a_text_that_ends_early_is_noticed(model_dir: Path, text_file: Path, tmp_path: Path):
    model = load_model(model_dir, device="cpu")
    config = cache_config(model_dir, text_file, 10_000_000, held_out=0.0)
    size = text_size(config, model)
    assert size.exhausted
    written = capture(config, tmp_path / "activations", model=model)
    assert written.manifest.n_tokens == pytest.approx(size.n_tokens, rel=0.02)
    enough = text_size(cache_config(model_dir, text_file, 10_000), model)
    assert not enough.exhausted


def test_time_is_measured_on_real_steps_and_forward_passes(model_dir: Path, text_file: Path):
    config = TrainConfig(sae=ReLUConfig(d_sae=128), tokens=100_000, batch_size=256)
    step = measured_step(config, 32, device="cpu", budget_s=0.2)
    assert 0 < step.low <= step.median <= step.high
    assert step.n >= 3
    running = measured_model(load_model(model_dir, device="cpu"), cache_config(model_dir, text_file, 10_000), n=2)
    assert running.token.low > 0
    assert running.weights_bytes > 0
    live = TrainConfig(
        sae=ReLUConfig(d_sae=128), tokens=1024, batch_size=256, live=cache_config(model_dir, text_file, 10_000)
    )
    both = plan_training(live, WIDTH, step=step, running=running).seconds
    assert both is not None
    assert both.median == pytest.approx(4 * step.median + 1024 * 128 / 127 * running.token.median)


def peak_memory(log: Path, *arguments: object) -> int:
    """Largest memory, files not counted, of a saelab process."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", "saelab", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    status, highest = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        line = next((line for line in status.read_text().splitlines() if line.startswith("RssAnon:")), None)
        highest = max(highest, 1024 * int(line.split()[1]) if line else 0)
        time.sleep(0.005)
    assert process.returncode == 0, log.read_text()
    return highest


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@needs_proc
@pytest.mark.long
@pytest.mark.parametrize(
    ("arch", "d_sae", "settings"),
    [
        ("topk", 16384, ["--k", 32]),
        ("batchtopk", 8192, ["--k", 32, "--set", "ema_decay=0.99"]),
        ("relu", 8192, []),
        ("jumprelu", 8192, []),
    ],
)
def test_memory_and_disk_of_a_training_are_foreseen(store, tmp_path: Path, arch: str, d_sae: int, settings: list):
    # no feature dies within so few steps: reviving them takes memory that depends on their number
    arguments = ["--arch", arch, "--d-sae", d_sae, "--tokens", 12_000, "--set", "batch_size=2000", *settings]
    arguments += ["--set", "checkpoint_every=2", "--set", "dead_after_tokens=1000000"]
    out = tmp_path / "sae"
    highest = peak_memory(
        tmp_path / "log", "train", store.path, *arguments, "--set", "checkpoint_every=2", "--out", out
    )
    config = configs.from_mapping(TrainConfig, rundir.read_run(out, "sae")["config"])
    plan = plan_training(config, WIDTH, n_tokens=35_000)
    print(f"{arch}: {highest / 1e6:.0f} MB, foreseen {plan.memory_bytes / 1e6:.0f} MB")
    print(f"{arch}: {bytes_under(out) / 1e6:.1f} MB on disk, foreseen {plan.disk_bytes / 1e6:.1f} MB")
    assert bytes_under(out) == pytest.approx(plan.disk_bytes, rel=0.02)
    assert highest == pytest.approx(plan.memory_bytes, rel=0.2)


@needs_proc
@pytest.mark.long
def test_memory_of_a_capture_is_foreseen(model_dir: Path, text_file: Path, tmp_path: Path):
    out = tmp_path / "activations"
    arguments = ["--model", model_dir, "--text", text_file, "--hook", HOOK, "--tokens", 80_000]
    highest = peak_memory(tmp_path / "log", "cache", *arguments, "--out", out)
    config = cache_config(model_dir, text_file, 80_000)
    running = measured_model(load_model(model_dir, device="cpu"), config)
    plan = plan_capture(config, [WIDTH], running=running)
    print(f"capture: {highest / 1e6:.0f} MB, foreseen {plan.memory_bytes / 1e6:.0f} MB")
    assert highest == pytest.approx(plan.memory_bytes, rel=0.2)


def test_a_shape_larger_than_the_machine_is_refused_before_it_is_tried(store: ActivationStore):
    from saelab.cli.plan import _refuse_too_large

    config = TrainConfig(sae=TopKConfig(d_sae=10**9, k=32), tokens=100_000, batch_size=1000)
    with pytest.raises(ConfigError, match="of memory, but the machine has"):
        _refuse_too_large(plan_training(config, 4096))


def test_several_trainings_in_one_process_count_its_libraries_once():
    config = TrainConfig(sae=TopKConfig(d_sae=64, k=4), tokens=2048)
    alone = memory_bytes(config, 16)
    assert memory_bytes_together([config], 16) == alone
    assert alone < memory_bytes_together([config, config], 16) < 2 * alone
