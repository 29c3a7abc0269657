"""Features spread over processes: the same SAE as one process trains, and checkpoints that any number of them reads."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import results, together
from mixtures import BATCH, D_IN, Mixtures, config_of

from saelab import atomic, dist, rundir
from saelab import config as configs
from saelab.errors import ArtifactError, ConfigError
from saelab.metrics import TIMINGS
from saelab.sae.base import Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.io import load_sae
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopK, TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.loop import train_sae
from saelab.train.parallel import portion, stage_of
from saelab.train.sharded import FeatureShard, FeatureSharded, kept_of_shards, layout_of, shard_range, topk_of_shards
from saelab.train.sharded_checkpoint import AnyCheckpoints, named_in_pickle
from saelab.train.trainer import Trainer

K = 3


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def top_ids(mesh: dist.Mesh, trainer: Trainer, acts: torch.Tensor) -> torch.Tensor:
    """The features that a TopK SAE keeps for each token, ascending: of the whole dictionary, before the ReLU."""
    sae, acts = trainer.sae, trainer.normalise(acts)
    if isinstance(sae, TopK):
        return sae.pre_acts(acts).sort(dim=1, descending=True, stable=True).indices[:, :K]
    assert isinstance(sae, FeatureShard)
    rows = sae.rows()
    active = topk_of_shards(acts - rows.b_dec, rows.W_enc, rows.b_enc, K, mesh.features)
    here = torch.zeros(len(acts), sae.cfg.d_sae)
    here[active.tokens, active.features + sae.mine.start] = 1.0
    return mesh.features.sum(here).nonzero()[:, 1].view(len(acts), K)


def trained(mesh: dist.Mesh, sae: TopKConfig | BatchTopKConfig, n_steps: int = 25) -> dict:
    batches = portion(Mixtures(), mesh.data)
    trainer = Trainer(config_of(sae), batches, "cpu", layout_of(mesh, sae))
    curve, ids = [], []
    for step in range(n_steps):
        if sae.arch == "topk" and mesh.data.size == 1:
            ids.append(top_ids(mesh, trainer, batches.at(step)).sort(1).values)
        losses = trainer.advance(batches.at(step))
        curve.append([*(float(part) for part in (*losses[:4], losses.l0)), trainer.grad_norm])
    density = trainer.density(batches, 3)
    whole = trainer.layout.whole(trainer.sae)
    weights = {name: value.detach() for name, value in whole.state_dict().items()} if mesh.is_first else {}
    silent = trainer.dead.silent_tokens
    return {"curve": torch.tensor(curve), "ids": ids, "weights": weights, "silent": silent, "density": density}


def check_equal(found: dict, expected: dict) -> None:
    assert (found["curve"] - expected["curve"]).abs().max() < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(found["ids"], expected["ids"], strict=True))
    assert torch.equal(found["silent"], expected["silent"])
    assert torch.equal(found["density"], expected["density"])
    for name, value in found["weights"].items():
        assert value.shape == expected["weights"][name].shape
        assert (value - expected["weights"][name]).abs().max() < 1e-12, name


def trained_each(mesh: dist.Mesh, some: list) -> list[dict]:
    return [trained(mesh, sae) for sae in some]


# 51 and 515 do not divide by two; a small k_aux makes shards compete for the dead features that are revived
WITH_AUX = [
    TopKConfig(d_sae=51, k=K), TopKConfig(d_sae=515, k=K, k_aux=4), BatchTopKConfig(d_sae=51, k=K, k_aux=2)
]  # fmt: skip


def test_two_shards_equal_one_process_uneven_ones_too(float64: None, tmp_path: Path):
    for found in results(together(2, tmp_path, trained_each, WITH_AUX, feature_shards=2)):
        for sae, one in zip(WITH_AUX, found, strict=True):
            expected = trained(dist.ONE_PROCESS, sae)
            assert expected["curve"][:, 3].any()  # AuxK had work to do
            check_equal(one, expected)


@pytest.mark.long
@pytest.mark.parametrize(("n", "shards"), [(3, 3), (4, 4), (4, 2), (6, 3)])
def test_more_shards_and_meshes_equal_one_process(float64: None, tmp_path: Path, n: int, shards: int):
    some = WITH_AUX if BATCH % (n // shards) == 0 else []
    for found in results(together(n, tmp_path, trained_each, some, feature_shards=shards)):
        for sae, one in zip(some, found, strict=True):
            expected = trained(dist.ONE_PROCESS, sae)
            check_equal(one, expected | ({"ids": []} if n > shards else {}))


def ties_and_bits(mesh: dist.Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Global ids of the 8 largest: of integers, thousands of which are equal, and of float32 products."""
    numbers = torch.randint(0, 4, (64, 96), generator=torch.Generator().manual_seed(3)).float()
    mine = numbers.chunk(mesh.features.size, dim=1)[mesh.features.rank]
    values, places = mine.sort(dim=1, descending=True, stable=True)
    kept = kept_of_shards(values[:, :8], 8, 8, mesh.features)
    chosen = torch.zeros(64, 96, dtype=torch.int64)
    start = mesh.features.rank * mine.shape[1]
    chosen.scatter_(1, places[:, :8] + start, kept.long())
    generator = torch.Generator().manual_seed(4)
    acts, W = torch.randn(64, 32, generator=generator), torch.randn(96, 32, generator=generator)
    W = W.chunk(mesh.features.size)[mesh.features.rank]
    active = topk_of_shards(acts, W, torch.zeros(len(W)), 8, mesh.features)
    pre_acts = torch.zeros(64, 96)
    pre_acts[active.tokens, active.features + start] = active.acts
    return mesh.features.sum(chosen), mesh.features.sum(pre_acts)


def test_of_equal_pre_activations_the_lowest_features_are_kept_whoever_has_them(tmp_path: Path):
    numbers = torch.randint(0, 4, (64, 96), generator=torch.Generator().manual_seed(3)).float()
    best = numbers.sort(dim=1, descending=True, stable=True).indices[:, :8]
    expected = torch.zeros(64, 96, dtype=torch.int64).scatter_(1, best, 1)
    alone = ties_and_bits(dist.ONE_PROCESS)
    assert torch.equal(alone[0], expected)
    for shards in (2, 3):
        for chosen, pre_acts in results(together(shards, tmp_path / str(shards), ties_and_bits, feature_shards=shards)):
            assert torch.equal(chosen, expected)
            assert torch.equal(pre_acts, alone[1])  # float32, to the bit
    assert not torch.equal(numbers.topk(8).indices.sort(1).values, best.sort(1).values)  # which torch does not promise


def traffic(mesh: dist.Mesh, sae: TopKConfig) -> list[int]:
    batches = portion(Mixtures(), mesh.data)
    trainer = Trainer(config_of(sae, dead_after_tokens=10**6), batches, "cpu", layout_of(mesh, sae))
    before = mesh.features.n_bytes
    for step in range(3):
        trainer.advance(batches.at(step))
    return (mesh.features.n_bytes - before) // 3


def test_what_is_sent_in_a_step_does_not_grow_with_pre_activations(tmp_path: Path):
    for d_sae in (64, 512):
        for sent in results(together(2, tmp_path, traffic, TopKConfig(d_sae=d_sae, k=K), feature_shards=2)):
            # candidates, reconstruction, the shared bias's gradient, and how often each feature fired
            assert sent == 4 * (BATCH * K + BATCH * D_IN + D_IN + d_sae // 2)
            assert sent < 4 * BATCH * d_sae // 2 or d_sae == 64


def run(
    mesh: dist.Mesh, path: Path, config: TrainConfig, progress: Callable[[int, int, str], None] | None = None
) -> None:
    """A whole training in ``path``, begun or continued."""

    def begin() -> rundir.StageWriter:
        if (path / "run.json").exists():
            return rundir.StageWriter.resume(path, stage="sae")
        return rundir.StageWriter.create(path, stage="sae", config=configs.to_mapping(config))

    batches = portion(Mixtures(), mesh.data)
    with stage_of(mesh, path, begin) as stage:
        layout = layout_of(mesh, config.sae)
        train_sae(config, batches, stage, metadata=Metadata(), progress=progress, layout=layout)


CONFIG = config_of(BatchTopKConfig(d_sae=48, k=K), ema_decay=0.9)


def killed_at(path: Path, step: int, rank: int) -> Callable[[dist.Mesh], None]:
    def work(mesh: dist.Mesh) -> None:
        def progress(done: int, total: int, detail: str) -> None:
            if done == step and mesh.world.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)

        run(mesh, path, CONFIG, progress)

    return work


def outcome(path: Path) -> tuple[list[str], list[dict]]:
    """Hashes of the SAE and the log, without the clock."""
    hashes = [atomic.sha256(path / f"{name}.safetensors") for name in ("sae_weights", "sparsity")]
    return hashes, [{k: v for k, v in line.items() if k not in TIMINGS} for line in rundir.read_metrics(path)]


def disturbed_equals_undisturbed(tmp_path: Path, kills: list[tuple[int, int]]) -> None:
    results(together(2, tmp_path / "said", run, tmp_path / "whole", CONFIG, feature_shards=2))
    for number, (step, rank) in enumerate(kills):
        endings = together(2, tmp_path / str(number), killed_at(tmp_path / "sae", step, rank), feature_shards=2)
        assert endings[rank].status == -signal.SIGKILL
        assert endings[1 - rank].status == 2
    results(together(2, tmp_path / "said", run, tmp_path / "sae", CONFIG, feature_shards=2))
    assert outcome(tmp_path / "sae") == outcome(tmp_path / "whole")
    assert not [p for p in (tmp_path / "sae").rglob("*.part-*") if p.is_dir()]


def test_a_killed_and_resumed_run_ends_with_the_same_bytes(tmp_path: Path):
    disturbed_equals_undisturbed(tmp_path, [(7, 0), (23, 1)])


@pytest.mark.long
def test_twenty_kills_at_random_steps_change_nothing(tmp_path: Path):
    rng = random.Random(0)
    steps = sorted(rng.sample(range(1, 38), 20))
    disturbed_equals_undisturbed(tmp_path, [(step, rng.randrange(2)) for step in steps])


def test_the_finished_sae_opens_and_is_the_one_of_one_process(float64: None, tmp_path: Path):
    results(together(2, tmp_path / "said", run, tmp_path / "two", CONFIG, feature_shards=2))
    run(dist.ONE_PROCESS, tmp_path / "one", CONFIG)
    two, one = load_sae(tmp_path / "two"), load_sae(tmp_path / "one")
    for name, value in one.state_dict().items():
        # 1e-6: the running mean of the weights is kept in float32
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=1e-6)


def stopped_at_20(mesh: dist.Mesh, path: Path) -> dict[str, torch.Tensor]:
    """Train 20 steps, save, and train on; the weights at the end."""
    config = replace(CONFIG, ema_decay=None)
    layout, batches = layout_of(mesh, config.sae), portion(Mixtures(), mesh.data)
    trainer = Trainer(config, batches, "cpu", layout)
    for step in range(20):
        trainer.advance(batches.at(step))
    layout.checkpoints(path, keep_every=None).save(20, trainer.tensors(), {"config": {}})
    return _to_the_end(mesh, trainer, batches)


def continued(mesh: dist.Mesh, path: Path) -> dict[str, torch.Tensor]:
    config = replace(CONFIG, ema_decay=None)
    layout, batches = layout_of(mesh, config.sae), portion(Mixtures(), mesh.data)
    trainer = Trainer(config, batches, "cpu", layout)
    saved = layout.checkpoints(path, keep_every=None).latest()
    assert saved is not None
    trainer.restore(saved)
    assert saved.state == {"config": {}}
    return _to_the_end(mesh, trainer, batches)


def _to_the_end(mesh: dist.Mesh, trainer: Trainer, batches: Mixtures) -> dict[str, torch.Tensor]:
    for step in range(20, 30):
        trainer.advance(batches.at(step))
    whole = trainer.layout.whole(trainer.sae)
    return {name: value.detach() for name, value in whole.state_dict().items()} if mesh.is_first else {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of two shards, float64, and the weights ten steps later."""
    path = tmp_path_factory.mktemp("saved")
    torch.set_default_dtype(torch.float64)
    try:
        weights, _ = results(together(2, path / "said", stopped_at_20, path / "checkpoints", feature_shards=2))
    finally:
        torch.set_default_dtype(torch.float32)
    return path / "checkpoints", weights


@pytest.mark.parametrize(
    ("n", "shards"),
    [(1, 1), (3, 3), (4, 4), *(pytest.param(*mesh, marks=pytest.mark.long) for mesh in ((2, 1), (4, 2)))],
)
def test_a_checkpoint_of_two_shards_continues_on_any_number(
    float64: None, tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]], n: int, shards: int
):
    path, expected = saved
    if n == 1:
        weights = continued(dist.ONE_PROCESS, path)
    else:
        weights = results(together(n, tmp_path, continued, path, feature_shards=shards))[0]
    assert weights.keys() == expected.keys()
    assert all((weights[name] - value).abs().max() < 1e-12 for name, value in expected.items())


def test_a_checkpoint_of_one_process_continues_on_shards(float64: None, tmp_path: Path):
    expected = stopped_at_20(dist.ONE_PROCESS, tmp_path / "checkpoints")
    weights, _ = results(together(2, tmp_path / "said", continued, tmp_path / "checkpoints", feature_shards=2))
    assert all((weights[name] - value).abs().max() < 1e-12 for name, value in expected.items())


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "__1_0.distcp", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused(saved: tuple[Path, dict], tmp_path: Path, file: str, damage: str):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step_000000020" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1] if file != "state.json" else data[:-3])
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match="is damaged"):
        AnyCheckpoints(tmp_path / "checkpoints").latest()


def test_damage_that_one_process_sees_is_told_by_all(saved: tuple[Path, dict], tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step_000000020" / "__1_0.distcp").write_bytes(b"")
    endings = together(2, tmp_path / "said", continued, tmp_path / "checkpoints", feature_shards=2)
    assert [ending.status for ending in endings] == [2, 2]
    assert sum("is damaged (its checksum differs)" in ending.said for ending in endings) == 1


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_metadata_file_with_code_in_it_is_refused_and_not_run(
    saved: tuple[Path, dict], tmp_path: Path, protocol: int
):
    folder = tmp_path / "checkpoints" / "step_000000020"
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "canary"), protocol))
    state = json.loads((folder / "state.json").read_text())
    state["sha256"][".metadata"] = atomic.sha256(folder / ".metadata")  # its author knows how to hash
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ArtifactError, match=r"\.metadata would run .* when read"):
        AnyCheckpoints(tmp_path / "checkpoints").latest()
    assert not (tmp_path / "canary").exists()


def test_names_hidden_from_a_pickles_reader_are_not_passed_over():
    honest = pickle.dumps(torch.Size([3]), 4)
    assert named_in_pickle(honest) == ["torch Size"]
    # the strings of STACK_GLOBAL behind a value that is popped again, and behind the memo
    popped = b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x05torch0\x93."
    assert named_in_pickle(popped) != ["system torch"]
    assert "?" in named_in_pickle(popped)
    duplicated = b"\x80\x04\x8c\x02os2\x93."
    assert "?" in named_in_pickle(duplicated)


def test_other_files_than_those_written_are_refused(saved: tuple[Path, dict], tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step_000000020" / "__9_0.distcp").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="is damaged"):
        AnyCheckpoints(tmp_path / "checkpoints").latest()


class Pair(dist.Alone):
    size = 2


def test_what_cannot_be_sharded_is_refused():
    mesh = dist.ONE_PROCESS._replace(world=Pair(), features=Pair())
    with pytest.raises(
        ConfigError, match=r"--feature-shards does not know architecture 'relu': only topk and batchtopk"
    ):
        FeatureSharded(mesh, ReLUConfig(d_sae=48))
    with pytest.raises(ConfigError, match=r"1 features on 2 processes leave some without any; lower --feature-shards"):
        FeatureSharded(mesh, TopKConfig(d_sae=1, k=1))


def test_shards_are_cut_as_torch_cuts_them():
    for n_features, n_shards in ((515, 2), (10, 4), (12, 3), (9, 8)):
        ranges = [shard_range(n_features, rank, n_shards) for rank in range(n_shards)]
        chunks = [list(chunk) for chunk in torch.arange(n_features).chunk(n_shards)]
        assert [list(some) for some in ranges if len(some)] == chunks
