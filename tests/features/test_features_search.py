from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from saelab.errors import ArtifactError, ShapeError, TextError
from saelab.features import planted
from saelab.features.index import FeatureIndex
from saelab.features.search import TextCodes, encode_text, features_in_text, rank_features


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> FeatureIndex:
    return planted.plant_index(tmp_path_factory.mktemp("planted"))


def test_a_word_finds_the_feature_that_fires_on_it(index):
    hits = index.search("feet")
    assert hits[0].feature == 0
    assert hits[0].label == '" feet", " foot"'
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_case_and_punctuation_of_a_query_do_not_matter(index):
    assert index.search("FEET!")[0].feature == 0


def test_a_label_that_names_the_word_is_found_though_the_feature_fires_elsewhere(index):
    assert index.search("united")[0].feature == 1  # it fires after " United", never on it


def test_a_query_of_several_words_finds_features_of_each(index):
    assert {hit.feature for hit in index.search("feet in New York", n=3)} >= {0, 2}


def test_rare_words_of_a_query_weigh_more(index):
    common, rare = planted.N_SPECIAL, planted.N_SPECIAL + 20  # both describe their word perfectly
    assert [hit.feature for hit in index.search("word0 word20")[:2]] == [rare, common]


def test_a_query_without_a_word_is_refused(index):
    with pytest.raises(TextError):
        index.search("  \n")
    assert index.search("qqqqq") == []


def test_a_token_finds_the_features_most_specific_to_it(index):
    hits = index.search_token(" York")
    assert hits[0].feature == 2
    assert '" York"' in hits[0].why
    assert index.search_token("york")[0] == hits[0]
    assert index.search_token(planted.YORK) == hits
    counts = [c for c in index.feature(2).tokens if c.token == " York"]
    assert f"{counts[0].n_fired / counts[0].n_occurrences:.0%}" in hits[0].why


def test_an_unknown_token_suggests_known_ones(index):
    with pytest.raises(TextError, match="feet"):
        index.search_token(" feets")
    with pytest.raises(TextError, match="0 to 70"):
        index.search_token(71)


class FakeTokens(NamedTuple):
    ids: torch.Tensor
    mask: torch.Tensor


class FakeModel:
    """Reads words of the planted vocabulary; word i makes feature i fire with strength 1, twice in a row 2."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def to_tokens(self, text):
        ids = torch.tensor([[0, *(self.vocabulary.index(" " + word) for word in text.split())]])
        return FakeTokens(ids, torch.ones_like(ids, dtype=torch.bool))

    def str_tokens(self, ids):
        return [self.vocabulary[i] for i in ids]

    def capture(self, ids, hook_names):
        acts = torch.zeros(*ids.shape, 32)
        for i, token in enumerate(ids[0].tolist()):
            acts[0, i, token % 32] = 1 + float(i > 0 and ids[0, i - 1] == token)
            acts[0, i, 4] = 5.0
        return dict.fromkeys(hook_names, acts)


@pytest.fixture
def model(index):
    return FakeModel(index.vocabulary)


@pytest.fixture
def sae(tmp_path):
    return planted.plant(tmp_path / "planted.json").sae


def test_features_in_a_text_come_by_strength_with_dense_ones_discounted(index, model, sae):
    text = "feet foot foot word5"
    hits = features_in_text(model, sae, index, text)
    assert [hit.feature for hit in hits][:2] == [2, 4]  # foot twice: 2 ln(1/0.014) against 5 ln(1/0.31)
    assert hits[0].why == '2.00 on " foot", fires on 2 of 4 tokens'
    assert features_in_text(model, sae, index, text, discount_dense=False)[0].feature == 4
    assert 4 not in [hit.feature for hit in features_in_text(model, sae, index, text, max_density=0.1)]
    assert len(features_in_text(model, sae, index, text, n=1)) == 1


def test_rankings_by_sum_and_count(index):
    values = np.array([1.0, 1.0, 1.5], np.float32)
    codes = TextCodes(("a", "b"), (7, 8), np.array([0, 1, 0]), np.array([0, 0, 1]), values)
    assert [h.feature for h in rank_features(codes, index, by="max", discount_dense=False)] == [1, 0]
    assert [h.feature for h in rank_features(codes, index, by="sum", discount_dense=False)] == [0, 1]
    assert [h.score for h in rank_features(codes, index, by="count", discount_dense=False)] == [2, 1]


def test_codes_of_a_text_leave_bos_out(index, model, sae):
    codes = encode_text(model, sae, "feet word5")
    assert codes.tokens == (" feet", " word5")
    assert codes.at(0) == [(4, 5.0), (planted.FEET, 1.0)]
    assert codes.acts_of(planted.FEET) == (1.0, 0.0)
    with pytest.raises(ShapeError):
        codes.at(2)


def test_an_empty_or_too_long_text_is_refused(index, model, sae):
    with pytest.raises(TextError, match="no text"):
        encode_text(model, sae, "")
    with pytest.raises(TextError, match="limit is 1"):
        encode_text(model, sae, "feet feet", max_tokens=1)


def test_the_index_of_a_smaller_sae_is_refused(index):
    codes = TextCodes(("a",), (7,), np.array([0]), np.array([99]), np.array([1.0], np.float32))
    with pytest.raises(ArtifactError, match="feature 99"):
        rank_features(codes, index)
