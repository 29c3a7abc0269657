from __future__ import annotations

import pytest

from saelab.activations.wikitext import clean

SENTENCE = "The river rises in the northern hills and flows to the sea."


def test_plain_sentences_pass_unchanged():
    assert clean(SENTENCE) == SENTENCE


def test_paragraphs_are_separated_by_one_blank_line_and_wrapped_lines_are_joined():
    text = "The first paragraph is written\non two lines of source.\n\n\n\nThe second   one has blank lines above."
    assert clean(text) == (
        "The first paragraph is written on two lines of source.\n\nThe second one has blank lines above."
    )


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("[[Vienna]]", "Vienna"),
        ("[[Vienna|the capital]]", "the capital"),
        ("[[tower]]s", "towers"),
        ("[[:Category:Rivers]]", "Category:Rivers"),
        ("[[:de:Donau|the German page]]", "the German page"),
        ("[http://example.org a report]", "a report"),
        ("'''bold''' and ''italic''", "bold and italic"),
        ("'''''both'''''", "both"),
        ("caf&eacute; &amp; bar&nbsp;42", "café & bar 42"),
        ("10<sup>6</sup>", "10⁶"),
        ("the 4<sup>th</sup>", "the 4th"),
        ("H<sub>2</sub>O", "H2O"),
        ("<span style='color:red'>red</span>", "red"),
        ("<nowiki>[[not a link]</nowiki>", "not a link]"),
        ("<math>x + 1</math>", "x + 1"),
    ],
)
def test_inline_markup_leaves_its_words(markup: str, text: str):
    assert clean(f"It says {markup} in the middle of a sentence.") == f"It says {text} in the middle of a sentence."


@pytest.mark.parametrize(
    "markup",
    [
        "<ref>Smith 1990, p. 5</ref>",
        '<ref name="smith" />',
        "<!-- do not change this\n\nwithout asking -->",
        "{{citation needed|date=May 2010}}",
        "{{sfn|Smith|1990|p=5}}",
        "[[File:Tower.jpg|thumb|right|200px|The [[tower]] in ''1900'', seen from {{convert|3|km|mi}} away]]",
        "[[image:Tower.png|left|upright=1.2|alt=A tower|Caption with a [http://example.org link]]]",
        "[[Category:Towers of the world]]",
        "[[de:Turm]]",
        "[[zh-min-nan:Turm]]",
        "__NOTOC__",
        "<gallery>\nFile:A.jpg|One caption of a gallery image here\nFile:B.jpg|Two\n</gallery>",
        '<ref group="note">A note with a {{cite book|title=Book|last=Doe}} and a [[link|in it]].</ref>',
    ],
)
def test_what_is_no_prose_leaves_nothing(markup: str):
    assert clean(f"The tower was built{markup} by the people of the city.") == (
        "The tower was built by the people of the city."
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{convert|1300|mi|km}}", "1300 miles"),
        ("{{convert|1|mi|km}}", "1 mile"),
        ("{{convert|10|to|20|ft|m|abbr=on}}", "10 to 20 feet"),
        ("{{convert|5|ft|10|in|m}}", "5 feet 10 inches"),
        ("{{convert|35|-|45|C|F}}", "35–45 °C"),
        ("{{cvt|200|sqmi}}", "200 square miles"),
        ("{{lang|grc|ἀναρχία}}", "ἀναρχία"),
        ("{{lang-la|albedo}}", "albedo"),
        ("{{transl|ar|ALA|ilāh}}", "ilāh"),
        ("{{nowrap|[[Apollo 7]]}}", "Apollo 7"),
        ("{{as of|2014|5|lc=y}}", "as of May 2014"),
        ("{{frac|3|2}}", "3/2"),
        ("{{chem|H|2|O}}", "H2O"),
        ("{{val|6.2|e=18|u=m}}", "6.2 × 10^18 m"),
        ("{{USS|Hornet|CV-12}}", "USS Hornet"),
        ("{{formatnum:3003}}", "3003"),
        ("1{{ndash}}2", "1 – 2"),
        ("{{angbr|a}}", "⟨a⟩"),
    ],
)
def test_templates_that_carry_words_keep_them(template: str, text: str):
    assert clean(f"It is said to be {template} here and there.") == f"It is said to be {text} here and there."


def test_a_three_foot_wall_stays_a_three_foot_wall():
    assert "a 3-foot wall" in clean("Around it stands a {{convert|3|ft|m|adj=on}} wall of old stones.")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("Turm ({{IPA-en|x}}; {{lang-de|Turm}}) is a word of the Germans.", "Turm (Turm) is a word of the Germans."),
        ("Aruba ({{respell|a}}, {{IPA-nl|b}}) is an island in the sea.", "Aruba is an island in the sea."),
        ("It cost $5 (${{Inflation|US|5}} in dollars) to sleep for one night.", "It cost $5 to sleep for one night."),
        ("It rains here often {{cn}}, but not in the summer.", "It rains here often, but not in the summer."),
    ],
)
def test_brackets_and_commas_close_up_where_a_template_went(source: str, text: str):
    assert clean(source) == text


def test_a_sentence_that_lost_its_formula_goes_and_the_others_stay():
    text = rf"{SENTENCE} Its depth is <math>\frac{{a}}{{b}}</math> metres at most. Nobody has measured it again."
    assert clean(text) == f"{SENTENCE} Nobody has measured it again."


def test_tables_go_even_when_nested():
    table = "{| class='wikitable'\n! Year !! People\n|-\n| 1900 || 12\n|-\n|\n{|\n| inner || cell\n|}\n|}"
    assert clean(f"{SENTENCE}\n\n{table}\n\n{SENTENCE}") == f"{SENTENCE}\n\n{SENTENCE}"


def test_a_table_that_is_never_closed_leaves_no_cells():
    assert clean(f"{SENTENCE}\n\n{{| class='x'\n|-\n| 1900 || 12 people in the whole of the town\n") == SENTENCE


def test_infoboxes_with_prose_inside_go():
    assert clean("{{Infobox river\n| name = River\n| notes = A long note of many words\n}}\n" + SENTENCE) == SENTENCE


@pytest.mark.parametrize(
    "title",
    [
        *("See also", "References", "Further reading", "External links", "Notes", "Bibliography"),
        *("Notes and references", "'''Sources'''"),
    ],
)
def test_sections_of_references_go_with_their_subsections(title: str):
    text = f"{SENTENCE}\n\n== {title} ==\n* Smith, J. (1990). ''A book title of more than eight words''. Publisher.\n"
    text += f"=== Books ===\n{SENTENCE}\n== Later ==\nThe section after it is still there for the reader."
    assert clean(text) == f"{SENTENCE}\n\nLater\n\nThe section after it is still there for the reader."


def test_headings_stay_as_lines_unless_nothing_is_left_below():
    text = f"== Course ==\n=== Upper ===\n{SENTENCE}\n=== Lower ===\n{{{{Main|Lower course}}}}\n"
    assert clean(f"{text}== Views ==\n[[File:A.jpg]]\n") == f"Course\n\nUpper\n\n{SENTENCE}"


def test_list_items_that_are_sentences_stay_without_bullets_and_mere_names_go():
    text = "It has these parts:\n* [[Apple]]\n* Pear\n# The third part is a long sentence with many words.\n* \n*\n"
    assert clean(f"{SENTENCE}\n\n{text}") == f"{SENTENCE}\n\nThe third part is a long sentence with many words."


def test_poems_keep_their_lines():
    text = "<poem>\nO beautiful for spacious skies,\nFor amber waves of grain,\n</poem>"
    assert clean(text) == "O beautiful for spacious skies,\nFor amber waves of grain,"


def test_a_quotation_template_becomes_a_paragraph():
    assert clean(f"{SENTENCE} {{{{quote|We hold these truths to be self-evident here.|Jefferson}}}}") == (
        f"{SENTENCE}\n\nWe hold these truths to be self-evident here."
    )


BROKEN = ["[[File:A.jpg|thumb|", "{{Infobox", "'''", "<ref>", "[[link", "}}", "|}", "]]", "<div>", "&"]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_markup_leaves_no_markup(broken: str):
    text = clean(f"{SENTENCE}\n\n{SENTENCE} {broken}\n\n{SENTENCE}")
    assert text.startswith(SENTENCE)
    assert not any(mark in text for mark in ("[[", "]]", "{{", "}}", "'''", "<", "thumb|", "{|", "|}"))


def test_an_article_without_prose_is_empty():
    assert clean("{{Infobox}}\n[[Category:Nothing]]\n== References ==\n{{reflist}}") == ""
