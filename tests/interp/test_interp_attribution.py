from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError, TextError
from saelab.interp.attribution import attribute
from saelab.interp.feature_gradients import decomposed, recomposed
from saelab.interp.patch_metrics import log_probability, logit_difference
from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE, Metadata
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.sae.transcoder import TranscoderConfig

HOOK = "blocks.1.hook_resid_post"
TEXT, CORRUPT = "the old river and the tower", "the old music and the tower"
REFERENCE = ("water and light", "the city of the king")
METRIC = logit_difference(40, 41)


def random_sae(model, hook_name: str = HOOK, *, k: int | None = None, seed: int = 0) -> SAE:
    """An untrained SAE, so that features and error both matter; TopK where ``k`` is given, else ReLU."""
    cfg = ReLUConfig(d_sae=3 * model.d_model) if k is None else TopKConfig(d_sae=3 * model.d_model, k=k)
    sae = new_sae(cfg, d_in=model.d_model, generator=torch.Generator().manual_seed(seed))
    sae.metadata = Metadata(model_name="tiny", hook_name=hook_name)
    return sae


def perfect_sae(model, hook_name: str = HOOK) -> SAE:
    """Two features for each coordinate, one for its positive and one for its negative part: nothing is left over."""
    sae = new_sae(ReLUConfig(d_sae=2 * model.d_model), d_in=model.d_model)
    eye = torch.eye(model.d_model)
    with torch.no_grad():
        sae.encoder.copy_(torch.cat([eye, -eye]))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    sae.metadata = Metadata(model_name="tiny", hook_name=hook_name)
    return sae


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("baseline", [{"corrupt": CORRUPT}, {"reference": REFERENCE}, {}])
def test_attributions_add_up_to_the_effect_the_better_the_more_steps(tiny_model, k, baseline):
    sae = random_sae(tiny_model, k=k)
    gaps = [abs(attribute(tiny_model, sae, TEXT, METRIC, steps=steps, **baseline).gap) for steps in (2, 8, 128)]
    effect = attribute(tiny_model, sae, TEXT, METRIC, **baseline).effect
    assert abs(effect) > 0.1
    # a path that begins at 0 begins where norms turn round at once, which takes more steps
    assert gaps[2] < (2e-3 if baseline else 1e-2) * abs(effect) + 1e-4
    assert gaps[2] < gaps[0] / 10


def test_attributions_are_slopes_times_differences(tiny_model):
    """One step is the slope at the middle of the path; there a feature is moved by hand."""
    sae = random_sae(tiny_model)
    found = attribute(tiny_model, sae, TEXT, METRIC, corrupt=CORRUPT, steps=1)
    middle = (recomposed(sae, found.clean) + recomposed(sae, found.baseline)) / 2
    ids = torch.tensor(found.token_ids)[None]

    def metric_at(acts: torch.Tensor) -> float:
        with tiny_model.edit(HOOK, lambda old, keep: acts.expand_as(old)):
            return float(METRIC(tiny_model.logits(ids)))

    for part in found.top(6, errors=False):
        step = torch.zeros_like(middle)
        step[part.position] = 0.02 * sae.W_dec[part.feature].detach()
        slope = (metric_at(middle + step) - metric_at(middle - step)) / 0.04
        assert part.attribution == pytest.approx(slope * (part.act - part.baseline_act), rel=0.02, abs=2e-3)


def test_on_the_residual_stream_a_corrupt_baseline_is_the_corrupt_run(tiny_model):
    found = attribute(tiny_model, random_sae(tiny_model), TEXT, METRIC, corrupt=CORRUPT)
    for text, value in ((TEXT, found.clean_value), (CORRUPT, found.baseline_value)):
        assert value == pytest.approx(float(METRIC(tiny_model.logits(tiny_model.to_tokens(text).ids))), abs=1e-4)


def test_an_sae_that_explains_everything_leaves_nothing_to_the_error(tiny_model):
    found = attribute(tiny_model, perfect_sae(tiny_model), TEXT, METRIC, corrupt=CORRUPT, steps=64)
    assert found.error.abs().max() < 1e-5
    assert float(found.features.sum()) == pytest.approx(found.effect, rel=2e-3)


def test_an_sae_that_explains_nothing_leaves_everything_to_the_error(tiny_model):
    sae = random_sae(tiny_model)
    with torch.no_grad():
        sae.W_dec.zero_()
    found = attribute(tiny_model, sae, TEXT, METRIC, corrupt=CORRUPT, steps=64)
    assert not found.features.any()
    assert float(found.error.sum()) == pytest.approx(found.effect, rel=2e-3)


def test_nothing_is_attributed_to_tokens_before_the_first_difference(tiny_model):
    found = attribute(tiny_model, random_sae(tiny_model), TEXT, METRIC, corrupt=CORRUPT)
    first = next(
        i
        for i, (ours, theirs) in enumerate(
            zip(*(tiny_model.to_tokens(text).ids[0].tolist() for text in (TEXT, CORRUPT)), strict=True)
        )
        if ours != theirs
    )
    assert first > 1
    assert not found.per_token()[:first].any()
    assert found.per_token()[first].abs() > 0


@pytest.mark.parametrize("baseline", [{}, {"reference": REFERENCE}])
def test_nothing_is_attributed_to_bos(tiny_model, baseline):
    found = attribute(tiny_model, random_sae(tiny_model), TEXT, METRIC, **baseline)
    assert not found.features[0].any()
    assert found.error[0] == 0
    assert not found.active[0].any()


def test_a_mean_baseline_is_the_mean_over_tokens_but_bos(tiny_model):
    sae = random_sae(tiny_model)
    found = attribute(tiny_model, sae, TEXT, METRIC, reference=REFERENCE)
    acts = torch.cat([tiny_model.capture(tiny_model.to_tokens(t).ids, [HOOK])[HOOK][0, 1:] for t in REFERENCE])
    parts = decomposed(sae, acts)
    torch.testing.assert_close(found.baseline.feature_acts[2], parts.feature_acts.mean(0))
    torch.testing.assert_close(found.baseline.error[3], parts.error.mean(0))


def test_the_top_is_sorted_and_holds_features_and_errors(tiny_model):
    found = attribute(tiny_model, random_sae(tiny_model), TEXT, METRIC)
    everything = found.top(10**6)
    sizes = [abs(part.attribution) for part in everything]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(part.attribution for part in everything) == pytest.approx(found.effect - found.gap, abs=1e-3)
    assert found.top(5) == everything[:5]
    assert any(part.feature is None for part in everything)
    assert all(part.feature is not None for part in found.top(50, errors=False))
    for part in found.top(3, errors=False):
        assert part.act == float(found.clean.feature_acts[part.position, part.feature])


def test_any_callable_is_a_metric(tiny_model):
    sae = random_sae(tiny_model)
    ours = attribute(tiny_model, sae, TEXT, log_probability(40), corrupt=CORRUPT)
    theirs = attribute(tiny_model, sae, TEXT, lambda logits: logits[:, -1].log_softmax(-1)[:, 40], corrupt=CORRUPT)
    torch.testing.assert_close(ours.features, theirs.features)


def test_edits_are_undone_after_an_error_in_the_metric(tiny_model):
    def stopped(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the user pressed stop")

    ids = tiny_model.to_tokens(TEXT).ids
    before = tiny_model.logits(ids)
    with pytest.raises(RuntimeError):
        attribute(tiny_model, random_sae(tiny_model), TEXT, stopped)
    assert tiny_model.active_hooks() == []
    torch.testing.assert_close(tiny_model.logits(ids), before, rtol=0, atol=0)


def test_mistakes_are_told(tiny_model):
    sae = random_sae(tiny_model)
    with pytest.raises(ConfigError, match="leave one of them out"):
        attribute(tiny_model, sae, TEXT, METRIC, corrupt=CORRUPT, reference=REFERENCE)
    with pytest.raises(ConfigError, match="at least one reference text"):
        attribute(tiny_model, sae, TEXT, METRIC, reference=[])
    with pytest.raises(ConfigError, match="at least 1 step"):
        attribute(tiny_model, sae, TEXT, METRIC, steps=0)
    with pytest.raises(TextError, match="tokens"):
        attribute(tiny_model, sae, TEXT, METRIC, corrupt="the river")
    with pytest.raises(TextError, match="at least one word"):
        attribute(tiny_model, sae, "", METRIC)
    with pytest.raises(ConfigError, match="gradient"):
        attribute(tiny_model, sae, TEXT, lambda logits: logits[:, -1].argmax(-1).float())
    with pytest.raises(ShapeError, match="runs"):
        attribute(tiny_model, sae, TEXT, lambda logits: logits.sum())
    transcoder = new_sae(TranscoderConfig(d_sae=64), d_in=tiny_model.d_model)
    transcoder.metadata = Metadata(hook_name=HOOK)
    with pytest.raises(ConfigError, match="does not reconstruct"):
        attribute(tiny_model, transcoder, TEXT, METRIC)
    narrow = new_sae(TopKConfig(d_sae=8, k=2), d_in=7)
    narrow.metadata = Metadata(hook_name=HOOK)
    with pytest.raises(ShapeError, match="width"):
        attribute(tiny_model, narrow, TEXT, METRIC)
