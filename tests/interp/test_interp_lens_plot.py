from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from saelab.errors import ConfigError
from saelab.interp.lens import logit_lens
from saelab.interp.lens_plot import picture_of, write_reading
from saelab.interp.picture_page import check_suffix


@pytest.fixture(scope="module")
def reading(tiny_model):
    return logit_lens(tiny_model, "the <script>alert(1)</script>\nriver & sea")


def test_each_cell_names_its_likeliest_token(reading):
    picture = picture_of(reading)
    n_layers, n_tokens = reading.kl.shape
    assert len(picture.boxes) == n_layers * n_tokens
    assert [word.text for word in picture.words if word.anchor == "end"] == ["embed", "0", "1", "2"]
    hints = [box.hint for box in picture.boxes]
    for row, hook in enumerate(reading.hook_names):
        for column in range(n_tokens):
            best = reading.top(hook, column)[0]
            assert f"{best.token!r} {best.probability:.3f}" in hints[row * n_tokens + column]
    surest = max(range(n_tokens), key=lambda column: float(reading.top_probs[-1, column, 0]))
    shades = [sum(box.colour) for box in picture.boxes[-n_tokens:]]
    assert shades[surest] == min(shades)


def test_the_picture_is_written_in_the_form_that_its_ending_names(reading, tmp_path):
    for suffix in (".png", ".svg", ".html"):
        write_reading(reading, tmp_path / f"lens{suffix}")
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    tree = ElementTree.fromstring((tmp_path / "lens.svg").read_text("utf-8"))
    assert len(tree.findall(".//{http://www.w3.org/2000/svg}title")) == reading.kl.numel()
    page = (tmp_path / "lens.html").read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="', page)  # nothing is fetched


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.jpg; end it in \.png, \.svg, \.html"):
        check_suffix(tmp_path / "lens.jpg", numbers=False)
