"""Several processes that share the tokens of each batch do what one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import Ending, results, together
from mixtures import D_IN, Mixtures, Pairs, config_of

from saelab import atomic, dist, rundir
from saelab import config as configs
from saelab.errors import ConfigError, SaelabError
from saelab.metrics import TIMINGS
from saelab.sae.abstopk import AbsTopKConfig
from saelab.sae.architectures import CONFIG_OF, new_sae
from saelab.sae.base import Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.crosscoder import CrosscoderConfig
from saelab.sae.gated import GatedConfig
from saelab.sae.groupmax import GroupMaxConfig
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.matching_pursuit import MatchingPursuitConfig
from saelab.sae.matryoshka import MatryoshkaConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.spread import largest_of_batch, nth_largest, total_variance
from saelab.sae.topk import TopKConfig
from saelab.sae.transcoder import TranscoderConfig
from saelab.train.config import TrainConfig
from saelab.train.loop import train_sae
from saelab.train.parallel import DATA_PARALLEL, check_divisible, portion, stage_of
from saelab.train.sharded import layout_of
from saelab.train.trainer import Trainer
from saelab_kernels import encode_batchtopk

D_SAE, K = 51, 3
ARCHITECTURES = [
    ReLUConfig(d_sae=D_SAE, l1_coefficient=0.05),
    GatedConfig(d_sae=D_SAE),
    TopKConfig(d_sae=D_SAE, k=K),
    AbsTopKConfig(d_sae=D_SAE, k=K),
    BatchTopKConfig(d_sae=D_SAE, k=K),
    JumpReLUConfig(d_sae=D_SAE),
    JumpReLUConfig(d_sae=D_SAE, penalty="quadratic", target_l0=4.0),
    MatryoshkaConfig(d_sae=D_SAE, k=K),
    MatryoshkaConfig(d_sae=D_SAE, k=K, random_prefixes=3),
    MatchingPursuitConfig(d_sae=D_SAE),
    GroupMaxConfig(d_sae=D_SAE, k=K),
    TranscoderConfig(d_sae=D_SAE, k=K),
    TranscoderConfig(d_sae=D_SAE, k=K, activation="batchtopk"),
    TranscoderConfig(d_sae=D_SAE, k=K, activation="relu"),
    CrosscoderConfig(d_sae=D_SAE, k=K),
    CrosscoderConfig(d_sae=D_SAE, sparsity="l1"),
]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(mesh: dist.Mesh, sae: object, n_steps: int = 25) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """The curve, the weights and the counters of silence after some steps."""
    data = Pairs() if sae.arch in ("transcoder", "crosscoder") else Mixtures()  # type: ignore[attr-defined]
    batches = portion(data, mesh.data)
    trainer = Trainer(config_of(sae), batches, "cpu", layout_of(mesh, sae))  # type: ignore[arg-type]
    curve = []
    for step in range(n_steps):
        losses = trainer.advance(batches.at(step))
        curve.append([*(float(part) for part in (*losses[:4], losses.l0)), trainer.grad_norm])
    weights = {name: value.detach() for name, value in trainer.sae.state_dict().items()}
    return torch.tensor(curve), weights, trainer.dead.silent_tokens


def trained_each(mesh: dist.Mesh, some: list) -> list[tuple[torch.Tensor, dict, torch.Tensor]]:
    return [trained(mesh, sae, n_steps=15) for sae in some]


def check_two_equal_one(some: list, tmp_path: Path, *, n_revived: int) -> None:
    first, second = results(together(2, tmp_path, trained_each, some))
    revived = 0
    for sae, (curve, weights, silent), (_, others, _) in zip(some, first, second, strict=True):
        alone, expected, silent_alone = trained(dist.ONE_PROCESS, sae, n_steps=15)
        assert (curve - alone).abs().max() < 1e-12, sae
        assert torch.equal(silent, silent_alone), sae
        for name, value in expected.items():
            assert (weights[name] - value).abs().max() < 1e-12, (sae, name)
            assert torch.equal(weights[name], others[name]), (sae, name)
        revived += bool(curve[:, 3].any())
    assert revived == n_revived  # AuxK had work to do


def test_two_processes_equal_one(float64: None, tmp_path: Path):
    some = [sae for sae in ARCHITECTURES if sae.arch in ("relu", "topk", "batchtopk")]
    check_two_equal_one(some, tmp_path, n_revived=2)


@pytest.mark.long
def test_two_processes_equal_one_whatever_the_architecture(float64: None, tmp_path: Path):
    check_two_equal_one(ARCHITECTURES, tmp_path, n_revived=9)
    assert {sae.arch for sae in ARCHITECTURES} == set(DATA_PARALLEL)


@pytest.mark.long
def test_four_processes_equal_one(float64: None, tmp_path: Path):
    alone, expected, _ = trained(dist.ONE_PROCESS, BatchTopKConfig(d_sae=D_SAE, k=K))
    for curve, weights, _ in results(together(4, tmp_path, trained, BatchTopKConfig(d_sae=D_SAE, k=K))):
        assert (curve - alone).abs().max() < 1e-12
        assert all((weights[name] - value).abs().max() < 1e-12 for name, value in expected.items())


def test_an_architecture_whose_loss_couples_tokens_is_refused():
    class Two(dist.Alone):
        size = 2

    mesh = dist.ONE_PROCESS._replace(world=Two(), data=Two())
    refused = set(CONFIG_OF) - set(DATA_PARALLEL)
    assert refused == {"panneal"}
    with pytest.raises(ConfigError, match=r"architecture 'panneal' is trained by one process only, because its loss"):
        layout_of(mesh, CONFIG_OF["panneal"](d_sae=D_SAE))


@pytest.mark.parametrize(("batch_size", "size"), [(255, 2), (64, 3), (2, 2)])
def test_a_batch_that_cannot_be_divided_is_refused(batch_size: int, size: int):
    members = dist.Alone()
    members.size = size
    with pytest.raises(ConfigError, match=f"a batch of {batch_size} tokens cannot be divided evenly among {size}"):
        check_divisible(batch_size, dist.ONE_PROCESS._replace(data=members))
    check_divisible(12 * size, dist.ONE_PROCESS._replace(data=members))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_a_batch_are_the_batch_however_many_processes_read_it(size: int):
    whole, parts = Mixtures(), []
    for rank in range(size):
        members = dist.Alone()
        members.rank, members.size = rank, size
        parts.append(portion(Mixtures(), members))
    for step in (0, 3):
        assert torch.equal(torch.cat([part.at(step) for part in parts]), whole.at(step))


def of_a_store(mesh: dist.Mesh, path: Path) -> torch.Tensor:
    from saelab.activations.loader import Batches
    from saelab.activations.store import ActivationStore

    store = ActivationStore.open(path)
    batches = portion(Batches(store, store.hook_names[0], batch_size=24, seed=0), mesh.data)
    return torch.cat([torch.cat(mesh.data.gather(batches.at(step))) for step in range(4)])


def test_each_process_reads_its_part_of_the_store_alone(store_dir: Path, tmp_path: Path):
    alone = of_a_store(dist.ONE_PROCESS, store_dir)
    for shared in results(together(2, tmp_path, of_a_store, store_dir)):
        assert torch.equal(shared, alone)


def selections(mesh: dist.Mesh) -> dict[str, object]:
    """Each selection on this process's half of a batch."""
    generator = torch.Generator().manual_seed(0)
    acts, W = torch.randn(40, 8, generator=generator), torch.randn(30, 8, generator=generator)
    bias, ties = torch.randn(30, generator=generator), torch.randint(0, 4, (40,), generator=generator).float()
    mine = slice(20 * mesh.world.rank, 20 * (mesh.world.rank + 1))
    kept = largest_of_batch(acts[mine], W, bias, 5 * 40, mesh.world)
    few = largest_of_batch(acts[mine], W, bias - 6, 5 * 40, mesh.world)  # fewer are positive than may stay
    ties[7] = torch.nan
    return {
        "kept": [(int(t) + mine.start, int(f)) for t, f in zip(kept.tokens, kept.features, strict=True)],
        "few": len(few.features),
        "nth": [float(nth_largest(ties[mine], n, mesh.world)) for n in (1, 2, 11, 40)],
        "variance": float(total_variance(1000 + acts[mine], mesh.world)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selections_of_two_processes_are_those_of_one(tmp_path: Path, dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        first, second = results(together(2, tmp_path, selections))
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    acts, W = torch.randn(40, 8, generator=generator, dtype=dtype), torch.randn(30, 8, generator=generator, dtype=dtype)
    bias, ties = torch.randn(30, generator=generator, dtype=dtype), torch.randint(0, 4, (40,), generator=generator)
    kept = encode_batchtopk(acts, W, bias, 5)
    pairs = [(int(t), int(f)) for t, f in zip(kept.tokens, kept.features, strict=True)]
    assert first["kept"] + second["kept"] == pairs
    assert len(pairs) == 200
    assert first["few"] + second["few"] == len(encode_batchtopk(acts, W, bias - 6, 5).features) < 200
    ordered = sorted([float(value) for i, value in enumerate(ties) if i != 7], reverse=True)
    for nth in (first["nth"], second["nth"]):
        assert nth[0] != nth[0]  # NaN is the largest
        assert nth[1:] == [ordered[0], ordered[9], ordered[38]]
    expected = float((acts - acts.mean(0)).pow(2).sum())
    assert (
        first["variance"]
        == second["variance"]
        == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
    )


def run(
    mesh: dist.Mesh,
    path: Path,
    config: TrainConfig,
    *,
    poison_at: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict:
    """A whole training in ``path``, begun or continued; the weights."""

    def begin() -> rundir.StageWriter:
        if (path / "run.json").exists():
            return rundir.StageWriter.resume(path, stage="sae")
        return rundir.StageWriter.create(path, stage="sae", config=configs.to_mapping(config))

    layout = layout_of(mesh, config.sae)
    batches = portion(Mixtures(poison_at=poison_at), mesh.data)
    with stage_of(mesh, path, begin) as stage:
        sae = train_sae(config, batches, stage, metadata=Metadata(), progress=progress, layout=layout)
    return {name: value.detach() for name, value in sae.state_dict().items()}


def metrics(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in rundir.read_metrics(path)]


TOPK = config_of(TopKConfig(d_sae=48, k=K))


def doing(path: Path, config: TrainConfig, kind: str, at: int, rank: int) -> Callable[..., dict]:
    """A training in which process ``rank`` gets a signal after step ``at``."""

    def work(mesh: dist.Mesh) -> dict:
        def progress(done: int, total: int, detail: str) -> None:
            if done == at and mesh.world.rank == rank:
                os.kill(os.getpid(), getattr(signal, kind))

        return run(mesh, path, config, progress=progress)

    return work


def test_only_the_first_process_writes_and_the_result_is_the_one_of_one_process(float64: None, tmp_path: Path):
    expected = run(dist.ONE_PROCESS, tmp_path / "one", TOPK)
    for weights in results(together(2, tmp_path / "said", run, tmp_path / "two", TOPK)):
        assert all((weights[name] - value).abs().max() < 1e-12 for name, value in expected.items())
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert all(a[name] == pytest.approx(b[name], abs=1e-12) for a, b in zip(one, two, strict=True) for name in a)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    density = "sparsity.safetensors"
    assert atomic.sha256(tmp_path / "one" / density) == atomic.sha256(tmp_path / "two" / density)


def said(endings: list[Ending]) -> list[str]:
    """All that the processes told the user; torch's own warnings are not ours."""
    lines = [line for ending in endings for line in ending.said.splitlines()]
    return [line for line in lines if line and not line.startswith(("[", " "))]


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_dies_the_others_end_with_one_sentence_and_the_checkpoint_serves(tmp_path: Path, rank: int):
    endings = together(2, tmp_path / "said", doing(tmp_path / "sae", TOPK, "SIGKILL", 23, rank))
    assert endings[rank].status == -signal.SIGKILL
    assert endings[1 - rank].status == 2
    assert endings[1 - rank].at - endings[rank].at < 10
    assert said(endings) == [
        "another process of this run broke off; the last checkpoint is whole, continue from it with --resume"
    ]
    results(together(2, tmp_path / "again", run, tmp_path / "sae", TOPK))
    results(together(2, tmp_path / "whole", run, tmp_path / "undisturbed", TOPK))
    assert metrics(tmp_path / "sae") == metrics(tmp_path / "undisturbed")
    weights = "sae_weights.safetensors"
    assert atomic.sha256(tmp_path / "sae" / weights) == atomic.sha256(tmp_path / "undisturbed" / weights)


def test_a_process_that_falls_silent_is_given_up(tmp_path: Path):
    config = replace(TOPK, batch_size=48)
    endings = together(3, tmp_path / "said", doing(tmp_path / "sae", config, "SIGSTOP", 13, 1), patience_s=1.5)
    assert [endings[0].status, endings[2].status] == [2, 2]
    assert said(endings) == [
        "error: process 1 of 3 has been silent for 1.5 s; the last checkpoint is whole, continue from it with --resume"
    ]


def test_ctrl_c_on_one_process_stops_all_after_the_same_step(tmp_path: Path):
    endings = together(2, tmp_path / "said", doing(tmp_path / "sae", TOPK, "SIGINT", 13, 1))
    assert {ending.status for ending in endings} == {130, 2}  # one speaks, the other is silent
    again = f"torchrun --nproc-per-node 2 -m saelab train --resume {tmp_path / 'sae'}"
    assert said(endings) == [f"stopped at step 14 of 40; continue with: {again}"]
    assert (tmp_path / "sae" / "checkpoints" / "step_000000014").is_dir()


def test_a_run_continues_on_another_number_of_processes(float64: None, tmp_path: Path):
    together(2, tmp_path / "said", doing(tmp_path / "sae", TOPK, "SIGINT", 13, 0))
    continued = run(dist.ONE_PROCESS, tmp_path / "sae", TOPK)
    expected = run(dist.ONE_PROCESS, tmp_path / "whole", TOPK)
    assert all((continued[name] - value).abs().max() < 1e-12 for name, value in expected.items())
    assert [line["step"] for line in metrics(tmp_path / "sae")] == [
        line["step"] for line in metrics(tmp_path / "whole")
    ]


def test_all_processes_stop_at_a_batch_that_is_not_finite_and_keep_all_of_it(tmp_path: Path):
    from safetensors.torch import load_file

    def work(mesh: dist.Mesh) -> None:
        run(mesh, tmp_path / "sae", TOPK, poison_at=17)  # the last token, which the second process has

    endings = together(2, tmp_path / "said", work)
    assert {ending.status for ending in endings} == {2}
    assert len(said(endings)) == 1
    assert "at step 17 (batch of tokens 1088 to 1151 in the order of seed 0); 1 of its activations" in said(endings)[0]
    (file,) = (tmp_path / "sae").glob("nonfinite_*")
    torch.testing.assert_close(load_file(file)["acts"], Mixtures(poison_at=17).at(17), equal_nan=True)


def skipping(mesh: dist.Mesh) -> list[dict]:
    batches = portion(Mixtures(poison_at=3), mesh.data)
    config = replace(TOPK, on_nonfinite="skip")
    trainer = Trainer(config, batches, "cpu", layout_of(mesh, config.sae))
    states = []
    for step in range(5):
        trainer.advance(batches.at(step))
        states.append({name: value.clone() for name, value in trainer.sae.state_dict().items()})
    return states


def test_all_processes_skip_a_batch_that_is_not_finite_and_leave_the_weights_alone(tmp_path: Path):
    for states in results(together(2, tmp_path, skipping)):
        assert all(torch.equal(states[2][name], value) for name, value in states[3].items())
        assert not torch.equal(states[3]["encoder"], states[4]["encoder"])


def test_a_failure_of_one_process_is_told_once(tmp_path: Path):
    def work(mesh: dist.Mesh) -> None:
        if mesh.world.rank == 1:
            raise SaelabError("the disk of this process is full; free some")
        mesh.world.barrier()

    endings = together(2, tmp_path, work)
    assert [ending.status for ending in endings] == [2, 2]
    assert said(endings) == ["the disk of this process is full; free some"]


def test_the_number_of_processes_must_be_a_multiple_of_the_shards(tmp_path: Path):
    with (
        pytest.raises(
            ConfigError, match=r"--feature-shards 2 does not divide the number of processes, which is 1; start"
        ),
        dist.joined(feature_shards=2),
    ):
        pass
    endings = together(2, tmp_path, lambda mesh: None, feature_shards=3)
    assert [ending.status for ending in endings] == [2, 2]
    assert len(said(endings)) == 1
    assert "--feature-shards 3 does not divide the number of processes, which is 2" in said(endings)[0]


def test_one_process_is_its_own_twin():
    alone, mask = dist.ALONE, torch.tensor([True, False])
    tensor = torch.randn(3)
    assert alone.sum(tensor) is alone.mean(tensor) is alone.smallest(tensor) is tensor
    assert alone.any(mask) is mask
    assert alone.gather(tensor)[0] is alone.gather_to_first(tensor)[0] is tensor
    assert isinstance(alone, dist.Group)
    with dist.joined() as mesh:
        assert mesh is dist.ONE_PROCESS
    assert new_sae(TOPK.sae, d_in=D_IN).tokens is dist.ALONE


@pytest.fixture(scope="module")
def store_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from saelab.activations.capture import CacheConfig, capture
    from saelab.activations.text import TextConfig
    from saelab.models.load import load_model

    folder = tmp_path_factory.mktemp("stores")
    lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}."} for i in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = CacheConfig(
        hook_names=("blocks.1.hook_resid_post",), text=TextConfig(source=str(folder / "text.jsonl")), context=16
    )
    capture(config, folder / "store", model=load_model(tiny_model_dir, device="cpu"))
    return folder / "store"


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_under_torchrun_a_killed_worker_ends_the_run_which_then_resumes(store_dir: Path, tmp_path: Path, shards: int):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = [*torchrun, "-m", "saelab", "train", "--feature-shards", str(shards)]
    settings = ["--set", "batch_size=64", "--set", "checkpoint_every=20", "--tokens", str(64 * 400), "--k", "2"]
    with subprocess.Popen(
        [*train, str(store_dir), *settings, "--out", str(tmp_path / "sae")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as running:
        while not (tmp_path / "sae" / "checkpoints" / "step_000000040").exists():
            assert running.poll() is None
            time.sleep(0.02)
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        killed = time.monotonic()
        _, errors = running.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    sentence = (
        "error: another process of this run broke off; the last checkpoint is whole, continue from it with --resume"
    )
    assert errors.count(sentence) == 1
    done = subprocess.run([*train, "--resume", str(tmp_path / "sae")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    again = [*train, str(store_dir), *settings, "--out", str(tmp_path / "whole")]
    done = subprocess.run(again, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "sae") == metrics(tmp_path / "whole")
    for name in ("sae_weights", "sparsity"):
        file = f"{name}.safetensors"
        assert atomic.sha256(tmp_path / "sae" / file) == atomic.sha256(tmp_path / "whole" / file)


def test_processes_that_do_not_all_come_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "MEETING_S", 1.0)
    (ending,) = together(1, tmp_path, lambda mesh: None, n_expected=2)
    assert ending.status == 2
    assert said([ending]) == [
        "the 2 processes of this run did not find each other within 1 s; start all of them, with one --rdzv-endpoint"
    ]
