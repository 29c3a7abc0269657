"""The parts of pages on their own: searches, labels, pictures, clicks, and two texts written in turn."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saelab as sl
from saelab.errors import TextError
from saelab_explorer import charts, figures, live, snippets, theme
from saelab_explorer.address import Filters
from saelab_explorer.components.table import Column, FeatureRow, TableClick, table_clicked
from saelab_explorer.components.tokens import TokenClick, TokenRow, token_clicked
from saelab_explorer.labels import Part, label_line, label_parts
from saelab_explorer.matching import matching


@pytest.fixture(scope="module")
def index(root: Path) -> sl.FeatureIndex:
    return sl.load_index(root / "indexed")


# --- what it rests on


def test_the_explorer_uses_public_names_only():
    allowed = {"saelab", *(f"saelab.{cellar}" for cellar in ("config", "errors", "metrics", "rundir", "stats"))}
    for file in Path(theme.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used = {alias.name for alias in node.names if alias.name.split(".")[0] == "saelab"}
                assert used <= allowed, file
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saelab":
                imported = (
                    {f"saelab.{alias.name}" for alias in node.names} if node.module == "saelab" else {node.module}
                )
                assert imported <= allowed, file
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sl":
                assert node.attr in sl.__all__, f"{file}: sl.{node.attr}"


# --- which features, in which order


def test_without_filters_every_feature_is_shown_the_best_label_first(index: sl.FeatureIndex):
    found = matching(index, Filters()).features
    assert sorted(found) == list(range(index.n_features))
    f1 = index.column("label_f1")[found]
    known = f1[~np.isnan(f1)]
    assert (np.diff(known) <= 0).all()
    assert np.isnan(f1[len(known) :]).all()


@pytest.mark.parametrize(("sort", "column"), [("density", "density"), ("max", "max"), ("precision", "label_precision")])
def test_a_column_sorts_both_ways(index: sl.FeatureIndex, sort: str, column: str):
    downwards = index.column(column)[matching(index, Filters(sort=sort)).features]
    upwards = index.column(column)[matching(index, Filters(sort=f"-{sort}")).features]
    assert (np.diff(downwards[~np.isnan(downwards)]) <= 0).all()
    assert (np.diff(upwards[~np.isnan(upwards)]) >= 0).all()


def test_a_search_finds_the_planted_features(index: sl.FeatureIndex):
    assert matching(index, Filters(q="feet")).features[0] == 0
    assert matching(index, Filters(q='" York"')).features[0] == 2
    assert list(matching(index, Filters(q=" 17 ")).features) == [17]


def test_a_search_for_a_token_that_is_not_there_says_so(index: sl.FeatureIndex):
    with pytest.raises(TextError, match="no token"):
        matching(index, Filters(q='"Xylophone"'))


def test_filters_narrow_a_search(index: sl.FeatureIndex):
    everything = set(matching(index, Filters(q="word3")).features)
    narrowed = set(matching(index, Filters(q="word3", kinds=("token",), high=-2.0)).features)
    assert narrowed < everything
    assert all(index.column("density")[f] <= 0.01 for f in narrowed)


# --- names


def test_labels_show_tokens_apart_from_words(index: sl.FeatureIndex):
    assert label_parts(index, 0) == [Part(" feet", True), Part(" foot", True)]
    assert label_parts(index, 1) == [Part("after", False), Part(" United", True)]
    assert label_parts(index, 2) == [Part(" New", True), Part("→", False), Part(" York", True)]
    assert label_parts(index, 5) == [Part("never fired", False)]
    assert label_line(index, 0) == '" feet", " foot"'


@given(st.text())
def test_no_text_becomes_markup(text: str):
    markup = snippets.token(text) + snippets.section(text, text) + snippets.answer("steered", text, text, text)
    tags = set(re.findall(r"<(/?\w+)", markup))
    assert tags <= {"span", "/span", "h2", "/h2", "div", "/div", "b", "/b"}
    assert markup.count("<script") == 0


WRITTEN = {0: "0 %", 0.5: "50 %", 0.0123: "1.2 %", 0.00056: "0.056 %", 1e-7: "1e-05 %", 0.9997: "99.9 %", 1: "100 %"}


@pytest.mark.parametrize(("share", "written"), WRITTEN.items())
def test_shares_are_written_with_two_digits(share: float, written: str):
    assert figures.percent(share) == written


def test_numbers_are_written_for_reading():
    assert figures.signed(-0.5) == "−0.50"
    assert [figures.count(n) for n in (0, 1234, 2_500_000, 3e9)] == ["0", "1,234", "2.5 M", "3.0 G"]
    assert figures.plural(1, "feature") == "1 feature"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_on_every_step_of_activation(scheme: theme.Scheme):
    palette = theme.PALETTES[scheme]
    for ground, text in zip(palette.ramp, palette.ramp_text, strict=True):
        assert contrast(ground, text) >= 4.5
    for colour in (palette.muted, palette.positive, palette.negative):
        assert contrast(colour, palette.paper) >= 4.5


def test_the_style_sheet_defines_every_property_it_uses():
    style = theme.page_style()
    components = (Path(theme.__file__).parent / "components").glob("*.css")
    used = set(re.findall(r"var\(--sx-([\w-]+)", style + "".join(file.read_text() for file in components)))
    assert used <= set(re.findall(r"--sx-([\w-]+):light-dark", style))


# --- pictures


def test_a_histogram_keeps_every_count(index: sl.FeatureIndex):
    record = index.feature(4)
    spec = charts.histogram(record.histogram.edges, record.histogram.counts, theme.PALETTES["light"])
    assert sum(bar["n"] for bar in spec["data"]["values"]) == record.n_fired


def test_a_histogram_begins_at_the_lowest_bin_that_is_filled():
    spec = charts.histogram((0.0, 1.0, 2.0, 4.0, 5.0), (3, 0, 2, 1), theme.PALETTES["light"])
    bars = spec["data"]["values"]
    assert [bar["range"] for bar in bars] == ["0 to 1", "2 to 4", "4 to 5"]
    assert bars[0]["from"] == pytest.approx(0.707, abs=1e-3)  # 0 has no logarithm
    assert spec["encoding"]["x"]["scale"]["domain"] == [bars[0]["from"], 5.0]
    assert charts.histogram((0.0, 1.0, 2.0), (0, 4), theme.PALETTES["light"])["data"]["values"][0]["from"] == 1.0


def test_pictures_leave_out_what_has_no_logarithm():
    density, palette = np.array([0.0, 0.01, 0.1]), theme.PALETTES["light"]
    spec = charts.densities(density, palette)
    assert spec is not None
    assert sum(bar["n"] for bar in spec["data"]["values"]) == 2
    dots = charts.density_by_max(density, np.array([0.0, 1.0, 2.0]), ["a", "b", "c"], palette)
    assert dots is not None
    assert [dot["feature"] for dot in dots["data"]["values"]] == [1, 2]
    assert charts.densities(np.zeros(3), palette) is None


def test_a_long_training_is_drawn_with_few_points():
    lines = [{"step": i, "tokens": 100 * i, "loss": 1 / (1 + i)} for i in range(5000)]
    spec = charts.curve(lines, "loss", "Loss", theme.PALETTES["dark"])
    assert spec is not None
    points = spec["data"]["values"]
    assert len(points) < 300
    assert points[-1]["tokens"] == 499_900
    assert charts.curve(lines, "n_dead", "Dead", theme.PALETTES["dark"]) is None


@pytest.mark.parametrize(
    "sent", [None, {}, {"feature": []}, {"feature": [{}]}, {"feature": ["7"]}, {"feature": [{"feature": "7"}]}]
)
def test_a_selection_without_a_dot_is_none(sent: object):
    assert charts.selected_feature(sent) is None


def test_a_selected_dot_is_its_feature():
    assert charts.selected_feature({"feature": [{"feature": 7}]}) == 7


# --- clicks that the browser sends


ROWS = [TokenRow(("a", "b"), (0.0, 1.0)), TokenRow(("c",), (1.0,))]


@pytest.mark.parametrize(
    "sent", [None, 3, {}, *({"row": row, "i": i} for row, i in ((2, 0), (1, 1), (-1, 0), ("0", 0), (True, 0)))]
)
def test_a_click_that_points_to_no_token_counts_as_none(sent: object):
    assert token_clicked(sent, ROWS) is None


def test_a_click_on_a_token_is_read():
    assert token_clicked({"row": 1, "i": 0}, ROWS) == TokenClick(1, 0)


def test_a_click_on_a_table_is_read_and_a_forged_one_is_not():
    columns, rows = (Column("Density", "number", sort="density"),), [FeatureRow(7, ("1 %",))]
    nothing = {"open": None, "pick": None, "sort": None}
    assert table_clicked(nothing | {"open": 7}, columns, rows) == TableClick(open=7)
    assert table_clicked(nothing | {"sort": "-density"}, columns, rows) == TableClick(sort="-density")
    for forged in ({"open": 8}, {"open": "7"}, {"open": True}, {"sort": "label"}, {"pick": [7]}):
        assert table_clicked(nothing | forged, columns, rows) == TableClick()


# --- two texts at the same time


def test_both_texts_grow_in_turn_and_the_longer_one_goes_on_alone():
    pieces = list(live.in_turn([iter("ab"), iter("wxyz")]))
    grown = [(p.side, p.text) for p in pieces if not p.finished]
    assert grown == [(0, "a"), (1, "w"), (0, "b"), (1, "x"), (1, "y"), (1, "z")]
    assert [p.side for p in pieces if p.finished] == [0, 1]
    assert pieces[-1].n_pieces == 4


def test_an_edit_is_active_only_while_a_piece_is_made():
    active, seen = [], []

    @contextmanager
    def edit() -> Iterator[None]:
        active.append(1)
        yield
        active.pop()

    def stream() -> Iterator[str]:
        for letter in "abc":
            seen.append(len(active))
            yield letter

    for _ in live.only_within(edit, stream()):
        assert not active
    assert seen == [1, 1, 1]


def test_an_edit_is_undone_when_the_stream_fails():
    active = []

    @contextmanager
    def edit() -> Iterator[None]:
        active.append(1)
        try:
            yield
        finally:
            active.pop()

    def stream() -> Iterator[str]:
        yield "a"
        raise RuntimeError("the model gave up")

    with pytest.raises(RuntimeError):
        list(live.only_within(edit, stream()))
    assert not active


@pytest.fixture(scope="module")
def ready(root: Path) -> live.Live:
    return live.load(root / "small" / "sae")


def test_texts_written_in_turn_equal_texts_written_one_after_the_other(ready: live.Live):
    texts = ["", ""]
    for piece in live.both_texts(ready, 3, 3.0, "The old clock", max_new_tokens=12):
        texts[piece.side] += piece.text
    plain = ready.model.generate("The old clock", max_new_tokens=12)
    with sl.steer(ready.model, ready.sae.feature(3), strength=3.0):
        steered = ready.model.generate("The old clock", max_new_tokens=12)
    assert texts == [plain, steered]
    assert plain != steered


def test_steering_by_nothing_changes_nothing_and_more_changes_more(ready: live.Live):
    kl = [live.next_token_change(ready, 3, strength, "The old clock").kl for strength in (0.0, 0.5, 2.0)]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[0] < kl[1] < kl[2]


def test_a_steering_session_does_not_reach_into_another(ready: live.Live):
    """Two sessions share the model: while one steers, the other's texts stay as they are."""
    from threading import Thread

    alone = ready.model.generate("A letter from Paris", max_new_tokens=10)
    other: list[str] = []

    def read() -> None:
        other.extend(ready.model.generate("A letter from Paris", max_new_tokens=10) for _ in range(5))

    reader = Thread(target=read)
    reader.start()
    for _ in live.both_texts(ready, 3, 5.0, "The old clock", max_new_tokens=30):
        pass
    reader.join()
    assert other == [alone] * 5


def test_an_sae_of_other_weights_is_refused(root: Path, tmp_path: Path):
    from saelab.errors import ArtifactError

    sae = sl.load_sae(root / "small" / "sae")
    sae.metadata = replace(sae.metadata, model_sha256="0" * 64)
    sl.save_sae(sae, tmp_path / "sae")
    with pytest.raises(ArtifactError, match="other weights"):
        live.load(tmp_path / "sae")
