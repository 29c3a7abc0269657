"""The evidence card: the causal check behind a button, and files that hold what the page shows."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from apptest import opened, rerun, words

import saelab as sl
from saelab_explorer import card, causal, frame, live
from saelab_explorer.causal import Ablation, CausalCheck


@pytest.fixture(scope="module")
def ready(root: Path) -> live.Live:
    return live.load(root / "small" / "sae")


@pytest.fixture(scope="module")
def index(root: Path) -> sl.FeatureIndex:
    return sl.load_index(root / "small")


def first_alive(index: sl.FeatureIndex) -> int:
    return int(index.column("max").argmax())


def checked(ready: live.Live, record: sl.FeatureRecord) -> CausalCheck:
    return causal.causal_check(ready, record, progress=lambda n, total: None)


def test_ablation_matters_exactly_where_the_decoder_writes_something(ready: live.Live, index: sl.FeatureIndex):
    record = index.feature(first_alive(index))
    before = checked(ready, record)
    assert before.texts
    assert min(text.kl for text in before.texts) > 0
    assert all(text.control != record.index for text in before.texts)
    row = ready.sae.W_dec.data[record.index].clone()
    ready.sae.W_dec.data[record.index] = 0
    try:
        after = checked(ready, record)
    finally:
        ready.sae.W_dec.data[record.index] = row
    assert [text.kl for text in after.texts] == [0.0] * len(after.texts)
    assert after.supported == after.held_back == ()
    assert [text.control_kl for text in after.texts] == [text.control_kl for text in before.texts]
    assert ready.model.active_hooks() == []


def test_a_feature_that_does_not_fire_on_its_excerpts_has_nothing_to_take(ready: live.Live, index: sl.FeatureIndex):
    record = index.feature(first_alive(index))
    alone = replace(record, top_examples=record.top_examples[:1])
    # of 96 features 4 fire on a token: another one is silent there
    silent = next(i for i in range(index.n_features) if not checked(ready, replace(alone, index=i)).texts)
    check = checked(ready, replace(alone, index=silent))
    assert check.texts == ()
    assert check.advantage is None
    assert "nothing to take" in card.causal_markup(check)


def test_the_advantage_is_the_mean_difference_with_its_interval():
    texts = tuple(Ablation("x", 1.0, kl, 2, 0.25) for kl in (1.0, 2.0, 3.0))
    advantage = CausalCheck(texts, 8, (), ()).advantage
    assert advantage is not None
    assert advantage.value == pytest.approx(1.75)
    assert advantage.low < 1.75 < advantage.high
    assert CausalCheck(texts[:1], 8, (), ()).advantage is None


def test_the_check_is_made_on_demand_and_stays_on_the_page(shown: Path, index: sl.FeatureIndex):
    feature = str(first_alive(index))
    app = opened(frame.FEATURE, run="small", feature=feature)
    assert "Next-token KL without it" not in words(app)
    app.button(key="causal").click()
    rerun(app)
    text = words(app)
    assert "Next-token KL without it" in text
    assert "Without a control" in text
    assert "interval over excerpts" in text
    app.button(key="on").click()
    rerun(app)
    assert "Next-token KL without it" not in words(app)
    app.button(key="back").click()
    rerun(app)
    assert "Next-token KL without it" in words(app)


def test_without_an_sae_the_check_says_what_it_needs(shown: Path):
    assert "It needs the SAE and its model" in words(opened(frame.FEATURE, run="indexed", feature="0"))


class Tags(HTMLParser):
    """Tags and attributes of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("run", ["indexed", "hostile", "small"])
def test_a_card_is_one_file_in_which_nothing_runs_and_nothing_is_fetched(root: Path, run: str):
    index = sl.load_index(root / run)
    for feature in range(6):
        text = card.document(index, index.feature(feature), "", None)
        tags = Tags()
        tags.feed(text)
        assert not tags.open
        assert not tags.seen & {"script", "img", "link", "iframe", "object", "form"}
        assert not any(name.startswith("on") or name in ("src", "href") for name in tags.attributes)
        assert not re.search(r"url\(|@import|https?:", text)


def test_a_card_holds_what_the_page_shows(index: sl.FeatureIndex):
    record = index.feature(first_alive(index))
    texts = (Ablation("x", 1.0, 0.5, 2, 0.25),) * 2
    text = card.document(index, record, "evidence", CausalCheck(texts, 2, ((" feet", 0.25),), ()))
    assert f"{record.max_act:.2f}" in text
    assert f"Feature {record.index}" in text
    assert "0.500 nats" in text
    assert "feet" in text
    assert index.hook_name in text
    assert text.count('class="sx-strip"') >= min(card.N_TOP, len(record.top_examples))


def test_the_card_is_offered_as_files(shown: Path, index: sl.FeatureIndex):
    app = opened(frame.FEATURE, run="small", feature=str(first_alive(index)))
    labels = [button.label for button in app.get("download_button")]
    assert [label for label in labels if "Save as" in label] == ["Save as JSON", "Save as HTML"]
