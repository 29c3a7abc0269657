"""Whole studies of probes on a tiny model, the probes that they leave, and the picture; and two real data sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from saelab.errors import ArtifactError, ConfigError, ShapeError
from saelab.interp.labelled_files import LabelledFile
from saelab.interp.probe_data import ProbeSource, ProbeTexts, read_probe_texts
from saelab.interp.probe_direction import Probe
from saelab.interp.probe_plot import layer_sweep_svg
from saelab.interp.probe_report import sentences, tables, to_json
from saelab.interp.probe_scores import auroc_of
from saelab.interp.probes import ProbeConfig, permuted_labels, probe
from saelab.interp.steering import add_direction, steer
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.topk import TopKConfig

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
QUICK = ProbeConfig(position="mean", shuffles=4, draws=50, ks=(1, 5))


@pytest.fixture(scope="module")
def sae(tiny_model):
    sae = new_sae(
        TopKConfig(d_sae=4 * tiny_model.d_model, k=8),
        d_in=tiny_model.d_model,
        generator=torch.Generator().manual_seed(0),
    )
    sae.metadata = Metadata(model_name="tiny", hook_name="blocks.1.resid_post")
    return sae.eval()


@pytest.fixture(scope="module")
def places() -> ProbeTexts:
    """Rivers and cities: a tiny model tells them apart by their tokens, and so does a bag of words."""
    texts = [f"the long {'river' if i % 2 else 'city'} of {i // 2} south" for i in range(80)]
    return ProbeTexts.of(texts, ["river" if i % 2 else "city" for i in range(80)], groups=[i // 2 for i in range(80)])


@pytest.fixture(scope="module")
def study(tiny_model, sae, places):
    return probe(tiny_model, places, HOOKS, sae=sae, config=QUICK)


def test_every_probe_finds_what_is_there(study):
    names = [result.probe.name for result in study.results]
    assert names == [f"{m}_{h}" for h in HOOKS for m in ("logistic", "mean_difference")] + [
        f"sae_k1_{HOOKS[1]}",
        f"sae_k5_{HOOKS[1]}",
    ]
    for result in study.results[:4]:
        assert result.figures.auroc.value > 0.95
    assert study.words.auroc.value == 1.0
    assert all(result.over_words.value <= 0 for result in study.results)  # no probe beats words that tell everything
    assert study.best.validation_auroc == max(result.validation_auroc for result in study.results)


def test_shuffled_labels_are_found_by_no_probe(tiny_model, places):
    config = ProbeConfig(position="mean", shuffles=20, draws=50)
    for result in probe(tiny_model, places, HOOKS[1], config=config).results:
        assert result.shuffled.auroc.value == pytest.approx(0.5, abs=0.1)
        assert result.shuffled.auroc.high < result.figures.auroc.low


def test_permuted_labels_keep_their_number_and_lie_in_every_part(study):
    positive = study.data.positive
    permuted = permuted_labels(positive, study.parts, 20, seed=0)
    assert len({labels.tobytes() for labels in permuted}) == 20
    for labels in permuted:
        assert labels.sum() == positive.sum()
        assert 0 < labels[study.parts.test].sum() < len(study.parts.test)


def test_copies_across_the_split_are_what_shuffled_labels_would_show(tiny_model):
    """Each text twice: by rows the probe is tested on texts that it has seen, by groups it is not."""
    rng = np.random.default_rng(0)
    words = ["the", "of", "and", "to", "in", "river", "city", "south", "north", "house"]
    texts = [" ".join(rng.choice(words, 12)) for _ in range(120)]
    labels = rng.random(120) < 0.5
    doubled, twice = texts * 2, np.tile(labels, 2).tolist()
    config = ProbeConfig(position="last", methods=("logistic",), shuffles=1, draws=50)
    apart = probe(tiny_model, ProbeTexts.of(doubled, twice, groups=range(240)), HOOKS[1], config=config)
    together = probe(tiny_model, ProbeTexts.of(doubled, twice), HOOKS[1], config=config)
    assert together.data.n_groups == 120
    assert together.results[0].figures.auroc.value < apart.results[0].figures.auroc.value - 0.05


def test_a_probe_is_kept_with_all_that_it_says(tiny_model, sae, study, tmp_path: Path):
    acts = torch.randn(3, 5, tiny_model.d_model)
    for result in study.results:
        one = result.probe
        one.save(tmp_path / one.name)
        back = Probe.load(tmp_path / one.name)
        assert back.about == one.about
        torch.testing.assert_close(back.direction, one.direction)
        torch.testing.assert_close(back.scores(acts, sae=sae), one.scores(acts, sae=sae))
        texts = study.data.texts[:6]
        scores = back.score_texts(tiny_model, texts, sae=sae)
        np.testing.assert_allclose(scores, one.score_texts(tiny_model, texts, sae=sae), rtol=1e-4, atol=1e-5)
    best = study.best.probe
    scores = best.score_texts(tiny_model, study.data.texts, sae=sae)
    test = study.parts.test
    assert auroc_of(scores[test], study.data.positive[test]) == pytest.approx(study.best.figures.auroc.value)
    probabilities = best.probabilities(scores)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    assert probabilities[study.data.positive].mean() > probabilities[~study.data.positive].mean()


def test_the_direction_of_a_sparse_probe_is_what_its_features_write(sae, study):
    one = study.results[-1].probe
    assert one.features is not None
    assert len(one.features) == 5
    expected = sum(w * sae.W_dec.detach()[i] for i, w in zip(one.features, one.feature_weights, strict=True))
    torch.testing.assert_close(one.direction, expected)
    with pytest.raises(ConfigError, match="give the SAE as well"):
        one.scores(torch.zeros(1, len(one.direction)))
    with pytest.raises(ShapeError, match="reads activations of width"):
        one.scores(torch.zeros(1, 3), sae=sae)


def test_steering_along_a_probe_raises_its_score(tiny_model, study):
    one = study.results[2].probe
    ids, mask = tiny_model.to_tokens("the house of the north")

    def score() -> float:
        acts = tiny_model.capture(ids, [one.hook_name], mask)[one.hook_name][:, 1:]
        return float(one.scores(acts).mean())

    before = score()
    with steer(tiny_model, add_direction(one.hook_name, one.direction, strength=0.5, mean_norm=one.mean_norm)):
        assert score() - before == pytest.approx(0.5 * one.mean_norm * float(one.direction.norm()), rel=0.02)
    assert score() == before


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("about.json", b"{", "not readable"),
        ("about.json", b'{"schema": 2}', "not of schema 1"),
        ("about.json", b'{"schema": 1}', "is damaged: method must be set"),
        ("direction.safetensors", b"torn", "not readable"),
    ],
)
def test_damaged_probes_are_refused(study, tmp_path: Path, file: str, content: bytes, sentence: str):
    study.best.probe.save(tmp_path / "p")
    (tmp_path / "p" / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=sentence):
        Probe.load(tmp_path / "p")


def test_every_figure_stands_beside_both_controls(study):
    content = json.loads(json.dumps(to_json(study), allow_nan=False))
    made = tables(content)
    assert [table.title.partition(":")[0] for table in made] == ["auroc", "recall_at_1_percent", "ece", "brier"]
    for table in made:
        assert {"shuffled labels", "bag of words"} <= set(table.header)
        assert all(len(row) == len(table.header) for row in table.rows)
        assert len(table.rows) == len(study.results)
    text = " ".join(sentences(content))
    assert "groups as given" in text
    assert "1 % false alarms means none" in text
    assert f"{study.n_tokens:,} tokens" in text


def test_the_picture_of_a_sweep_holds_a_mark_for_every_probe(study):
    root = ElementTree.fromstring(layer_sweep_svg(to_json(study)))
    said = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    for result in study.results:
        assert any(s.startswith(f"{result.probe.about.method} at {result.probe.hook_name}: ") for s in said)
    assert "bag of words" in "".join(root.itertext())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"position": "middle"}, "last, mean, max"),
        ({"shuffles": 0}, "shuffles must be at least 1"),
        ({"ks": (0,)}, "at least 1"),
        ({"methods": (), "ks": ()}, "no probe to train"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        ProbeConfig(**wrong)


def test_what_does_not_fit_is_refused_before_the_model_reads(tiny_model, sae, places):
    with pytest.raises(ConfigError, match="nothing to probe"):
        probe(tiny_model, places)
    with pytest.raises(ConfigError, match="has no hook"):
        probe(tiny_model, places, "blocks.9.hook_resid_post")
    with pytest.raises(ConfigError, match="ks holds 999"):
        probe(tiny_model, places, sae=sae, config=ProbeConfig(ks=(999,)))
    other = new_sae(TopKConfig(d_sae=8, k=2), d_in=5)
    other.metadata = Metadata(hook_name=HOOKS[0])
    with pytest.raises(ConfigError, match="reads width 5"):
        probe(tiny_model, places, sae=other)


# --- the demo model

DATA = os.environ.get("SAELAB_PROBE_DATA")
SST2 = ProbeSource(file=LabelledFile(path=Path(DATA or "") / "sst2" / "train.jsonl.gz"), texts=800)
CITIES = ProbeSource(
    file=LabelledFile(path=Path(DATA or "") / "true-false" / "statements.jsonl.gz", text="statement"),
    where={"set": "cities"},
    group_pattern="city of (.+) is in",
)


@pytest.mark.demo
@pytest.mark.long
@pytest.mark.skipif(DATA is None, reason="SAELAB_PROBE_DATA names no folder with sst2/ and true-false/")
@pytest.mark.parametrize(("source", "position"), [(SST2, "mean"), (CITIES, "last")], ids=["sentiment", "cities"])
def test_the_demo_model_knows_more_than_its_words(demo_model, source: ProbeSource, position: str):
    data = read_probe_texts(source)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (10, 16, 22)]
    study = probe(demo_model, data, hooks, config=ProbeConfig(position=position))
    print("\n".join(sentences(to_json(study))))
    for result in study.results:
        assert result.shuffled.auroc.value == pytest.approx(0.5, abs=0.03)
    assert study.best.over_words.low > 0
    assert study.best.figures.auroc.low > study.best.shuffled.auroc.high
