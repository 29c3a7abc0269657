from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.interp.patch_metrics import logit_difference
from saelab.interp.patch_runs import run_patched
from saelab.interp.patch_sites import Site
from saelab.interp.patching import patch
from saelab.interp.path_patching import path_patch
from saelab.interp.prompt_pairs import prompt_pair
from saelab.interp.replacements import from_run

CLEAN, CORRUPT = "the king of the north island was old", "the people of the south island was old"
METRIC = logit_difference(20, 30)


@pytest.fixture(scope="module")
def pair(tiny_model):
    return prompt_pair(tiny_model, CLEAN, CORRUPT)


@pytest.fixture(scope="module")
def everywhere(pair):
    return tuple(range(1, pair.clean.shape[1]))


def effect_of(model, pair, row) -> float:
    patched, base = run_patched(model, pair.corrupt, [row, ()], METRIC).tolist()
    return patched - base


def test_the_last_block_reaches_the_logits_directly_only(tiny_model):
    by_path = path_patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, at="mlp_out", to=["logits"], layers=[2])
    whole = patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, at="mlp_out", layers=[2])
    torch.testing.assert_close(by_path.effects, whole.effects, rtol=1e-4, atol=1e-4)
    assert whole.effects.abs().max() > 1e-2


@pytest.mark.parametrize("place", ["attn_out", "mlp_out"])
def test_the_direct_effect_is_that_of_the_difference_added_to_the_final_residual_stream(
    tiny_model, pair, everywhere, place
):
    sender, final = Site(f"blocks.0.hook_{place}", everywhere), Site("blocks.2.hook_resid_post", everywhere)
    base, source = (from_run(tiny_model, ids, [sender, final]) for ids in (pair.corrupt, pair.clean))
    position = everywhere[-1]
    moved = base[final.key].clone()
    moved[position] += (source[sender.key] - base[sender.key])[position]
    grid = path_patch(
        tiny_model, CLEAN, CORRUPT, metric=METRIC, at=place, to=["logits"], layers=[0], positions=[position]
    )
    assert float(grid.effects[0, 0]) == pytest.approx(effect_of(tiny_model, pair, [(final, moved)]), abs=1e-4)
    whole = patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, at=place, layers=[0], positions=[position])
    assert abs(float(whole.effects[0, 0] - grid.effects[0, 0])) > 1e-2  # later blocks do read it


def test_what_attention_tells_its_own_mlp_is_what_the_mlp_makes_of_it(tiny_model, pair, everywhere):
    """Block 0 alone: patch attention, take the MLP's output, and put that into an otherwise untouched run."""
    sender, mlp = Site("blocks.0.hook_attn_out", everywhere), Site("blocks.0.hook_mlp_out", everywhere)
    position = everywhere[-1]
    source = from_run(tiny_model, pair.clean, [sender])[sender.key]

    def attention(acts, keep):
        acts[:, position] = source[position]
        return acts

    with tiny_model.edit(sender.hook_name, attention):
        made = from_run(tiny_model, pair.corrupt, [mlp])[mlp.key]
    expected = effect_of(tiny_model, pair, [(mlp, made)])
    grid = path_patch(
        tiny_model, CLEAN, CORRUPT, metric=METRIC, at="attn_out", to=["mlp.0"], layers=[0], positions=[position]
    )
    assert float(grid.effects[0, 0]) == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1e-3


def test_queries_keys_and_values_read_what_an_earlier_mlp_wrote(tiny_model, pair, everywhere):
    """The MLP of block 0 feeds block 1 with nothing between, so that freezing changes nothing: capture and put in."""
    sender = Site("blocks.0.hook_mlp_out", everywhere)
    source = from_run(tiny_model, pair.clean, [sender])[sender.key]
    position = 4
    for part, head, columns in (("q", 1, (16, 32)), ("k", 0, (0, 16)), ("v", 0, (0, 16))):
        receiver = Site(f"blocks.1.attn.hook_{part}", everywhere, columns=columns)

        def mlp(acts, keep):
            acts[:, position] = source[position]
            return acts

        with tiny_model.edit(sender.hook_name, mlp):
            read = from_run(tiny_model, pair.corrupt, [receiver])[receiver.key]
        expected = effect_of(tiny_model, pair, [(receiver, read)])
        settings = {"metric": METRIC, "at": "mlp_out", "layers": [0], "positions": [position]}
        grid = path_patch(tiny_model, CLEAN, CORRUPT, to=[f"{part}.1.{head}"], **settings)
        assert float(grid.effects[0, 0]) == pytest.approx(expected, abs=1e-4)


def test_a_sender_behind_its_receiver_has_no_effect(tiny_model):
    grid = path_patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, at="head", to=["q.1.0"], layers=[1, 2])
    assert grid.effects.abs().max() < 1e-5


def test_by_default_only_layers_before_the_receiver_send(tiny_model):
    grid = path_patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, at="head", to=["v.1.0", "mlp.0"])
    assert grid.rows == ("0", "1")
    assert grid.at == "head to v.1.0 and mlp.0"


def test_the_batch_size_does_not_matter(tiny_model):
    settings = {"metric": METRIC, "at": "attn_out", "to": ["logits"], "layers": [0]}
    few, many = (path_patch(tiny_model, CLEAN, CORRUPT, batch_size=n, **settings).effects for n in (3, 32))
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "q.1", "q.1.2", "k.1.1", "mlp.3", "logit", "o.1.0", "q.a.0"])
def test_a_receiver_that_is_not_there_is_refused(tiny_model, name):
    with pytest.raises(ConfigError):
        path_patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, to=[name])


def test_an_exception_leaves_no_trace(tiny_model, pair):
    before = tiny_model.logits(pair.clean)

    def broken(logits):
        raise RuntimeError("the user pressed stop")

    def stopped(done, total, detail):
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="stop"):
        path_patch(tiny_model, CLEAN, CORRUPT, metric=broken, to=["logits"])
    with pytest.raises(KeyboardInterrupt):
        path_patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, to=["logits"], progress=stopped)
    assert tiny_model.active_hooks() == []
    torch.testing.assert_close(tiny_model.logits(pair.clean), before, rtol=0, atol=0)
