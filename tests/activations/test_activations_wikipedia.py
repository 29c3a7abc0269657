from __future__ import annotations

import bz2
import os
import re
import zipfile
from pathlib import Path

import pytest

from saelab import assets
from saelab.activations import wikipedia
from saelab.activations.text import Document, TextConfig, open_text
from saelab.activations.wikipedia import demo_text
from saelab.errors import ArtifactError, AssetError

PROSE = "The tower stands on a hill above the river and looks over the old town. " * 15
DUMP = f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>Tower</title><ns>0</ns><revision><text>'''Tower''' &lt;ref&gt;x&lt;/ref&gt;{PROSE}</text></revision></page>
<page><title>Steeple</title><ns>0</ns><redirect title="T"/><revision><text>#REDIRECT [[T]]</text></revision></page>
<page><title>Spire</title><ns>0</ns><revision><text>#redirect [[Tower]] {PROSE}</text></revision></page>
<page><title>Wikipedia:Help</title><ns>4</ns><revision><text>{PROSE}</text></revision></page>
<page><title>Stub</title><ns>0</ns><revision><text>The stub is a very short article.</text></revision></page>
<page><title>Hill</title><ns>0</ns><revision><text>[[Category:Hills]] {PROSE}</text></revision></page>
<page><title>Empty</title><ns>0</ns><revision><text/></revision></page>
</mediawiki>"""


@pytest.fixture
def small_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a wheel of the demo text's name that holds the dump above. No network is needed."""
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "gensim-4.4.0-cp311-cp311-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(wikipedia._MEMBER, bz2.compress(DUMP.encode()))
    monkeypatch.setattr(wikipedia, "_WHEEL_SHA256", assets.atomic.sha256(wheel))
    return wheel


def test_only_whole_articles_are_taken(small_wheel: Path):
    assert [article.title for article in demo_text()] == ["Tower", "Hill"]
    assert demo_text()[0].text.startswith("Tower The tower stands")


def test_the_second_time_the_text_comes_from_the_cache(small_wheel: Path, monkeypatch: pytest.MonkeyPatch):
    first = demo_text()
    monkeypatch.setattr("saelab.activations.wikitext.clean", lambda text: pytest.fail("cleaned again"))
    assert demo_text() == first


def test_another_cleaner_does_not_use_the_cache_of_this_one(small_wheel: Path, monkeypatch: pytest.MonkeyPatch):
    demo_text()
    monkeypatch.setattr("importlib.metadata.version", lambda package: "another")
    monkeypatch.setattr("saelab.activations.wikitext.clean", lambda text: "x" * 900)
    assert demo_text()[0].text == "x" * 900


def test_a_kill_while_cleaning_leaves_no_cache(small_wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    whole = demo_text()
    for file in (tmp_path / "wikipedia").glob("articles-*"):
        file.unlink()

    def stop(text: str) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("saelab.activations.wikitext.clean", stop)
        with pytest.raises(KeyboardInterrupt):
            demo_text()
    assert not list((tmp_path / "wikipedia").glob("articles-*"))
    assert demo_text() == whole


def test_a_full_disk_is_one_sentence(small_wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("saelab.atomic.fsync", full)
        with pytest.raises(ArtifactError, match="no space left to write"):
            demo_text()
    assert not list((tmp_path / "wikipedia").glob("*.jsonl*"))
    assert len(demo_text()) == 2


def test_another_wheel_than_the_pinned_one_is_refused(small_wheel: Path):
    small_wheel.write_bytes(small_wheel.read_bytes() + b"x")
    with pytest.raises(AssetError, match="not the pinned file"):
        demo_text()


@pytest.fixture(scope="module")
def articles() -> list[Document]:
    if not wikipedia.is_cached() and os.environ.get("SAELAB_FETCH_DEMO") != "1":
        pytest.skip("the demo text is not in the cache; SAELAB_FETCH_DEMO=1 fetches it (28 MB)")
    return demo_text()


@pytest.mark.demo
def test_the_demo_text_is_about_a_hundred_articles(articles: list[Document]):
    assert 95 <= len(articles) <= 115
    assert 2_500_000 < sum(len(article.text) for article in articles) < 3_000_000
    assert {"Anarchism", "Albedo", "Apollo 11"} <= {article.title for article in articles}
    assert list(open_text(TextConfig())) == articles


@pytest.mark.demo
@pytest.mark.parametrize(
    "markup",
    [
        *(r"\[\[", r"\]\]", r"\{\{", r"\}\}", r"\{\|", r"\|\}", r"'''?", r"==", r"thumb\|", r"\|", r"\dpx\b", r"File:"),
        *(r"Category:", r"</?[a-z]", r"&[a-z]+;", r"https?://", r"\bISBN\b", r"__[A-Z]+__", r"^[*#:;|!]"),
        r"[\x00-\x09\x0b-\x1f]",
        *(r"^ | $", r"  ", r"\n\n\n", r"\( ", r" \)", r"\(\)", r"\(,", r"^(References|External links|See also|Notes)$"),
    ],
)
def test_the_demo_text_holds_no_markup(articles: list[Document], markup: str):
    # this one article is about the characters of markup themselves
    rest = [article for article in articles if article.title != "ASCII"]
    found = [
        (article.title, article.text[max(0, match.start() - 40) : match.end() + 40])
        for article in rest
        for match in re.finditer(markup, article.text, flags=re.MULTILINE)
    ]
    assert found == []
