from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import Image

from saelab.errors import ConfigError, ShapeError
from saelab.interp.heat_map import colour_of, heat_map, png, svg
from saelab.interp.patch_plot import as_json, picture_of, write_grid
from saelab.interp.patching import PatchGrid

HOSTILE = ("<script>alert(1)</script>", "a\x00\x1b]b\n", "\u202egnp", '"><img src=x onerror=1>', "&amp;")


def grid_of(target: float | None = 2.0) -> PatchGrid:
    return PatchGrid(
        effects=torch.tensor([[1.0, -3.0, 0.0, 0.1, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]]), rows=("0", "1"),
        columns=HOSTILE, base=-1.0, target=target, at="resid_post", kind="denoise", method="exact",
        metric="logit_difference", tokens=("<bos>", *HOSTILE), other_tokens=("<bos>", *HOSTILE),
    )  # fmt: skip


def test_an_svg_is_whole_and_holds_no_code_whatever_the_tokens():
    text = svg(picture_of(grid_of()))
    tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(text).iter()}
    assert tags == {"svg", "rect", "text", "title"}
    assert "<script" not in text
    assert "<img" not in text


def test_each_cell_says_its_number():
    hints = [e.text for e in ET.fromstring(svg(picture_of(grid_of()))).iter() if e.tag.endswith("title")]
    assert len(hints) == 10
    assert hints[1].endswith("-1 share of the logit_difference")  # -3 of the 3 from -1 to 2


def test_the_colour_tells_the_sign_and_nothing_is_white():
    assert colour_of(0.0) == (255, 255, 255)
    red, blue = colour_of(-1.0), colour_of(1.0)
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert colour_of(5.0) == blue


def test_a_png_has_the_colours_of_the_svg_at_twice_its_size():
    picture = picture_of(grid_of())
    image = Image.open(io.BytesIO(png(picture)))
    assert image.size == (2 * picture.width, 2 * picture.height)
    for box in picture.boxes[:10]:
        assert image.getpixel((int(2 * box.x) + 1, int(2 * box.y) + 1)) == box.colour


def test_nothing_is_drawn_outside_the_picture():
    values = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    picture = heat_map(
        values, rows=[str(i) for i in range(30)], columns=["x" * 40] * 40, title="t", unit="u", across="a", down="d"
    )
    for box in picture.boxes:
        assert box.x >= 0
        assert box.x + box.width <= picture.width
        assert box.y + box.height <= picture.height
    assert all(0 <= word.x <= picture.width and 0 <= word.y <= picture.height for word in picture.words)


def test_labels_must_fit_the_values():
    for values, rows in ((torch.zeros(2, 2), ["a"]), (torch.tensor([[float("nan")]]), ["a"]), (torch.zeros(0, 1), [])):
        with pytest.raises(ShapeError, match="finite values, one label"):
            heat_map(values, rows=rows, columns=["c"] * values.shape[1], title="t", unit="u")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html", ".json"])
def test_a_picture_comes_with_its_numbers(tmp_path, suffix):
    path = tmp_path / "new" / f"map{suffix}"
    files = write_grid(grid_of(), path)
    assert sorted(path.parent.iterdir()) == sorted(files)
    numbers = json.loads((tmp_path / "new" / "map.json").read_text("utf-8"))
    assert numbers == json.loads(json.dumps(as_json(grid_of())))
    assert numbers["shares"][0] == pytest.approx([1 / 3, -1, 0, 0.1 / 3, 0.5 / 3])


def test_a_page_needs_no_other_file(tmp_path):
    (page, _) = write_grid(grid_of(), tmp_path / "map.html")
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert not re.search(r'(src|href)="', text)
    assert "logit_difference on" in text


def test_effects_are_drawn_where_there_are_no_shares():
    assert as_json(grid_of(target=None))["shares"] is None
    assert as_json(grid_of(target=-1.0))["shares"] is None
    assert any(word.text == "change of logit_difference" for word in picture_of(grid_of(target=None)).words)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.pdf; end it in \.png"):
        write_grid(grid_of(), tmp_path / "map.pdf")
