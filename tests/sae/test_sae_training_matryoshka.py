"""Matryoshka BatchTopK: its loss and gradient by hand, and what its prefixes are."""

from __future__ import annotations

import collections

import pytest
import torch

from saelab import config as configs
from saelab.errors import ConfigError
from saelab.sae.architectures import new_sae
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.jumprelu import JumpReLU
from saelab.sae.matryoshka import MatryoshkaConfig, random_prefix_ends
from saelab.train.fused import fused_step_
from saelab.train.optim import OptimConfig, adam, set_lr_
from saelab_kernels.revive import packed
from saelab_kernels.step import reference as step_reference

D_IN, D_SAE = 12, 200
DEAD = torch.arange(D_SAE) < 40
CONFIGS = [
    MatryoshkaConfig(d_sae=D_SAE, k=6),
    MatryoshkaConfig(d_sae=D_SAE, k=6, prefix_weights=(3.0, 0.0, 1.0, 2.0, 4.0)),
    MatryoshkaConfig(d_sae=D_SAE, k=6, random_prefixes=4),
    MatryoshkaConfig(d_sae=D_SAE, k=6, group_shares=()),
]


@pytest.fixture(autouse=True)
def _float32_revival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.dispatch, "bfloat16_units", lambda _: False)


def make(config, *, d_in: int = D_IN):
    sae = new_sae(config, d_in=d_in, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, d_in))
        sae.b_enc.copy_(torch.linspace(-0.1, 0.1, len(sae.b_enc)))
    return sae


def test_loss_and_gradient_by_hand():
    sae = make(MatryoshkaConfig(d_sae=3, k=1, group_shares=(1 / 3,), aux_coefficient=0.0), d_in=2).double()
    assert sae.cfg.group_ends == (1, 3)
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.0, -5.0]))
        sae.b_dec.zero_()
    acts = torch.tensor([[3.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    losses = sae.training_loss(acts)
    # of (3, 1, -1) and (0.5, 2, -2.5) a batch keeps two: 3 and 2
    # prefix 1: recon (3, 0) and (0, 0), errors (0, -1) and (-0.5, -2); prefix 2: (3, 0) and (0, 4), (0, -1), (-0.5, 2)
    first, second = (1 + 0.25 + 4) / 4, (1 + 0.25 + 4) / 4
    assert losses.total.item() == pytest.approx((first + second) / 2)
    assert losses.fired.tolist() == [True, True, False]
    assert losses.l0.item() == 1.0
    assert sae.threshold.item() == 2.0
    losses.total.backward()
    # d total / d error = error / 4 for each of the two prefixes (2 / numel * 1 / 2); feature 0 sees the sum of both
    # errors (0, -2) of its token, feature 1 the second's (-0.5, 2) alone
    torch.testing.assert_close(
        sae.W_dec.grad, torch.tensor([[0.0, 3 * -2 / 4], [2 * -0.5 / 4, 2 * 2 / 4], [0.0, 0.0]]).double()
    )
    # pre-activation gradients: (0, -2)/4 . (1, 0) = 0 and (-0.5, 2)/4 . (0, 2) = 1
    torch.testing.assert_close(sae.encoder.grad, torch.tensor([[0.0, 0.0], [0.5, 2.0], [0.0, 0.0]]).double())
    torch.testing.assert_close(sae.b_enc.grad, torch.tensor([0.0, 1.0, 0.0]).double())
    # outputs: sum of all errors / 4 = ((0, -2) + (-1, 0)) / 4; inputs: minus b_enc's gradient through the encoder
    torch.testing.assert_close(sae.b_dec.grad, torch.tensor([-0.25, -0.5 - 1.0]).double())


def test_with_one_prefix_it_is_batchtopk_bit_for_bit():
    ours, theirs = make(CONFIGS[-1]), make(BatchTopKConfig(d_sae=D_SAE, k=6))
    generator = torch.Generator().manual_seed(0)
    for way in ("autograd", "sparse", "autograd", "sparse"):
        acts = torch.randn(50, D_IN, generator=generator)
        for sae, optimizer in ((ours, adam(ours, OptimConfig())), (theirs, adam(theirs, OptimConfig()))):
            if way == "sparse":
                gradient = sae.training_gradient(acts, dead=DEAD)
                fused_step_(sae, optimizer, gradient.sparse, OptimConfig(), lr=1e-3)
            else:
                sae.training_loss(acts, dead=DEAD).total.backward()
                set_lr_(optimizer, 1e-3)
                optimizer.step()
                optimizer.zero_grad()
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), (way, name)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dead", [None, DEAD])
def test_the_sparse_gradient_is_that_of_the_loss(config, dead):
    acts = torch.randn(50, D_IN)
    sae, twin = make(config), make(config)
    gradient = sae.training_gradient(acts, dead=dead, progress=0.25)
    losses = twin.training_loss(acts, dead=dead, progress=0.25)
    losses.total.backward()
    for ours, theirs in zip(gradient.losses, losses, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    whole = step_reference.written_out(gradient.sparse)
    for name, grad in (
        ("encoder", whole.W_enc),
        ("W_dec", whole.W_dec),
        ("b_enc", whole.b_enc),
        ("b_dec", whole.b_dec),
    ):
        torch.testing.assert_close(grad, getattr(twin, name).grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(sae.threshold, twin.threshold)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loss_and_gradient_agree_with_a_dense_definition_in_float64(config, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    sae, acts = make(config).double(), torch.randn(30, D_IN, dtype=torch.float64)
    pre_acts = sae.pre_acts(acts)
    feature_acts = pre_acts * (pre_acts >= pre_acts.flatten().topk(6 * 30).values.min())
    ends = config.prefix_ends(0.5)
    weights = config.prefix_weights or (1.0,) * len(ends)
    total = sum(
        w * (feature_acts[:, :end] @ sae.W_dec[:end] + sae.b_dec - acts).pow(2).mean()
        for w, end in zip(weights, ends, strict=True)
    ) / sum(weights)
    expected = torch.autograd.grad(total, list(sae.parameters()))
    losses = sae.training_loss(acts, progress=0.5)
    torch.testing.assert_close(losses.total, total)
    for ours, theirs in zip(torch.autograd.grad(losses.total, list(sae.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_random_prefixes_depend_on_the_progress_alone_and_change_with_it():
    config = CONFIGS[2]
    ends = [config.prefix_ends(step / 99) for step in range(100)]
    assert ends == [config.prefix_ends(step / 99) for step in range(100)]
    assert len(set(ends)) > 60
    for lengths in ends:
        assert len(lengths) == len(set(lengths)) == 4
        assert lengths[-1] == D_SAE
        assert list(lengths) == sorted(lengths)


def test_random_lengths_follow_the_truncated_pareto_distribution():
    n, counts = 6000, collections.Counter()
    for i in range(n):
        counts[random_prefix_ends(10, 2, seed=str(i))[0]] += 1
    for m in range(1, 10):
        p = (m**-0.5 - (m + 1) ** -0.5) / (1 - 10**-0.5)
        assert counts[m] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    assert random_prefix_ends(5, 5, seed="all") == (1, 2, 3, 4, 5)


def test_groups_are_shares_of_the_dictionary_with_at_least_one_feature():
    assert MatryoshkaConfig(d_sae=4608).group_ends == (144, 432, 1008, 2160, 4608)
    assert MatryoshkaConfig(d_sae=8, k=1).group_ends == (1, 2, 3, 5, 8)
    assert MatryoshkaConfig(d_sae=8, k=1, group_shares=()).group_ends == (8,)


def test_folding_divides_activations_and_threshold():
    sae, acts = make(CONFIGS[0]), torch.randn(40, D_IN)
    sae.training_loss(acts)
    before, recon, floor = sae.encode(acts), sae(acts), sae.threshold.clone()
    mean, scale = torch.randn(D_IN), 4.0
    sae.fold_(mean, scale)
    torch.testing.assert_close(sae.encode(acts / scale + mean), before / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(acts / scale + mean), recon / scale + mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(sae.threshold, floor / scale)


def test_at_inference_it_is_a_jumprelu_sae():
    sae, acts = make(CONFIGS[0]), torch.randn(40, D_IN)
    sae.training_loss(acts)
    twin = sae.as_jumprelu()
    assert isinstance(twin, JumpReLU)
    assert torch.equal(twin.encode(acts), sae.encode(acts))
    assert 0 < (sae.encode(acts) > 0).sum() < 8 * 40


def test_rows_of_zeros_and_nan_are_not_hidden():
    sae, acts = make(CONFIGS[0]), torch.randn(10, D_IN)
    acts[3] = 0
    losses = sae.training_loss(acts, dead=DEAD)
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())
    acts[4, 2] = torch.nan
    for losses in (sae.training_loss(acts, dead=DEAD), sae.training_gradient(acts, dead=DEAD).losses):
        assert losses.total.isnan()
    assert sae.threshold.isfinite()


def trained_on_families(group_shares: tuple[float, ...]):
    """Each token is one of 4 parents and one of its 5 children, all orthogonal."""
    generator = torch.Generator().manual_seed(0)
    directions = 12**0.5 * torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    sae = new_sae(MatryoshkaConfig(d_sae=32, k=2, group_shares=group_shares), d_in=24, generator=generator)
    optimizer = adam(sae, OptimConfig())
    for step in range(200):
        child = torch.randint(0, 20, (256,), generator=generator)
        acts = directions[20 + child % 4] + directions[child]
        sae.training_loss(acts, progress=step / 199).total.backward()
        sae.project_decoder_grad_()
        set_lr_(optimizer, 1e-2)
        optimizer.step()
        optimizer.zero_grad()
        sae.normalise_decoder_()
    return sae, acts


def test_a_short_prefix_explains_more_by_itself_than_as_many_features_of_batchtopk():
    unexplained = []
    for group_shares in ((4 / 32,), ()):
        sae, acts = trained_on_families(group_shares)
        with torch.no_grad():
            recon = sae.encode(acts)[:, :4] @ sae.W_dec[:4] + sae.b_dec
        unexplained.append(float((acts - recon).pow(2).mean()))
    assert unexplained[0] < 0.6
    assert unexplained[0] < 0.7 * unexplained[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"group_shares": (0.5, 0.5)}, "group_shares must be positive and sum to less than 1"),
        ({"group_shares": (0.5, -0.1)}, "group_shares must be positive"),
        ({"d_sae": 4}, "d_sae=4 is too small for 5 groups"),
        ({"random_prefixes": 0}, "random_prefixes must be between 1 and d_sae=64, got 0"),
        ({"random_prefixes": 65}, "random_prefixes must be between 1 and d_sae=64, got 65"),
        ({"prefix_weights": (1.0, 2.0)}, "prefix_weights needs 5 numbers"),
        ({"prefix_weights": (1.0, 1.0, 1.0, 1.0, 0.0)}, "the last above 0"),
        ({"prefix_weights": (1.0,), "random_prefixes": 2}, "prefix_weights needs 2 numbers"),
        ({"k": 0}, "k must be between 1 and d_sae=64"),
        ({"threshold_momentum": 1.0}, "threshold_momentum must be at least 0 and below 1"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(change, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        MatryoshkaConfig(**({"d_sae": 64, "k": 2} | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_settings_survive_a_file(config):
    settings = configs.to_mapping(config)
    assert settings.pop("arch") == "matryoshka"
    assert configs.from_mapping(MatryoshkaConfig, settings) == config
