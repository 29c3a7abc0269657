"""Two processes that share the records of each batch do what one does."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from saelab import dist, rundir
from saelab.align.encoding import EncodedPair
from saelab.align.parallel import check_shares, rows_of, share
from saelab.align.policy import LoraSettings, PolicyConfig, load_policy
from saelab.align.preference import LossSettings, evaluate_preference, train_preference
from saelab.align.reward import RewardModel, evaluate_reward, train_reward
from saelab.align.session import AdamWSettings, Order, StepSettings
from saelab.align.sft import evaluate_sft, train_sft
from saelab.align.unpaired import Labels, UnpairedSettings, evaluate_unpaired, train_unpaired
from saelab.errors import ConfigError
from saelab.models.tiny import write_tiny_model
from tests.train.forked import results, together

LORA = LoraSettings(rank=4, targets=("q_proj", "v_proj", "down_proj"))
PROMPTS = ["the tower", "one river", "the world of", "light and music", "a city by", "the king", "old house"]
# of unlike length on purpose: a mean of the processes' means would show
GOOD = [" of the people", " with", " and other time of the year in the north"]
BAD = [" was not", " but from her first book about the old river"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", n_layers=2)


def policy_of(tiny, lora):
    return load_policy(PolicyConfig(model=str(tiny), dtype="float32", context=64, lora=lora))


def pairs_for(policy):
    encode = policy.codec.encode
    return [EncodedPair(encode(prompt, GOOD[i % 3]), encode(prompt, BAD[i % 2])) for i, prompt in enumerate(PROMPTS)]


def settings(**options):
    optim = AdamWSettings(lr=2e-3, warmup_share=0.0)
    return StepSettings(**({"steps": 6, "batch_size": 4, "checkpoint_every": 3, "seed": 3, "optim": optim} | options))


def run_in(mesh, path):
    def begin():
        if (path / "run.json").exists():
            return rundir.StageWriter.resume(path, stage="model")
        return rundir.StageWriter.create(path, stage="model", config={})

    return dist.on_first(mesh, begin) or rundir.StageWriter(path, "model")


def sft(mesh, tiny, path, training, lora):
    policy = policy_of(tiny, lora)
    demonstrations = [pair.chosen for pair in pairs_for(policy)]
    train_sft(policy, demonstrations, run_in(mesh, path), training=training, mesh=mesh)
    return policy.trainable(), evaluate_sft(policy, demonstrations, batch_size=2, group=mesh.world)


def dpo(mesh, tiny, path, training, lora):
    policy = policy_of(tiny, lora)
    pairs = pairs_for(policy)
    loss = LossSettings(terms={"sigmoid": 1.0, "nll": 0.2})
    train_preference(policy, pairs, run_in(mesh, path), loss=loss, training=training, mesh=mesh)
    return policy.trainable(), evaluate_preference(policy, pairs, beta=0.1, batch_size=2, group=mesh.world)


def reward(mesh, tiny, path, training, lora):
    model = RewardModel.fresh(policy_of(tiny, lora))
    pairs = pairs_for(model.policy)
    train_reward(model, pairs, run_in(mesh, path), training=training, mesh=mesh)
    return model.trainable(), evaluate_reward(model, pairs, batch_size=2, group=mesh.world)


def kto(mesh, tiny, path, training, lora):
    policy = policy_of(tiny, lora)
    answers = [pair.chosen if i % 2 else pair.rejected for i, pair in enumerate(pairs_for(policy))]
    data = Labels(answers, [bool(i % 2) for i in range(len(answers))])
    loss = UnpairedSettings(beta=0.5)
    train_unpaired(policy, data, run_in(mesh, path), loss=loss, training=training, mesh=mesh)
    return policy.trainable(), evaluate_unpaired(policy, data, batch_size=2, group=mesh.world)


TRAINERS = {"sft": sft, "dpo": dpo, "reward": reward, "kto": kto}


def trained(mesh, tiny, folder, cases):
    """For each case the weights, put together, and what was measured."""
    from saelab.align.parallel import whole

    found = {}
    for name, (trainer, lora, options) in cases.items():
        parameters, measured = TRAINERS[trainer](mesh, tiny, folder / name, settings(**options), lora)
        found[name] = {n: whole(p.detach()) for n, p in parameters.items()}, measured
    return found


def logged(path, name):
    return [line[name] for line in rundir.read_metrics(path)]


def check_equal(tiny, tmp_path, cases):
    """Losses within 1e-5, the same weights to rounding on both, the same measures and files as of one process."""
    first, second = results(together(2, tmp_path / "said", trained, tiny, tmp_path / "two", cases))
    alone = {name: (trainer, lora, {**options, "shard": False}) for name, (trainer, lora, options) in cases.items()}
    expected = trained(dist.ONE_PROCESS, tiny, tmp_path / "one", alone)
    for name in cases:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5), name
        # Adam hides the scale of a gradient, so that a mean in the place of a sum would hardly show in the weights
        assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-3), name
        for parameter, value in expected[name][0].items():
            assert torch.equal(first[name][0][parameter], second[name][0][parameter]), (name, parameter)
            torch.testing.assert_close(first[name][0][parameter], value, rtol=1e-3, atol=2e-5)
        for mine, other, one in zip(first[name][1], second[name][1], expected[name][1], strict=True):
            assert mine == other
            values = [x if isinstance(x, int | float) else list(x) for x in (mine, one)]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4)
        files = [sorted(p.name for p in (tmp_path / n / name).iterdir()) for n in ("one", "two")]
        assert files[0] == files[1]


CASES = {
    f"{trainer}-{'lora' if lora else 'full'}": (trainer, lora, {}) for trainer in TRAINERS for lora in (LORA, None)
}


def test_two_processes_equal_one(tiny, tmp_path):
    check_equal(tiny, tmp_path, CASES)


def test_two_processes_equal_one_with_shares_of_unlike_size_in_parts(tiny, tmp_path):
    uneven = {"batch_size": 5, "micro_batch": 2, "steps": 3}
    check_equal(tiny, tmp_path, {name: (trainer, lora, uneven) for name, (trainer, lora, _) in CASES.items() if lora})


def test_layers_spread_over_two_processes_equal_one(tiny, tmp_path):
    """FSDP2: weights, gradients and Adam's moments of each layer lie in halves."""
    check_equal(tiny, tmp_path, {name: (name, None, {"shard": True}) for name in TRAINERS})
    saved = load_policy(PolicyConfig(model=str(tmp_path / "two" / "sft"), dtype="float32", lora=None))
    one = load_policy(PolicyConfig(model=str(tmp_path / "one" / "sft"), dtype="float32", lora=None))
    for (name, value), other in zip(saved.model.named_parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=2e-5, msg=name)


def stopped(mesh, tiny, path, options):
    """A training in which the second process is asked to stop after its second step."""
    asked = []

    def progress(done, total, detail):
        if done == 2 and mesh.world.rank == 1 and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGINT))

    policy = policy_of(tiny, None)
    demonstrations = [pair.chosen for pair in pairs_for(policy)]
    run = run_in(mesh, path)
    train_sft(policy, demonstrations, run, training=settings(**options), mesh=mesh, progress=progress)


@pytest.mark.parametrize("shard", [False, True])
def test_ctrl_c_on_one_stops_both_and_the_run_ends_with_the_same_bits(tiny, tmp_path, shard):
    endings = together(2, tmp_path / "said", stopped, tiny, tmp_path / "run", {"shard": shard})
    assert {ending.status for ending in endings} == {130, 2}  # one speaks, the other is silent
    assert "torchrun --nproc-per-node 2 -m saelab align resume" in "".join(ending.said for ending in endings)
    case = {"run": ("sft", None, {"shard": shard})}
    resumed, _ = results(together(2, tmp_path / "said2", trained, tiny, tmp_path, case))
    undisturbed, _ = results(together(2, tmp_path / "said3", trained, tiny, tmp_path / "whole", case))
    for name, value in undisturbed["run"][0].items():
        assert torch.equal(resumed["run"][0][name], value), name
    assert rundir.read_metrics(tmp_path / "run") == rundir.read_metrics(tmp_path / "whole" / "run")


def members(rank, size):
    group = dist.Alone()
    group.rank, group.size = rank, size
    return group


def test_shares_are_all_records_once():
    order = [Order(9, batch_size=5, micro_batch=2, seed=0, group=members(rank, 2)) for rank in range(2)]
    parts = [int(i) for one in order for part in one.parts(3) for i in part]
    assert sorted(parts) == sorted(order[0].batch(3).tolist())
    assert list(share([1, 2, 3, 4, 5], members(1, 2))) == [2, 4]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_that_processes_compute_apart_add_up_to_all(size):
    items = [float(i) for i in range(7)]
    calls, parts = [], []
    for rank in range(size):
        seen = []

        def compute(part, seen=seen):
            seen.append(part)
            return torch.tensor(part)[:, None] ** 2

        parts.append(rows_of(items, compute, batch_size=2, group=members(rank, size)))
        calls.append(len(seen))
    assert torch.equal(sum(parts)[:, 0], torch.tensor(items, dtype=torch.float64) ** 2)
    assert len(set(calls)) == 1  # spread layers want all processes equally often


def test_batches_that_cannot_be_shared_are_refused():
    two = dist.ONE_PROCESS._replace(world=members(0, 2), data=members(0, 2))
    check_shares(3, two, sharded=False)
    with pytest.raises(ConfigError, match=r"a batch of 1 records cannot be shared .* to at least 2"):
        check_shares(1, two, sharded=False)
    with pytest.raises(ConfigError, match="to a multiple of 2"):
        check_shares(3, two, sharded=True)
    with pytest.raises(ConfigError, match="but there is one; start with torchrun"):
        check_shares(4, dist.ONE_PROCESS, sharded=True)


def test_an_adapter_is_not_spread_and_a_loss_over_all_pairs_not_shared(tiny, tmp_path):
    two = dist.ONE_PROCESS._replace(world=members(0, 2), data=members(0, 2))
    policy = policy_of(tiny, LORA)
    with pytest.raises(ConfigError, match="an adapter is trained; set --rank 0"):
        policy.shard_(two)
    run = rundir.StageWriter(tmp_path / "run", "model")
    with pytest.raises(ConfigError, match="aot compares all pairs of a batch"):
        loss = LossSettings(terms={"aot": 1.0})
        train_preference(policy, pairs_for(policy), run, loss=loss, training=settings(), mesh=two)


@pytest.mark.slow
def test_torchrun_starts_it_and_one_process_reports(tiny, tmp_path):
    rows = [
        {"prompt": f"{a} {b}", "completion": "of the people"}
        for a in PROMPTS
        for b in ("of", "and", "by", "with", "for")
    ]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saelab"]
    more = ["--model", str(tiny), "--steps", "3", "--batch-size", "4", "--json", "--set", "policy.dtype=float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(verb, out, *options):
        words = [*torchrun, "align", verb, str(tmp_path / "demos.jsonl"), "--out", str(tmp_path / out), *more, *options]
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)

    done = start("sft", "sft")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)  # printed once
    assert measured["after"]["nll"]["value"] < measured["before"]["nll"]["value"]
    assert (tmp_path / "sft" / "DONE").exists()
    spread = start("sft", "spread", "--rank", "0", "--set", "training.shard=true")
    assert spread.returncode == 0, spread.stderr
    refused = start("ppo", "ppo", "--reward", "rule:brevity")
    assert "align ppo is the work of one process" in refused.stderr
    assert not (tmp_path / "ppo").exists()
