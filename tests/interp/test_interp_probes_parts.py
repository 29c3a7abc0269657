"""What probes are made of: the split by groups, the figures, the pooling; each in closed form or against a peer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saelab.errors import ConfigError, TextError
from saelab.interp.labelled_files import LabelledFile
from saelab.interp.linear_fits import mean_difference_fit, sparse_fit
from saelab.interp.pooled_acts import pooled_acts
from saelab.interp.probe_data import ProbeSource, ProbeTexts, halves, normalised, read_probe_texts
from saelab.interp.probe_scores import (
    auroc_of,
    calibrated,
    figure_values,
    probe_figures,
)
from saelab.interp.word_control import word_control
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.topk import TopKConfig

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
TEXTS = ["the river", "the long river of the south", " city"]


def some_scores(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    return np.round(rng.normal(size=n) + positive, 1), positive  # rounded, so that some are equal


def grouped(n_groups: int, size: int, **fields: object) -> ProbeTexts:
    texts = [f"template {g} says {i}" for g in range(n_groups) for i in range(size)]
    labels = [i % 2 for g in range(n_groups) for i in range(size)]
    return ProbeTexts.of(texts, labels, groups=[g for g in range(n_groups) for _ in range(size)], **fields)


# --- groups


def test_no_group_is_in_two_parts():
    data = grouped(30, 4)
    parts = halves(data, seed=3)
    pieces = [data.groups[parts.train], data.groups[parts.test]]
    assert not set(pieces[0]) & set(pieces[1])
    assert sorted([*parts.train, *parts.test]) == list(range(120))
    for fitted, held in parts.folds:
        assert not set(pieces[0][fitted]) & set(pieces[0][held])
    assert sorted(np.concatenate([held for _, held in parts.folds])) == list(range(len(parts.train)))


def test_copies_of_a_text_stay_together_where_nothing_names_a_group():
    texts = [f"text {i}" for i in range(40)] + [f"  TEXT, {i}! " for i in range(40)]
    data = ProbeTexts.of(texts, [i % 2 for i in range(80)])
    assert data.n_groups == 40
    assert "copies stay together" in data.grouped_by
    assert normalised("Ça -- va?") == normalised("ça va")
    parts = halves(data, seed=0)
    assert not {normalised(texts[i]) for i in parts.train} & {normalised(texts[i]) for i in parts.test}


def test_a_part_of_the_texts_is_taken_in_whole_groups():
    data = grouped(20, 6)
    part = data.some(50, seed=1)
    assert len(part.texts) == 48
    assert all((part.groups == g).sum() == 6 for g in set(part.groups.tolist()))
    assert part.some(1000, seed=1) is part
    assert set(part.texts) != set(data.some(50, seed=2).texts)


def test_files_are_filtered_and_grouped(tmp_path: Path):
    path = tmp_path / "cities.jsonl"
    lines = [
        {"set": "cities" if i < 60 else "other", "statement": f"The city of C{i // 2} is in L{i}.", "label": i % 2}
        for i in range(90)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    file = LabelledFile(path=path, text="statement")
    data = read_probe_texts(ProbeSource(file=file, where={"set": "cities"}, group_pattern="city of (.+) is"))
    assert (len(data.texts), data.n_groups, data.classes) == (60, 30, ("0", "1"))
    assert "finds in it" in data.grouped_by
    assert data.name.endswith("/cities/cities")
    by_field = read_probe_texts(ProbeSource(file=file, group="set", positive="0"))
    assert (by_field.n_groups, by_field.classes) == (2, ("1", "0"))
    assert by_field.positive.tolist() == [i % 2 == 0 for i in range(90)]
    for wrong, sentence in (
        ({"where": {"set": "citys"}}, "did you mean cities"),
        ({"where": {"st": "cities"}}, "no field 'st'"),
        ({"group": "sett"}, "no field 'sett'"),
        ({"group_pattern": "town of (.+)"}, "finds nothing in 'The city of C0"),
        ({"positive": "yes"}, "no label 'yes'"),
    ):
        with pytest.raises(TextError, match=sentence):
            read_probe_texts(ProbeSource(file=file, **wrong))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"group": "a", "group_pattern": "b"}, "leave one of them out"),
        ({"group_pattern": "("}, "no regular expression"),
        ({"texts": 0}, "at least 1"),
    ],
)
def test_sources_that_make_no_sense_are_refused(wrong: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        ProbeSource(file=LabelledFile(path=Path("a.csv")), **wrong)


def test_too_few_texts_groups_or_classes_are_refused():
    with pytest.raises(TextError, match="9 texts of its rarer class"):
        halves(ProbeTexts.of([f"t{i}" for i in range(100)], [i < 9 for i in range(100)]), seed=0)
    with pytest.raises(TextError, match="in 3 groups in all, but needs 20 and 8"):
        halves(grouped(3, 40), seed=0)
    with pytest.raises(TextError, match="3 labels"):
        ProbeTexts.of(["a", "b", "c"], ["x", "y", "z"])
    assert ProbeTexts.of(["a", "b", "c"], ["x", "y", "z"], positive="y").classes == ("not y", "y")
    with pytest.raises(TextError, match="2 texts have 1 labels"):
        ProbeTexts.of(["a", "b"], ["x"])
    with pytest.raises(TextError, match="has only one class"):  # all positive texts are of one template
        sizes = [30, 30] + [5] * 12
        groups = [g for g, size in enumerate(sizes) for _ in range(size)]
        halves(ProbeTexts.of([f"t{i}" for i in range(120)], [int(g > 1) for g in groups], groups=groups), seed=0)


# --- figures


def test_the_auroc_and_the_brier_score_are_those_of_scikit_learn():
    from sklearn.metrics import brier_score_loss, roc_auc_score

    scores, positive = some_scores()
    probabilities = 1 / (1 + np.exp(-scores))
    auroc, _, _, brier = figure_values(scores, probabilities, positive)
    assert auroc == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert brier == pytest.approx(brier_score_loss(positive, probabilities), abs=1e-12)


def test_recall_at_few_false_alarms_in_closed_form():
    positive = np.array([False] * 200 + [True] * 4)
    scores = np.concatenate([np.arange(200.0), [199.5, 198.5, 197.5, 196.5]])
    # two of 200 others may pass, 199 and 198: three positives stand above 197
    assert figure_values(scores, np.full(204, 0.5), positive)[1] == pytest.approx(3 / 4)
    few = np.concatenate([scores[100:200], scores[200:]])[1:]  # of 99 others none may pass
    assert figure_values(few, np.full(103, 0.5), positive[101:])[1] == pytest.approx(1 / 4)
    assert figure_values(np.zeros(204), np.full(204, 0.5), positive)[1] == 0


def test_the_calibration_error_in_closed_form():
    probabilities = np.repeat([0.25, 0.95, 1.0], [40, 50, 10])
    positive = np.concatenate([np.arange(40) < 20, np.arange(50) < 40, np.ones(10, bool)])
    # one bin claims 10 of 40 and has 20; the last claims 47.5 + 10 of 60 and has 50: errors do not cancel
    assert figure_values(probabilities, probabilities, positive)[2] == pytest.approx(17.5 / 100)


def test_intervals_hold_their_value_and_widen_with_groups():
    scores, positive = some_scores(400)
    alone = probe_figures(scores, np.full(400, 0.5), positive, np.arange(400), draws=500, seed=0)
    assert alone.auroc.low < alone.auroc.value < alone.auroc.high
    doubled = [np.concatenate([x, x]) for x in (scores, np.full(400, 0.5), positive)]
    same = probe_figures(*doubled, np.tile(np.arange(400), 2), draws=500, seed=0)
    assert same.auroc == pytest.approx(alone.auroc)  # copies in one group add nothing
    by_row = probe_figures(*doubled, np.arange(800), draws=500, seed=0)
    assert by_row.auroc.high - by_row.auroc.low < 0.85 * (same.auroc.high - same.auroc.low)


def test_a_resample_without_a_class_does_no_harm():
    positive = np.array([True] * 3 + [False] * 30)
    groups = np.array([0] * 3 + list(range(1, 31)))
    figures = probe_figures(np.linspace(1, 0, 33), np.full(33, 0.5), positive, groups, draws=200, seed=0)
    assert all(np.isfinite(figures.auroc))
    assert (figures.auroc.value, figures.auroc.low) == (1.0, 0.5)


def test_calibration_recovers_the_true_slope_and_stays_finite_where_classes_do_not_overlap():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20_000) * 100 + 50
    positive = rng.random(20_000) < 1 / (1 + np.exp(-(0.03 * scores - 1)))
    found = calibrated(scores, positive)
    assert found.slope == pytest.approx(0.03, rel=0.05)
    assert found.offset == pytest.approx(-1, abs=0.1)
    split = calibrated(np.concatenate([np.zeros(50), np.ones(50)]), np.arange(100) >= 50)
    assert split.probabilities(np.array([0.0, 1.0])) == pytest.approx([1 / 52, 51 / 52], abs=1e-3)


# --- fits


def test_the_mean_difference_is_zero_halfway():
    rng = np.random.default_rng(0)
    columns, positive = rng.normal(size=(50, 4)), np.arange(50) < 20
    fit = mean_difference_fit(columns, positive)
    above, below = columns[positive].mean(0), columns[~positive].mean(0)
    np.testing.assert_allclose(fit.direction, above - below)
    assert fit.scores(((above + below) / 2)[None])[0] == pytest.approx(0, abs=1e-12)


def test_a_sparse_probe_reads_k_columns_only():
    rng = np.random.default_rng(0)
    columns, positive = rng.normal(size=(200, 30)), np.arange(200) < 100
    columns[:100, [3, 17]] += 2
    fit = sparse_fit(columns, positive, k=2)
    assert np.flatnonzero(fit.direction).tolist() == [3, 17]
    assert auroc_of(fit.scores(columns), positive) > 0.95


def test_the_bag_of_words_finds_a_telling_word_and_nothing_else():
    words = ["red", "blue", "green", "grey"]
    texts = [f"a {words[i % 4]} {'Hat' if i // 4 % 2 else 'coat'} number {i}" for i in range(200)]
    told = ProbeTexts.of(texts, [i // 4 % 2 for i in range(200)])
    parts = halves(told, seed=0)
    found = word_control(texts, told.positive, parts)
    assert auroc_of(found.scores, told.positive[parts.test]) == 1.0
    assert ((found.probabilities > 0.5) == told.positive[parts.test]).all()
    chance = np.random.default_rng(0).permutation(told.positive)
    lost = word_control(texts, chance, parts)
    assert 0.3 < auroc_of(lost.scores, chance[parts.test]) < 0.7


# --- pooling


@pytest.fixture(scope="module")
def sae(tiny_model):
    sae = new_sae(
        TopKConfig(d_sae=2 * tiny_model.d_model, k=3),
        d_in=tiny_model.d_model,
        generator=torch.Generator().manual_seed(0),
    )
    sae.metadata = Metadata(model_name="tiny", hook_name=HOOKS[1])
    return sae.eval()


@pytest.mark.parametrize("position", ["last", "mean", "max", "0", "1", "-1", "-2"])
def test_positions_are_those_of_each_text_alone(tiny_model, sae, position: str):
    texts = TEXTS[:2] if position in ("1", "-2") else TEXTS  # the third has one token
    found = pooled_acts(tiny_model, texts, HOOKS, position=position, max_tokens=64, sae=sae, batch_texts=2)
    pick = {
        "last": lambda x: x[-1],
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.amax(0),
    }.get(position, lambda x: x[int(position)])
    for i, text in enumerate(texts):
        ids, mask = tiny_model.to_tokens(text)
        acts = {name: a[0, 1:].float() for name, a in tiny_model.capture(ids, HOOKS, mask).items()}
        for name in HOOKS:
            np.testing.assert_allclose(found.acts[name][i], pick(acts[name]), rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            features = pick(sae.encode(acts[HOOKS[1]]))
        np.testing.assert_allclose(found.feature_acts[i], features, rtol=1e-3, atol=1e-4)


def test_norms_and_counts_are_of_all_tokens_read(tiny_model):
    found = pooled_acts(tiny_model, TEXTS, HOOKS[:1], position="last", max_tokens=3)
    lengths = [len(tiny_model.encode(text)) for text in TEXTS]
    assert found.n_tokens == sum(min(n, 3) for n in lengths)
    assert found.n_cut == sum(n > 3 for n in lengths)
    whole = pooled_acts(tiny_model, ["the river"], HOOKS[:1], position="last", max_tokens=64)
    ids, mask = tiny_model.to_tokens("the river")
    acts = tiny_model.capture(ids, HOOKS[:1], mask)[HOOKS[0]][0, 1:].float()
    assert whole.mean_norms[HOOKS[0]] == pytest.approx(float(acts.norm(dim=-1).mean()), rel=1e-4)
    assert whole.feature_acts is None


def test_a_text_without_the_position_is_named(tiny_model):
    with pytest.raises(TextError, match="' city' has 1 tokens, and none at position 1"):
        pooled_acts(tiny_model, TEXTS, HOOKS[:1], position="1", max_tokens=64)
    with pytest.raises(TextError, match="'' has no token"):
        pooled_acts(tiny_model, ["the river", ""], HOOKS[:1], position="mean", max_tokens=64)
    with pytest.raises(ConfigError, match="must be last, mean, max"):
        pooled_acts(tiny_model, TEXTS, HOOKS[:1], position="first", max_tokens=64)
