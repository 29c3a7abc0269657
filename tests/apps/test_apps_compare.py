"""Nearest features of two SAEs: planted partners are found, chance is told apart, and the page shows both."""

from __future__ import annotations

import re

import numpy as np
import pytest
from apptest import opened, rerun, words
from scipy import sparse

import saelab as sl
from saelab.errors import ConfigError
from saelab_explorer import contrast, frame, pairing
from saelab_explorer.address import CompareSettings

EVERY = np.ones(40, bool)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, 64))


def test_a_permuted_dictionary_is_matched_feature_by_feature(rows: np.ndarray):
    order = np.random.default_rng(1).permutation(40)
    found = pairing.by_direction(rows, 3 * rows[order], EVERY, EVERY)
    assert (order[found.nearest.partner] == np.arange(40)).all()
    assert found.nearest.similarity == pytest.approx(np.ones(40))
    assert found.mutual.all()
    assert found.control.max() < 0.7  # the largest of 40 cosines in 64 dimensions


def test_random_dictionaries_are_no_more_alike_than_their_control(rows: np.ndarray):
    other = np.random.default_rng(2).normal(size=(40, 64))
    found = pairing.by_direction(rows, other, EVERY, EVERY)
    assert abs(found.nearest.similarity.mean() - found.control.mean()) < 0.05


def test_dead_features_take_no_part(rows: np.ndarray):
    alive = EVERY.copy()
    alive[[3, 7]] = False
    found = pairing.by_direction(rows, rows, alive, EVERY)
    assert found.nearest.partner[3] == -1
    assert 3 not in found.known
    found = pairing.by_direction(rows, rows, EVERY, alive)
    assert found.nearest.partner[3] != 3
    assert not found.mutual[3]


def test_decoders_of_other_widths_have_no_angle(rows: np.ndarray):
    with pytest.raises(ConfigError, match="have no angle; compare by activation"):
        pairing.by_direction(rows, rows[:, :9], EVERY, EVERY)


def test_correlations_are_numpys_and_partners_fire_on_the_same_tokens():
    generator = np.random.default_rng(3)
    dense = generator.exponential(size=(400, 6)) * (generator.random((400, 6)) < 0.2)
    order = [4, 2, 0, 5, 1, 3]
    other = dense[:, order] * 2 + 0.1 * (generator.random((400, 6)) < 0.05)
    found = pairing.by_activation(sparse.csr_array(dense), sparse.csr_array(other))
    assert [order[partner] for partner in found.nearest.partner] == list(range(6))
    expected = [np.corrcoef(dense[:, i], other[:, order.index(i)])[0, 1] for i in range(6)]
    assert found.nearest.similarity == pytest.approx(expected)
    assert found.mutual.all()
    assert np.nanmax(found.control) < 0.5
    assert found.n_tokens == 400


def test_features_that_fire_rarely_have_no_partner():
    dense = np.zeros((100, 2))
    dense[:50, 0], dense[: pairing.MIN_FIRINGS - 1, 1] = 1, 1
    found = pairing.by_activation(sparse.csr_array(dense), sparse.csr_array(dense))
    assert found.nearest.partner.tolist() == [0, -1]
    assert found.known.tolist() == [0]
    with pytest.raises(ConfigError, match="over more tokens"):
        pairing.by_activation(sparse.csr_array(dense[:, 1:]), sparse.csr_array(dense[:, 1:]))


def test_the_page_pairs_two_seeds_and_shows_both_features(shown):
    app = opened(frame.COMPARE, run="small", second="twin", feature="3")
    text = words(app)
    for told in ("By chance", "Each other", "Feature 3 and its nearest", "twin · feature", "95 % intervals"):
        assert told in text
    assert app.query_params["second"] == "twin"
    links = [link.proto.label for link in app.get("page_link")]
    assert links[0] == "Open feature 3 of small"
    assert links[1].endswith("of twin")


def test_pairing_by_activation_reads_held_out_tokens_with_the_model(shown):
    app = opened(frame.COMPARE, run="small", second="twin", by="activation", tokens="2048")
    text = words(app)
    assert "held-out tokens" in text
    assert "correlation" in text
    assert not app.error
    app.button_group(key="pair_axis").set_value("norm")
    rerun(app)
    assert app.query_params["axis"] == "norm"
    assert app.query_params["by"] == "activation"


@pytest.mark.parametrize(
    "name", ["../../etc", "<script>alert(1)</script>", "![x](http://example.org/x.png)", "indexed", "small"]
)
def test_a_second_sae_that_is_none_is_one_sentence_and_a_way_on(name: str, shown):
    app = opened(frame.COMPARE, run="small", second=name)
    assert len(app.error) == 1
    assert app.get("page_link")
    assert not re.search(r"(?<!\\)[<\[]", app.error[0].value)  # neither a tag nor a picture for Markdown


def test_with_one_sae_alone_the_page_says_how_to_make_another(shown, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(shown / "small", tmp_path / "small")
    monkeypatch.setenv("SAELAB_EXPLORER_ROOT", str(tmp_path))
    app = opened(frame.COMPARE, run="small")
    assert "nothing to compare with" in words(app)
    assert "--seed 1" in app.code[0].value


def test_settings_come_back_from_their_address():
    settings = CompareSettings(first="a/index", second="b", by="activation", tokens=2048, axis="max")
    assert CompareSettings.from_query(settings.query()) == settings
    assert CompareSettings().query() == {}


# --- two texts


def codes(*active: tuple[int, int, float]) -> sl.TextCodes:
    positions, features, values = (np.array(column) for column in zip(*active, strict=True))
    return sl.TextCodes(("a", "b"), (1, 2), positions, features, values)


def test_two_texts_are_told_apart_by_what_fires_on_one_of_them(shown):
    index = sl.load_index(shown / "indexed")
    top = index.column("max")
    first, second = codes((0, 1, top[1]), (1, 2, top[2] / 2)), codes((0, 2, top[2]), (1, 3, top[3] / 4))

    def found(side: contrast.Side) -> list[int]:
        return [c.feature for c in contrast.contrasted(first, second, index, side=side, n=9, max_density=None)]

    assert found("first") == [1]
    assert found("second") == [2, 3]
    assert found("both") == [2]
    dense = float(index.column("density")[2])
    left = contrast.contrasted(first, second, index, side="both", n=9, max_density=dense * 0.99)
    assert not left


def test_the_prompt_page_compares_two_texts(shown):
    app = opened(frame.PROMPT, run="small", two="1")
    assert [area.label for area in app.text_area] == ["First text", "Second text"]
    app.text_area[0].set_value("The old clock measures seven feet of rope.")
    app.text_area[1].set_value("A green frog paints the winter sea.")
    app.button[0].click()
    rerun(app)
    text = words(app)
    assert "Features of the two texts" in text
    assert text.count("at most") + text.count("on none of") == 2
    assert app.query_params["two"] == "1"
    app.toggle(key="two_texts").set_value(False)
    rerun(app)
    assert "two" not in app.query_params
    assert "Features in this text" in words(app)
