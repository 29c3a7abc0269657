from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.features import logits


def test_a_direction_of_the_unembedding_promotes_its_token():
    W_U = torch.nn.functional.normalize(torch.randn(64, 500, generator=torch.Generator().manual_seed(0)), dim=0)
    table = logits.logit_table(W_U.T[:7], W_U, None, n=4)
    assert table.promoted_ids[:, 0].tolist() == list(range(7))
    assert (table.z > 4).all()


@pytest.mark.parametrize("gain", [None, torch.linspace(0.5, 2, 6)])
def test_effects_are_centred_and_pass_the_norms_gain(gain, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    W_dec, W_U = torch.randn(5, 6, generator=generator), torch.randn(6, 30, generator=generator)
    monkeypatch.setattr(logits, "_BLOCK_EFFECTS", 60)  # two features at a time
    table = logits.logit_table(W_dec, W_U, gain, n=3)
    effects = (W_dec if gain is None else W_dec * gain) @ W_U
    effects = (effects - effects.mean(1, keepdim=True)).numpy()
    order = np.argsort(-effects, axis=1)
    np.testing.assert_array_equal(table.promoted_ids, order[:, :3])
    np.testing.assert_array_equal(table.suppressed_ids, order[:, ::-1][:, :3])
    strongest = np.take_along_axis(effects, order[:, :3], 1)
    np.testing.assert_allclose(table.promoted_effects, strongest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table.z, effects.max(1) / effects.std(1), rtol=1e-4)


def test_few_random_directions_exceed_the_noise():
    generator = torch.Generator().manual_seed(5)
    W_U, directions = torch.randn(32, 2000, generator=generator), torch.randn(1000, 32, generator=generator)
    table = logits.logit_table(directions, W_U, None, n=1)
    assert 0.001 < (table.z > table.noise_z).mean() < 0.03  # 1 % by construction
    assert logits.logit_table(10 * directions, W_U, None, n=1).noise_z == table.noise_z


def test_a_vocabulary_smaller_than_the_table_leaves_empty_slots():
    table = logits.logit_table(torch.randn(2, 3), torch.randn(3, 4), None, n=6)
    assert (table.promoted_ids[:, 4:] == -1).all()
    assert (table.promoted_ids[:, :4] >= 0).all()


def test_a_zero_direction_has_no_effect():
    table = logits.logit_table(torch.zeros(1, 3), torch.randn(3, 9), None, n=2)
    assert table.z.tolist() == [0]


@pytest.mark.parametrize(
    ("hook_name", "d_out", "reason"),
    [
        ("blocks.3.hook_resid_post", 8, None),
        ("blocks.3.hook_mlp_out", 8, None),
        ("blocks.3.attn.hook_z", 8, "does not write to the residual stream"),
        ("blocks.3.mlp.hook_post", 32, "does not write to the residual stream"),
        ("blocks.3.hook_resid_post", 9, "writes 9 dimensions, the unembedding reads 8"),
    ],
)
def test_only_hooks_that_write_to_the_residual_stream_have_a_table(hook_name, d_out, reason):
    found = logits.why_no_table(hook_name, d_out, 8)
    assert found is None if reason is None else reason in found
