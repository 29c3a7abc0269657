"""The demo text: about a hundred articles of the English Wikipedia (2016), out of a wheel of the Python package index.

gensim's test data hold the first articles of a real dump. Only that file is taken; gensim is not installed.
"""

from __future__ import annotations

import bz2
import hashlib
import inspect
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saelab import assets, atomic
from saelab.activations import wikitemplates, wikitext
from saelab.activations.text import Document

_WHEEL = "gensim==4.4.0"
_WHEEL_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
# the wheel's tags are fixed, so that every machine and every Python fetches the same file
_PIP_ARGS = (
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
    *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
)
_MIN_CHARACTERS = 800  # shorter ones are stubs and lists of meanings


def demo_text() -> list[Document]:
    """The cleaned articles, in the order of the dump; parsed once (some seconds) and then read from the cache folder.

    Raises:
        AssetError: the wheel is neither in the cache nor can be fetched.
        ArtifactError: the disk is full.
    """
    cached = _cleaned_file()
    if not cached.exists():
        with atomic.locked(cached.parent / ".lock"):
            if not cached.exists():
                atomic.sweep(cached.parent)
                (dump,) = assets.fetch_wheel_member(
                    _WHEEL, sha256=_WHEEL_SHA256, members=[_MEMBER], to=cached.parent, pip_args=_PIP_ARGS
                )
                lines = [json.dumps(article._asdict(), ensure_ascii=False) for article in _articles(dump)]
                atomic.write_bytes(cached, ("\n".join(lines) + "\n").encode())
    return [Document(**json.loads(line)) for line in cached.read_text("utf-8").split("\n") if line]


def is_cached() -> bool:
    """Whether `demo_text` needs no network."""
    cache = assets.cache_dir()
    dump = cache / "wikipedia" / PurePosixPath(_MEMBER).name
    return _cleaned_file().exists() or dump.exists() or any((cache / "wheels").glob("gensim-4.4.0-*.whl"))


def _cleaned_file() -> Path:
    """The cache of this cleaner: another one's is not used."""
    digest = hashlib.sha256(metadata.version("mwparserfromhell").encode())
    for module in (wikitext, wikitemplates):
        digest.update(inspect.getsource(module).encode())
    return assets.cache_dir() / "wikipedia" / f"articles-{digest.hexdigest()[:12]}.jsonl"


def _articles(dump: Path) -> Iterator[Document]:
    """Articles proper: no redirects, none of the pages about the encyclopedia itself."""
    for page in _pages(dump):
        if page.namespace == "0" and not page.redirect:
            text = wikitext.clean(page.text)
            if len(text) > _MIN_CHARACTERS:
                yield Document(text, page.title)


class _Page(NamedTuple):
    title: str
    namespace: str
    redirect: bool
    text: str


def _pages(dump: Path) -> Iterator[_Page]:
    root = ET.fromstring(bz2.decompress(dump.read_bytes()))
    for page in root.iterfind("{*}page"):
        text = page.findtext("{*}revision/{*}text") or ""
        redirect = page.find("{*}redirect") is not None or text[:9].lower() == "#redirect"
        yield _Page(page.findtext("{*}title") or "", page.findtext("{*}ns") or "", redirect, text)
