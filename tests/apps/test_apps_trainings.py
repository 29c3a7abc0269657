"""The page of trainings, and the lab: curves over each other, settings that differ, a slider with a known answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from apptest import opened, rerun, words
from hypothesis import given
from hypothesis import strategies as st

import saelab as sl
from saelab.errors import ArtifactError
from saelab_explorer import curves, frame, logs, theme
from saelab_explorer.address import BETAS, PAIRS, LabSettings
from saelab_explorer.runs import root_and_name

PALETTE = theme.PALETTES["light"]


def training(path: Path, stage: str, config: dict[str, object], lines: list[dict[str, object]]) -> None:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"schema": 1, "stage": stage, "config": config}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with an alignment run, a workspace, and a sweep of two members, one of them hostile by name."""
    root = tmp_path / "runs"
    steps = [{"step": n, "loss": 1 / n, "rewards/accuracies": 0.5} for n in range(1, 9)]
    training(root / "dpo", "model", {"method": "dpo", "beta": 0.1}, steps)
    for k in (16, 32):
        lines = [{"step": n, "tokens": 100 * n, "l0": k, "reconstruction": k / 100 / n} for n in range(1, 9)]
        training(root / "sweep" / f"topk-k{k}", "sae", {"sae": {"arch": "topk", "k": k}, "seed": 0}, lines)
    training(root / "lab" / "<b>sae", "sae", {"sae": {"arch": "relu"}}, [{"step": 1, "tokens": 5, "loss": 1.0}])
    rows = [
        {"name": f"topk-k{k}", "arch": "topk", "state": "finished", "l0": k, "reconstruction": k / 800}
        for k in (16, 32)
    ]
    (root / "sweep" / "run.json").write_text(json.dumps({"schema": 1, "stage": "sweep", "config": {}}))
    (root / "sweep" / "sweep.json").write_text(json.dumps({"members": rows}))
    monkeypatch.setenv("SAELAB_EXPLORER_ROOT", str(root))
    monkeypatch.setenv("SAELAB_EXPLORER_RUN", "")
    return root


def test_every_log_is_found_by_its_place(trained: Path):
    found = logs.find_logs(trained)
    assert list(found) == ["dpo", "lab/<b>sae", "sweep/topk-k16", "sweep/topk-k32"]
    assert (found["dpo"].kind, found["sweep/topk-k16"].kind) == ("dpo", "topk")
    assert list(logs.find_sweeps(trained)) == ["sweep"]


def test_links_that_lead_out_of_the_root_are_not_followed(trained: Path, tmp_path: Path):
    training(tmp_path / "outside" / "sae", "sae", {}, [{"step": 1}])
    (trained / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    assert "link/sae" not in logs.find_logs(trained)


def test_one_damaged_training_hides_no_other(trained: Path):
    (trained / "dpo" / "run.json").write_text("{")
    assert list(logs.find_logs(trained)) == ["lab/<b>sae", "sweep/topk-k16", "sweep/topk-k32"]
    (trained / "sweep" / "topk-k16" / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ArtifactError, match="damaged"):
        logs.find_logs(trained)["sweep/topk-k16"].lines()


def test_a_root_with_a_model_beside_workspaces_is_still_a_root(trained: Path):
    assert root_and_name(trained, None) == (trained.resolve(), None)


def test_settings_that_differ_are_listed_and_no_others(trained: Path):
    found = logs.find_logs(trained)
    differing = logs.differing([found["sweep/topk-k16"], found["sweep/topk-k32"], found["dpo"]])
    assert differing["sae.k"] == ["16", "32", "–"]
    assert logs.differing([found["sweep/topk-k16"], found["sweep/topk-k32"]]) == {"sae.k": ["16", "32"]}


def test_curves_run_over_tokens_only_where_all_count_them(trained: Path):
    found = logs.find_logs(trained)
    sae, dpo = found["sweep/topk-k16"].lines(), found["dpo"].lines()
    assert logs.common_clock([sae]) == "tokens"
    assert logs.common_clock([sae, dpo]) == "step"
    assert logs.points(sae, "l0", "tokens")[0] == (100.0, 16.0)


@given(st.integers(0, 2000), st.integers(1, 300))
def test_thinning_keeps_the_ends(n: int, most: int):
    lines = [{"step": i, "loss": float(i)} for i in range(n)]
    kept = logs.points(lines, "loss", "step", most=most)
    assert len(kept) <= min(n, most + 1)
    assert not n or (kept[0], kept[-1]) == ((0.0, 0.0), (n - 1.0, n - 1.0))


def test_a_picture_of_several_trainings_keeps_each_ones_colour(trained: Path):
    lines = [curves.Line("a", []), curves.Line("b", [(0, 1), (1, 2)]), curves.Line("c", [(0, 4), (1, 3)])]
    spec = curves.compared(lines, "loss", "step", PALETTE)
    assert spec is not None
    assert {value["n"] for value in spec["data"]["values"]} == {"1", "2"}
    assert curves.compared(lines[:1], "loss", "step", PALETTE) is None


def test_the_page_shows_curves_differences_and_the_sweep(trained: Path):
    app = opened(frame.TRAININGS, log=["sweep/topk-k16", "sweep/topk-k32"])
    text = words(app)
    for told in (
        "What sets them apart",
        "sae.k",
        "Sweep sweep",
        "topk-k32",
        "All trainings",
        "active features per token",
    ):
        assert told in text
    assert app.query_params["log"] == ["sweep/topk-k16", "sweep/topk-k32"]
    app.multiselect(key="log_choice").set_value(["dpo"])
    rerun(app)
    assert app.query_params["log"] == "dpo"
    assert "What sets them apart" not in words(app)
    app.multiselect(key="metric_choice").set_value(["loss"])
    rerun(app)
    assert app.query_params["metric"] == "loss"
    app.button(key="compare_sweep").click()
    rerun(app)
    assert app.query_params["log"] == ["sweep/topk-k16", "sweep/topk-k32"]


def test_an_emptied_choice_stays_empty(trained: Path):
    app = opened(frame.TRAININGS, log="dpo")
    app.multiselect(key="log_choice").set_value([])
    rerun(app)
    assert "Nothing is chosen" in words(app)


def test_names_of_directories_are_text(trained: Path):
    assert "lab/&lt;b&gt;sae" in words(opened(frame.TRAININGS))
    assert "<b>sae" not in words(opened(frame.TRAININGS, log="lab/<b>sae"))


@pytest.mark.parametrize("name", ["../../etc/passwd", "<script>alert(1)</script>", "sweep", "dpo/../dpo"])
def test_a_log_is_chosen_by_name_and_a_wrong_one_is_no_dead_end(name: str, trained: Path):
    app = opened(frame.TRAININGS, log=name)
    assert "There is no training" in app.error[0].value
    assert app.get("page_link")


def test_without_any_training_the_page_says_how_to_make_one(trained: Path, tmp_path: Path, monkeypatch):
    shutil.rmtree(trained)
    trained.mkdir()
    assert "saelab demo" in opened(frame.TRAININGS).code[0].value


def test_trainings_of_a_real_run_are_shown_with_their_metrics(shown: Path):
    app = opened(frame.TRAININGS, run="small")
    assert app.multiselect(key="log_choice").value == ["small/sae"]
    assert "sum|x" not in words(app)
    assert "mean |x - x_hat|^2" in words(app)


# --- the lab


def test_the_lab_needs_no_run_and_keeps_its_state_in_the_address(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SAELAB_EXPLORER_ROOT", str(tmp_path))
    monkeypatch.setenv("SAELAB_EXPLORER_RUN", "")
    app = opened(frame.PREFERENCE, beta="0.1", good="3", proxy="well_specified")
    assert app.select_slider(key="lab_beta").value == 0.1
    assert app.query_params["proxy"] == "well_specified"
    expected = sl.preferred_density(good=3.0, bad=-1.0, beta=0.1)
    assert f"{expected.kl:.2f}" in words(app)
    app.select_slider(key="lab_beta").set_value(4.0)
    rerun(app)
    assert app.query_params["beta"] == "4"
    assert "hardly leaves its reference" in words(app)
    assert "run" not in app.query_params


def test_the_control_loses_nothing_where_the_proxy_can_know_the_limit(shown: Path):
    betas = (1e6, *BETAS)
    drops = {
        kind: sl.overoptimise(sl.OveroptConfig(n_pairs=3000, proxy=kind, betas=betas, best_of=(1,))).exact.drop
        for kind in ("linear", "well_specified")
    }
    assert drops["linear"] > 5 > 0.5 > drops["well_specified"]


def test_both_densities_carry_their_colours_everywhere():
    landscape = sl.preferred_density(good=2.0, bad=-1.0, beta=0.5)
    text = json.dumps(curves.preference(landscape, good=2.0, bad=-1.0, palette=PALETTE))
    assert text.count(PALETTE.baseline) == 3  # line, area and name
    assert text.count(PALETTE.steered) == 3


@given(st.dictionaries(st.sampled_from(["beta", "good", "bad", "pairs", "proxy"]), st.text()))
def test_any_address_gives_a_lab_that_works(query: dict[str, str]):
    settings = LabSettings.from_query(query)
    assert settings.beta in BETAS
    assert settings.pairs in PAIRS
    assert np.isfinite(sl.preferred_density(good=settings.good, bad=settings.bad, beta=settings.beta).kl)


@given(st.sampled_from(BETAS), st.sampled_from(PAIRS), st.integers(-40, 40))
def test_lab_settings_come_back_from_their_address(beta: float, pairs: int, tenths: int):
    settings = LabSettings(beta=beta, pairs=pairs, good=tenths / 10, proxy="well_specified")
    assert LabSettings.from_query(settings.query()) == settings
