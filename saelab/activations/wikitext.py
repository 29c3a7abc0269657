"""Wikitext to plain text: the sentences a reader of the article sees, without captions, tables, notes and mere lists.

The parser's tree is rendered to lines that carry a mark for headings and list items; the lines become blocks; the
blocks that hold no prose go. Headings stay, as lines of their own, because the prose below refers to them ("History");
a heading with nothing left below it goes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from saelab.activations.wikitemplates import HOLE, template_text

# Sections that hold references and links, not prose.
_APPENDICES = re.compile(
    r"see also|further reading|external links?|gallery|discography|publications|citations?|select(ed)? works"
    r"|(explanatory |foot ?|end ?)?notes?|((selected|select|partial) )?(publications|filmography)"
    r"|((general|cited|selected|annotated|primary|secondary) )?(references?|sources|bibliograph(y|ies)|works cited)"
    r"|(foot)?notes (and|&) (references|citations)|(references|citations) (and|&) (foot)?(notes|sources)"
)
_DROPPED_TAGS = frozenset(
    [
        *("ref", "references", "table", "gallery", "math", "chem", "timeline", "score", "imagemap", "hiero", "graph"),
        *("mapframe", "syntaxhighlight", "source", "pre", "style"),
    ]
)
_NOT_SHOWN = re.compile(r"(file|image|media|category|[a-z]{2,3}(-[a-z]+)*|simple) *:", re.IGNORECASE)
_BOOK = re.compile(r"\bIS[BS]N\b")  # a list of publications that no heading gives away
_INVISIBLE = {0xA0: " ", 0x200B: None, 0x200E: None, 0x200F: None, 0xAD: None, 0xFEFF: None}
_SUPERSCRIPTS = str.maketrans("0123456789+-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")

# marks of our own; XML text cannot hold these characters
_ITEM, _HEADING, _BREAK = "\x01", "\x02", "\x03"
_MIN_WORDS_OF_ITEM = 8
_MIN_WORDS_OF_PARAGRAPH = 6


class _Block(NamedTuple):
    level: int  # of a heading; 0 for prose and lists
    text: str


def clean(wikitext: str) -> str:
    """The prose of one article: paragraphs and headings with a blank line between them. Empty if there is none."""
    import mwparserfromhell

    wikitext = re.sub(r"<!--.*?(-->|\Z)", "", wikitext, flags=re.DOTALL)
    wikitext = re.sub(r"__[A-Z]{3,}__", "", wikitext)
    # bold and italics are left to _tidy: the parser gives up on quotes that do not pair, and then on all around them
    code = mwparserfromhell.parse(wikitext, skip_style_tags=True)
    blocks = _without_empty_headings(_blocks(_render(_without_appendices(code.nodes))))
    return "\n\n".join(block.text for block in blocks)


def _without_appendices(nodes: Iterable[Any]) -> Iterable[Any]:
    from mwparserfromhell.nodes import Heading

    skipped_level = None
    for node in nodes:
        if isinstance(node, Heading):
            if skipped_level is not None and node.level > skipped_level:
                continue
            title = _tidy(_render(node.title.nodes)).lower()
            skipped_level = node.level if _APPENDICES.fullmatch(title) else None
        if skipped_level is None:
            yield node


def _render(nodes: Iterable[Any]) -> str:
    return "".join(map(_render_node, nodes))


def _render_node(node: Any) -> str:
    from mwparserfromhell import nodes as kinds

    match node:
        case kinds.Text():
            return str(node.value)
        case kinds.HTMLEntity():
            return html.unescape(str(node))
        case kinds.Heading():
            return f"\n{_HEADING}{node.level}{_render(node.title.nodes)}\n"
        case kinds.Wikilink():
            return _link_text(node)
        case kinds.ExternalLink():
            return _render(node.title.nodes) if node.title is not None and node.brackets else ""
        case kinds.Template():
            return template_text(node, _rendered)
        case kinds.Argument():
            return _rendered(node.default)
        case kinds.Tag():
            return _tag_text(node)
    return ""


def _rendered(code: Any) -> str:
    return "" if code is None else _render(code.nodes)


def _link_text(link: Any) -> str:
    title = _rendered(link.title).strip()
    if _NOT_SHOWN.match(title):
        return ""
    text = _rendered(link.text) if link.text is not None else title.removeprefix(":")
    return text if "\n\n" not in text else ""  # a link does not span paragraphs: this one was never closed


def _tag_text(tag: Any) -> str:
    name = str(tag.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return _formula(tag) if name == "math" else ""
    if name in ("li", "dd", "dt"):  # "*", "#", ":", ";" at the start of a line, or an HTML list
        return (_ITEM if tag.wiki_markup else f"\n{_ITEM}") + _rendered(tag.contents)
    if name == "br":
        return _BREAK
    text = _rendered(tag.contents)
    if name == "sup":
        return text.translate(_SUPERSCRIPTS) if re.fullmatch(r"[0-9+−-]+", text) else text
    if name == "poem":
        return f"\n\n{text.strip().replace(chr(10), _BREAK)}\n\n"
    if name in ("blockquote", "div", "p", "center", "hr", "ol", "ul"):
        return f"\n\n{text}\n\n"
    return text


def _formula(tag: Any) -> str:
    """A formula that reads the same without TeX, such as a variable's name; nothing for the others."""
    source = str(tag.contents).strip()
    return source if re.fullmatch(r"[\w ()+\-=,.]{1,40}", source) else HOLE


def _blocks(rendered: str) -> list[_Block]:
    """Paragraphs, lists and headings in order; those without a sentence's worth of words are left out."""
    blocks: list[_Block] = []
    prose: list[str] = []
    items: list[str] = []

    def close() -> None:
        paragraph = _tidy(" ".join(prose))
        if _words(paragraph) >= _MIN_WORDS_OF_PARAGRAPH:
            blocks.append(_Block(0, paragraph))
        if items:
            blocks.append(_Block(0, "\n".join(items)))
        prose.clear()
        items.clear()

    for line in rendered.split("\n"):
        start = line.strip(f" \t{_BREAK}{_ITEM}{HOLE}")
        if line.startswith(_HEADING):
            close()
            blocks.append(_Block(int(line[1]), _tidy(line[2:])))
        elif not start or start.startswith(("|", "!", "{|", "}}")):  # remains of a table that was never closed
            close()
        elif line.startswith(_ITEM):
            if prose:
                close()
            item = _tidy(line.strip(_ITEM + " "))
            if _words(item) >= _MIN_WORDS_OF_ITEM and not _BOOK.search(item):
                items.append(item)
        else:
            if items:
                close()
            prose.append(line)
    close()
    return blocks


def _without_empty_headings(blocks: Iterable[_Block]) -> list[_Block]:
    kept: list[_Block] = []
    for block in blocks:
        if block.level:
            while kept and kept[-1].level >= block.level:
                kept.pop()
        kept.append(block)
    while kept and kept[-1].level:
        kept.pop()
    return kept


def _without_holes(text: str) -> str:
    """Leave out the brackets, and after these the sentences, that lost a formula or a number."""
    if HOLE not in text:
        return text
    text = re.sub(rf"\s*[(\[][^()\[\]]*{HOLE}[^()\[\]]*[)\]]", "", text)
    sentences = re.split(r"(?<=[.!?:]) (?=\S*[A-Z])", text)
    return " ".join(sentence for sentence in sentences if HOLE not in sentence)


def _words(text: str) -> int:
    return len(re.findall(r"[^\W\d_]{2,}", text))


def _tidy(text: str) -> str:
    """One paragraph's spacing and punctuation after its markup went."""
    text = html.unescape(text).translate(_INVISIBLE)
    text = re.sub(r"'{2,}", "", text)  # bold and italics
    text = re.sub(r"\[\[ *(?:file|image|category) *:[^\[\]]*", "", text, flags=re.IGNORECASE)  # never closed
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?|\]\]|\{\{|\}\}|\{\||\|\}", "", text)  # halves of links, templates, tables
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)  # tags that were never closed
    text = text.replace(_ITEM, "").replace(_HEADING, "")
    text = re.sub(r"(?<=\s)\|(?=\w)", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = _without_holes(text)
    before = None
    while before != text:  # what a dropped template leaves inside brackets
        before = text
        text = re.sub(r"([(\[])\s*(?:[,;:/–-]|or\b|and\b)*\s*([)\]])", "", text)
        text = re.sub(r"\(\s*[,;:]+\s*", "(", text)
        text = re.sub(r"\s*[,;:]+\s*\)", ")", text)
        text = re.sub(r"([:;,])(?:\s*[;,])+", r"\1", text)
        text = re.sub(r"\(\s+", "(", text)
        text = re.sub(r"\s+\)", ")", text)
        text = re.sub(r"\s+([,.;:!?])(?=[\s)]|$)", r"\1", text)
        text = re.sub(r"\s+", " ", text).strip()
    lines = [line.strip() for line in text.split(_BREAK)]
    return "\n".join(line for line in lines if line)
