"""Every page, run without a browser: what it shows, how it fails, what it writes into the address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from apptest import APP, opened, rerun, words

import saelab as sl
from saelab_explorer import frame


def test_the_overview_shows_metrics_with_intervals_and_token_counts(shown: Path):
    app = opened(run="small")
    text = words(app)
    evaluation = json.loads((shown / "small" / "eval" / "eval.json").read_text())
    metric = evaluation["metrics"]["explained_variance"]
    assert f"{metric['value']:.3f}" in text
    assert f"{metric['low']:.3f} – {metric['high']:.3f}" in text
    assert f"{evaluation['n_tokens']:,} held-out tokens" in text
    for heading in ("Density", "Training", "Provenance"):
        assert heading in text


def test_a_run_without_evaluation_and_sae_says_how_to_make_them(shown: Path):
    app = opened(run="indexed")
    assert "not evaluated yet" in words(app)
    assert f"saelab eval {shown.resolve() / 'indexed'}" in [code.value for code in app.code]


@pytest.mark.parametrize("page", [frame.FEATURES, frame.FEATURE, frame.PROMPT, frame.STEER, frame.COMPARE])
def test_a_missing_artefact_is_answered_by_its_command(page: str, shown: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(shown / "small" / "eval", tmp_path / "bare" / "eval")
    monkeypatch.setenv("SAELAB_EXPLORER_ROOT", str(tmp_path))
    app = opened(page, run="bare")
    assert any(code.value.startswith("saelab ") for code in app.code)
    assert "yet" in words(app)


def test_a_root_without_runs_says_how_to_make_one(shown: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SAELAB_EXPLORER_ROOT", str(tmp_path))
    monkeypatch.setenv("SAELAB_EXPLORER_RUN", "")
    assert "saelab demo" in opened().code[0].value


@pytest.mark.parametrize("name", ["../../etc", "nothing", "", "<script>"])
def test_a_run_is_chosen_by_name_and_a_wrong_one_is_no_dead_end(name: str, shown: Path):
    app = opened(run=name)
    if name:
        assert "no run" in app.error[0].value
        assert app.get("page_link")
    else:
        assert not app.error


@pytest.mark.parametrize("feature", ["-1", "1e3", "٣", "99999", "x" * 100])
def test_a_wrong_feature_in_the_address_is_one_line_and_no_dead_end(feature: str, shown: Path):
    app = opened(frame.FEATURE, run="indexed", feature=feature)
    assert "whole number from 0 to 119" in app.error[0].value
    assert app.get("page_link")


def test_the_table_is_searched_filtered_and_sorted_from_the_address(shown: Path):
    app = opened(frame.FEATURES, run="indexed", q="York")
    assert "for York, best match first" in words(app)
    app = opened(frame.FEATURES, run="indexed", kinds="dead")
    assert "1 feature ·" in words(app)
    assert app.multiselect[0].value == ["dead"]


def test_the_density_filter_is_a_range(shown: Path):
    app = opened(frame.FEATURES, run="indexed", low="-2.1")
    assert app.select_slider[0].value == (-2.0, 0.0)
    app.select_slider[0].set_value((-2.0, -1.0))
    rerun(app)
    assert (app.query_params["low"], app.query_params["high"]) == ("-2", "-1")
    density = sl.load_index(shown / "indexed").column("density")
    n_found = int(((density >= 0.01) & (density <= 0.1)).sum())
    assert f"{n_found} features ·" in words(app)


def test_filters_are_written_into_the_address(shown: Path):
    app = opened(frame.FEATURES, run="indexed")
    app.text_input[0].set_value("feet")
    rerun(app)
    assert app.query_params["q"] == "feet"
    app.multiselect[0].set_value(["token"])
    rerun(app)
    assert app.query_params["kinds"] == "token"
    assert app.query_params["run"] == "indexed"


def test_the_table_turns_its_pages(shown: Path):
    app = opened(frame.FEATURES, run="indexed")
    assert "showing 1 to 50" in words(app)
    app.button(key="page_on").click()
    rerun(app)
    assert "showing 51 to 100" in words(app)
    assert app.query_params["page"] == "1"


def test_a_search_without_a_hit_offers_to_clear_the_filters(shown: Path):
    app = opened(frame.FEATURES, run="indexed", q="York", kinds="dead")
    assert "No feature matches" in words(app)
    app.button[0].click()
    rerun(app)
    assert "120 features ·" in words(app)


def test_a_feature_page_shows_its_label_with_held_out_scores(shown: Path):
    app = opened(frame.FEATURE, run="indexed", feature="0")
    text = words(app)
    record = sl.load_index(shown / "indexed").feature(0)
    assert "feet</span>" in text
    assert f"{record.label.n_held_out:,} matches" in text
    assert f"{record.n_fired:,} tokens" in text
    assert "no token stands out" in text.lower()


def test_the_buttons_walk_through_the_features_in_one_run_each(shown: Path):
    app = opened(frame.FEATURE, run="indexed", feature="0")
    for key, feature in (("on", "1"), ("on", "2"), ("back", "1"), ("back", "0"), ("back", "119")):
        app.button(key=key).click()
        rerun(app)
        assert app.query_params["feature"] == feature
        assert f"Feature {feature}<" in words(app)
    app.button(key="random").click()
    rerun(app)
    assert app.query_params["feature"] != "119"


def test_a_silent_feature_says_that_it_never_fired(shown: Path):
    assert "never fired" in words(opened(frame.FEATURE, run="indexed", feature="5"))


def test_samples_are_named_by_the_activations_they_lie_between(shown: Path):
    app = opened(frame.FEATURE, run="indexed", feature="4")
    record = sl.load_index(shown / "indexed").feature(4)
    names = app.button_group[0].options
    assert names[:2] == ["Top", f"{record.interval_edges[-2]:.3g}–{record.max_act:.3g}"]
    assert len(names) == 1 + sum(map(bool, record.interval_examples))


def test_hostile_tokens_reach_the_markup_escaped(shown: Path):
    for feature in ("0", "1", "2"):
        text = words(opened(frame.FEATURE, run="hostile", feature=feature))
        assert "<script>window" not in text
        assert "<img src" not in text
        assert "</span></div><b>" not in text


def test_pages_that_read_an_index_do_not_import_torch(shown: Path):
    program = f"""
import sys
from streamlit.testing.v1 import AppTest
for page in ("overview", "features", "feature"):
    app = AppTest.from_file({APP!r}, default_timeout=60).switch_page(f"views/{{page}}.py")
    app.query_params["run"] = "small"
    app.run()
    assert not app.exception, app.exception
assert "torch" not in sys.modules, "torch was imported"
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_prompt_page_lists_the_features_of_a_text(shown: Path):
    app = opened(frame.PROMPT, run="small")
    app.text_area[0].set_value("The lighthouse keeper measures seven feet of rope.")
    app.button[0].click()
    rerun(app)
    text = words(app)
    assert "Features in this text" in text
    assert "on this token" in text
    assert "Read in" in text


def test_a_prompt_that_is_too_long_or_empty_is_refused_in_a_sentence(shown: Path):
    app = opened(frame.PROMPT, run="small")
    for text in ("", "word " * 700):
        app.text_area[0].set_value(text)
        app.button[0].click()
        rerun(app)
        assert app.error[0].value


def test_steering_writes_two_texts_and_the_next_token_kl(shown: Path):
    app = opened(frame.STEER, run="small", feature="3", strength="1.5")
    app.slider(key="steer_length").set_value(8)
    next(button for button in app.button if button.label == "Write both").click()
    rerun(app)
    text = words(app)
    assert text.count("tokens/s") == 2
    assert "nats" in text
    assert "Feature 3 at +1.50" in text


def test_a_steering_record_is_shown_under_the_texts(shown: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(shown / "small", tmp_path / "small")
    row = {"feature": 3, "strength": 0.7, "rise": 2.0, "random_rise": -0.25, "advantage": 2.25}
    mean = {"value": 2.25, "low": 1.5, "high": 3.0}
    record = {"kl": 1.5, "n_prompts": 20, "advantage": mean, "random_strengths": [1.0] * 20, "features": [row]}
    (tmp_path / "small" / "steer").mkdir()
    (tmp_path / "small" / "steer" / "steer.json").write_text(json.dumps(record))
    monkeypatch.setenv("SAELAB_EXPLORER_ROOT", str(tmp_path))
    text = words(opened(frame.STEER, run="small", feature="3"))
    assert "against 20 random directions" in text
    assert "Mean advantage +2.25 nats (95 %: +1.50 to +3.00)" in text


def test_the_strength_slider_writes_into_the_address(shown: Path):
    app = opened(frame.STEER, run="small", feature="3")
    app.slider(key="steer_strength").set_value(-0.5)
    rerun(app)
    assert app.query_params["strength"] == "-0.5"
    assert "Feature 3 at −0.50" in words(app)


def test_after_steering_the_model_is_as_it_was(shown: Path):
    from saelab_explorer import live

    ready = live.load(shown / "small" / "sae")
    ids = ready.model.to_tokens("The old clock").ids
    before = ready.model.logits(ids)
    pieces = live.both_texts(ready, 3, 4.0, "The old clock", max_new_tokens=6)
    next(pieces), next(pieces)
    assert ready.model.active_hooks() == []  # also in the middle of writing
    assert np.array_equal(before.numpy(), ready.model.logits(ids).numpy())
    list(pieces)
    assert ready.model.active_hooks() == []
