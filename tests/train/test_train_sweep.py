"""One pass over the data trains many SAEs, each as if it were alone."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from toy_stream import Mixtures, contents, run_in

import saelab as sl
from saelab import rundir
from saelab.errors import ArtifactError, ConfigError, Interrupted, TrainingError
from saelab.rundir import StageWriter
from saelab.sae.base import Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.loop import Job, train_sae, train_together
from saelab.train.optim import OptimConfig
from saelab.train.sweep import Stream, begin, begun, members_of, read_grid, streams_of, train_sweep

METADATA = Metadata(model_name="none", hook_name="blocks.0.hook_resid_post")
BASE = TrainConfig(
    sae=TopKConfig(d_sae=40, k=3),
    tokens=64 * 40,
    batch_size=64,
    optim=OptimConfig(lr=3e-3),
    stats_tokens=512,
    checkpoint_every=15,
    log_every=4,
    dead_after_tokens=640,
)
MEMBERS = {
    "topk": BASE,
    "batchtopk": replace(BASE, sae=BatchTopKConfig(d_sae=24, k=2), ema_decay=0.9),
    "relu": replace(BASE, sae=ReLUConfig(d_sae=40, l1_coefficient=0.05), target_l0=4.0),
    "short": replace(BASE, tokens=64 * 20),
    "seed1": replace(BASE, seed=1),
}


def stream(config: TrainConfig) -> Stream:
    return Stream(Mixtures(), METADATA, Mixtures(batch_size=256))


def trained(out: Path, members=MEMBERS, streams=stream, progress=None):
    return train_sweep(begin(out, members, parents={}), members, streams, parents={}, progress=progress)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone")
    for name, config in MEMBERS.items():
        train_sae(config, Mixtures(), run_in(path / name, config), metadata=METADATA)
    return path


def test_each_member_ends_with_the_bytes_of_training_it_alone(tmp_path: Path, alone: Path):
    table = trained(tmp_path / "sweep")
    for name in MEMBERS:
        assert contents(tmp_path / "sweep" / name) == contents(alone / name), name
        assert sl.load_sae(tmp_path / "sweep" / name).d_sae == MEMBERS[name].sae.d_sae
    assert [row.name for row in table] == list(MEMBERS)
    assert all(row.state == "finished" and row.decoder_projection is not None for row in table)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["members"][0]["l0"] == 3.0
    assert (tmp_path / "sweep" / "DONE").exists()


def test_members_that_share_a_stream_read_it_once(tmp_path: Path):
    members = {name: config for name, config in MEMBERS.items() if name in ("topk", "batchtopk", "relu")}
    opened: list[Mixtures] = []

    def counting(config: TrainConfig) -> Stream:
        opened.append(Mixtures())
        return Stream(opened[-1], METADATA, None)

    trained(tmp_path / "sweep", members, counting)
    assert len(opened) == 1
    assert opened[0].asked.count(30) == 1


def test_a_sweep_stopped_by_ctrl_c_goes_on_with_what_is_left(tmp_path: Path, alone: Path):
    def press(done: int, total: int, detail: str) -> None:
        if done == 50:  # of 80: the first stream is through, the second is not
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "sweep"
    with pytest.raises(Interrupted, match=rf"continue with: saelab train --resume {out}"):
        trained(out, progress=press)
    assert (out / "topk" / "DONE").exists()
    assert not (out / "seed1" / "DONE").exists()
    with pytest.raises(ArtifactError, match=f"saelab train --resume {out}"):
        rundir.find(out, "sweep")
    done: list[int] = []
    table = train_sweep(
        StageWriter.resume(out, stage="sweep"),
        begun(out),
        stream,
        parents={},
        progress=lambda step, total, detail: done.append(step),
    )
    assert min(done) > 50  # nothing was done twice
    assert [row.name for row in table] == list(MEMBERS)
    for name in MEMBERS:
        weights, whole = (contents(path / name)["sae_weights.safetensors"] for path in (out, alone))
        assert weights == whole


def test_a_member_that_fails_leaves_the_others_alone_and_can_be_asked_for_again(tmp_path: Path):
    explosive = {"step": 9}

    class Explosive(Mixtures):
        """Finite activations whose squares are not."""

        def at(self, step: int):
            acts = super().at(step)
            return acts * 1e30 if step == explosive.get("step") else acts

    def stream_of(config: TrainConfig) -> Stream:
        return Stream(Explosive(), METADATA, None)

    members = {
        "wild": replace(BASE, sae=ReLUConfig(d_sae=40)),
        "skips": replace(BASE, on_nonfinite="skip"),
        "topk": replace(BASE, tokens=64 * 9),
    }
    out = tmp_path / "sweep"
    states = {row.name: row.state for row in trained(out, members, stream_of)}
    assert states["skips"] == states["topk"] == "finished"
    assert "at step 9" in states["wild"]
    assert (out / "wild" / "nonfinite_step_000000009.safetensors").exists()
    assert not (out / "DONE").exists()
    assert [path.name for path in rundir.find_all(out, "sae")] == ["skips", "topk"]
    explosive.clear()
    again = train_sweep(StageWriter.resume(out, stage="sweep"), begun(out), stream_of, parents={})
    assert all(row.state == "finished" for row in again)


def test_a_member_that_fails_before_it_caught_up_does_not_hold_up_the_others(tmp_path: Path):
    config = replace(BASE, checkpoint_every=10)
    for name, poisoned in (("ahead", 35), ("behind", 15)):
        with pytest.raises(TrainingError):
            train_sae(config, Mixtures(poisoned=(poisoned,)), run_in(tmp_path / name, config), metadata=METADATA)
    jobs = [Job(config, StageWriter.resume(tmp_path / name, stage="sae"), METADATA) for name in ("ahead", "behind")]
    data = Mixtures(poisoned=(20,))  # "behind" goes on from step 10, "ahead" from step 30
    ahead, behind = train_together(jobs, data, resume=tmp_path)
    assert "at step 20" in str(behind)
    assert ahead.d_sae == 40


def test_a_member_whose_settings_were_edited_is_refused_with_both_values(tmp_path: Path):
    out = tmp_path / "sweep"
    run = begin(out, MEMBERS, parents={})
    run_in(out / "topk", replace(BASE, tokens=64 * 41))
    with pytest.raises(ConfigError, match=r"topk was begun with tokens = 2560, but tokens = 2624 is asked for now"):
        train_sweep(run, MEMBERS, stream, parents={})


def test_a_workspace_with_a_sweep_still_has_one_sae(tmp_path: Path):
    trained(tmp_path / "sweep", {"topk": BASE, "short": MEMBERS["short"]})
    train_sae(BASE, Mixtures(), run_in(tmp_path / "sae", BASE), metadata=METADATA)
    assert rundir.find(tmp_path, "sae") == tmp_path / "sae"
    assert rundir.find_all(tmp_path, "sae") == [tmp_path / "sae"]
    assert rundir.find_all(tmp_path / "sae", "sae") == [tmp_path / "sae"]
    assert [path.name for path in rundir.find_all(tmp_path / "sweep", "sae")] == ["short", "topk"]
    with pytest.raises(ArtifactError, match="holds several sae directories"):
        rundir.find(tmp_path / "sweep", "sae")
    with pytest.raises(ArtifactError, match="holds no index directory"):
        rundir.find_all(tmp_path, "index")


def resolve(settings: dict) -> TrainConfig:
    from saelab import config as configs

    return configs.from_mapping(TrainConfig, settings)


def test_lists_multiply_and_names_say_what_varies():
    base, blocks = read_grid(
        {
            "tokens": 64_000,
            "optim": {"lr": 1e-3},
            "grid": [
                {"sae": {"arch": "topk", "d_sae": [64, 128], "k": [2, 4]}, "hook_name": ["a.hook_x", "b.hook_x"]},
                {"sae": {"arch": "relu", "d_sae": 64, "l1_coefficient": [0.5, 2]}, "hook_name": "a.hook_x"},
                {"sae": {"arch": "batchtopk", "d_sae": 64}, "optim": {"betas": [[0.0, 0.999], [0.9, 0.99]]}},
            ],
        }
    )
    members = members_of(base, blocks, resolve)
    assert len(members) == 12
    assert members["topk-b.hook_x-d_sae128-k4"].sae == TopKConfig(d_sae=128, k=4)
    assert members["topk-b.hook_x-d_sae128-k4"].optim.lr == 1e-3
    assert {"relu-l1_coefficient0.5", "relu-l1_coefficient2"} <= set(members)
    assert members["batchtopk-betas_0.0_0.999_"].optim.betas == (0.0, 0.999)
    assert [len(group) for group in streams_of(members)] == [6, 4, 2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"tokens": 3}, r"needs at least one \[\[grid\]\] block"),
        ({"grid": [3]}, r"needs at least one \[\[grid\]\] block"),
        ({"grid": [{"sae": {"arch": "topk", "d_sae": 64, "k": []}}]}, "sae.k of a .* lists no value to try"),
        ({"grid": [{"sae": {"arch": "topk", "d_sae": 64, "kk": [1]}}]}, "sae.kk is not a setting"),
        ({"grid": [{"sae": {"arch": "topk", "d_sae": 64, "k": [2, 2]}}]}, "holds topk twice"),
        ({"sae": 3, "grid": [{"sae": {"arch": "topk"}}]}, "sae.arch cannot be set, because sae is a single value"),
        ({"grid": [{"sae": {"arch": "tpok", "d_sae": 64}}]}, "did you mean topk"),
    ],
)
def test_impossible_grids_are_refused(content: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        members_of(*read_grid(content), resolve)


def test_no_name_leads_out_of_the_sweep():
    _, blocks = read_grid({"grid": [{"sae": {"arch": "topk", "d_sae": 64}, "hook_name": ["../../etc", "a/b"]}]})
    names = list(members_of({}, blocks, resolve))
    assert names == ["topk-.._.._etc", "topk-a_b"]
