from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.errors import ArtifactError, ConfigError
from saelab.evals.reconstruction import EvalConfig, evaluate, report
from saelab.metrics import METRICS
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.jumprelu import JumpReLUConfig

HOOK = "blocks.1.hook_resid_post"


class HeldOut(ActivationStore):
    """A store in memory: random token sequences with the activations that the tiny model has on them."""

    hook_names = (HOOK,)
    context = 16

    def __init__(self, model, n_rows: int = 24) -> None:
        self.path = Path("held-out")
        self.ids = torch.randint(5, model.d_vocab, (n_rows, self.context), generator=torch.Generator().manual_seed(0))
        self.ids[:, 0] = model.bos_id
        self.all_acts = model.capture(self.ids, [HOOK])[HOOK]

    def rows(self, split: str = "all") -> np.ndarray:
        assert split == "held_out"
        return np.arange(len(self.ids))

    def tokens(self, rows: np.ndarray) -> Tensor:
        return self.ids[torch.as_tensor(rows)]

    def acts(self, hook_name: str, rows: np.ndarray) -> Tensor:
        return self.all_acts[torch.as_tensor(rows)]


@pytest.fixture(scope="module")
def store(tiny_model):
    return HeldOut(tiny_model)


def sae_of(model, *, W: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"], b_enc: float = 0.0):
    """pre = (x - b_dec) W^T + b_enc, x_hat = relu(pre) W + b_dec."""
    sae = new_sae(JumpReLUConfig(d_sae=len(W)), d_in=W.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter, value in (
            (sae.encoder, W),
            (sae.W_dec, W),
            (sae.b_dec, b_dec),
            (sae.b_enc, torch.full((len(W),), b_enc)),
        ):
            parameter.copy_(value)
        sae.threshold.zero_()
    sae.metadata = Metadata(model_name="tiny", hook_name=HOOK)
    return sae


def perfect_sae(model):
    """Each axis and its negative: relu(x) - relu(-x) = x."""
    eye = torch.eye(model.d_model)
    return sae_of(model, W=torch.cat([eye, -eye]), b_dec=torch.zeros(model.d_model))


def mean_sae(model, store):
    """Never fires, so it always answers the mean activation."""
    acts = store.all_acts[:, 1:].reshape(-1, model.d_model).float()
    return sae_of(model, W=torch.eye(model.d_model), b_dec=acts.mean(0), b_enc=-1e6)


def test_a_perfect_sae_recovers_everything(tiny_model, store):
    metrics = evaluate(perfect_sae(tiny_model), store, tiny_model, EvalConfig(draws=50)).metrics
    assert metrics["explained_variance"].value == pytest.approx(1.0, abs=1e-5)
    assert metrics["ce_recovered"].value == pytest.approx(1.0, abs=1e-3)
    assert metrics["kl_recovered"].value == pytest.approx(1.0, abs=1e-3)
    assert metrics["l0"].value == pytest.approx(tiny_model.d_model, rel=0.02)
    assert metrics["dead_fraction"].value == 0.0


def test_the_mean_explains_nothing_and_all_features_are_dead(tiny_model, store):
    metrics = evaluate(mean_sae(tiny_model, store), store, tiny_model, EvalConfig(draws=50)).metrics
    assert metrics["explained_variance"].value == pytest.approx(0.0, abs=1e-5)
    assert (metrics["l0"].value, metrics["dead_fraction"].value) == (0.0, 1.0)


def test_an_sae_that_answers_zero_equals_zero_ablation(tiny_model, store):
    nothing = sae_of(tiny_model, W=torch.eye(tiny_model.d_model), b_dec=torch.zeros(tiny_model.d_model), b_enc=-1e6)
    metrics = evaluate(nothing, store, tiny_model, EvalConfig(draws=50)).metrics
    assert metrics["ce_recovered"].value == pytest.approx(0.0, abs=1e-5)
    assert metrics["kl_recovered"].value == pytest.approx(0.0, abs=1e-5)
    assert metrics["ce_sae"].value == pytest.approx(metrics["ce_zero"].value)


def test_clean_cross_entropy_is_the_models_own(tiny_model, store):
    metrics = evaluate(perfect_sae(tiny_model), store, tiny_model, EvalConfig(draws=50)).metrics
    ids = store.tokens(store.rows("held_out"))
    logits = tiny_model.logits(ids)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert metrics["ce_clean"].value == pytest.approx(float(expected), rel=1e-4)


def test_explained_variance_is_one_ratio_of_sums_whatever_the_batches(tiny_model, store):
    generator = torch.Generator().manual_seed(1)
    sae = sae_of(
        tiny_model,
        W=torch.randn(40, tiny_model.d_model, generator=generator) / 8,
        b_dec=torch.zeros(tiny_model.d_model),
    )
    acts = store.all_acts[:, 1:].reshape(-1, tiny_model.d_model).float()
    with torch.no_grad():
        expected = 1 - (acts - sae(acts)).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum()
    for batch_rows in (1, 5, 24):
        value = (
            evaluate(sae, store, tiny_model, EvalConfig(draws=20, batch_rows=batch_rows))
            .metrics["explained_variance"]
            .value
        )
        assert value == pytest.approx(float(expected), rel=1e-4)


def test_bos_is_neither_counted_nor_replaced(tiny_model, store):
    evaluation = evaluate(perfect_sae(tiny_model), store, tiny_model, EvalConfig(draws=20))
    assert evaluation.n_tokens == 24 * 15
    assert evaluation.fired.max() <= evaluation.n_tokens


def test_every_metric_is_inside_its_interval_and_has_a_definition(tiny_model, store):
    result = report(evaluate(perfect_sae(tiny_model), store, tiny_model, EvalConfig(draws=200)))
    for name, part in result["metrics"].items():
        assert name in METRICS
        assert part["low"] - 1e-9 <= part["value"] <= part["high"] + 1e-9, name
        assert part["n_tokens"] == 24 * 15
        assert math.isfinite(part["value"])
    assert sum(result["log10_density"]["counts"]) + result["log10_density"]["n_dead"] == 2 * tiny_model.d_model


def test_a_token_of_outlying_norm_counts_apart(tiny_model, store):
    plain = evaluate(perfect_sae(tiny_model), store, tiny_model, EvalConfig(draws=20))
    strict = evaluate(perfect_sae(tiny_model), store, tiny_model, EvalConfig(draws=20, outlier_factor=1.05))
    assert plain.n_outliers == 0
    assert 0 < strict.n_outliers < strict.n_tokens


def test_the_wrong_hook_is_refused(tiny_model, store):
    sae = perfect_sae(tiny_model)
    sae.metadata = Metadata(model_name="tiny", hook_name="blocks.0.hook_resid_post")
    with pytest.raises(ArtifactError, match=r"the SAE reads blocks.0.hook_resid_post, but held-out holds blocks.1"):
        evaluate(sae, store, tiny_model, EvalConfig())


def test_evaluation_leaves_no_trace(tiny_model, store):
    ids = store.tokens(np.arange(2))
    before = tiny_model.logits(ids)
    evaluate(perfect_sae(tiny_model), store, tiny_model, EvalConfig(draws=20))
    torch.testing.assert_close(tiny_model.logits(ids), before, rtol=0, atol=0)


def test_an_outlier_limit_below_the_median_is_refused():
    with pytest.raises(ConfigError, match=r"above 1, got 1\.0"):
        EvalConfig(outlier_factor=1.0)
