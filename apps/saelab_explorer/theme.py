"""Colours and type, once: Streamlit's theme, the ramp of activations, and the two signs of a logit effect.

Activations have five steps instead of a continuous ramp, so that a reader can name them and a legend fits in one line.
Contrast of text on each step is at least 4.5 in both themes; the steps stay apart under protanopia and deuteranopia.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

Scheme = Literal["light", "dark"]


class Palette(NamedTuple):
    ramp: tuple[str, str, str, str, str]
    """Activation, weak to strong. Zero has no colour at all."""
    ramp_text: tuple[str, str, str, str, str]
    positive: str
    """A token made more likely. Always beside its printed sign: the two hues have equal luminance."""
    negative: str
    baseline: str
    """Unsteered, on every page."""
    steered: str
    series: tuple[str, str, str, str, str, str]
    """Curves that are compared, in order. Each also has a dash pattern of its own, for those who see no hue."""
    bar: str
    """Histogram bars and curves."""
    muted: str
    line: str
    line_strong: str
    chip: str
    hover: str
    chosen: str
    ink: str
    """Background of tooltips, with text in ``paper``."""
    paper: str


PALETTES: dict[Scheme, Palette] = {
    "light": Palette(
        ramp=("#fee6ce", "#fdd0a2", "#fdae6b", "#fd8d3c", "#f16913"),
        ramp_text=("#1b1a17", "#1b1a17", "#1b1a17", "#1b1a17", "#000000"),
        positive="#b2182b",
        negative="#2166ac",
        baseline="#0072b2",
        steered="#d55e00",
        series=("#0072b2", "#d55e00", "#007a5a", "#a0437f", "#8a6a00", "#55524c"),
        bar="#e07b2d",
        muted="#6b675f",
        line="#ebe7df",
        line_strong="#d5d0c5",
        chip="#f1eee7",
        hover="#f6f3ed",
        chosen="#e7f2f0",
        ink="#26231f",
        paper="#fdfcfa",
    ),
    "dark": Palette(
        ramp=("#3b2a1a", "#5c3a17", "#854e13", "#a85d0e", "#e08214"),
        ramp_text=("#f0ede6", "#ffffff", "#ffffff", "#ffffff", "#000000"),
        positive="#ef8a62",
        negative="#67a9cf",
        baseline="#56b4e9",
        steered="#e69f00",
        series=("#56b4e9", "#e69f00", "#2fc49a", "#e08fc0", "#e8dc4a", "#b8b3a9"),
        bar="#d98d3a",
        muted="#a5a096",
        line="#2a2c31",
        line_strong="#42454c",
        chip="#282a2f",
        hover="#1f2125",
        chosen="#1c3332",
        ink="#ece9e2",
        paper="#17181b",
    ),
}

_SHARED: dict[str, str | int | bool] = {
    "font": "sans-serif",
    "codeFont": "monospace",
    "headingFont": "sans-serif",
    "baseFontSize": 15,
    "headingFontSizes": "1.5rem",
    "paddingTop": "1rem",
    "paddingBottom": "3rem",
    "baseRadius": "6px",
    "buttonRadius": "6px",
    "showWidgetBorder": True,
    "showSidebarBorder": True,
    "linkUnderline": False,
}

_BY_SCHEME: dict[Scheme, dict[str, str]] = {
    "light": {
        "primaryColor": "#0e7a73",
        "backgroundColor": "#fdfcfa",
        "secondaryBackgroundColor": "#f4f2ed",
        "textColor": "#1f1d1a",
        "linkColor": "#0b6f69",
        "borderColor": "#e3dfd6",
    },
    "dark": {
        "primaryColor": "#3fb8ae",
        "backgroundColor": "#17181b",
        "secondaryBackgroundColor": "#202227",
        "textColor": "#e9e6df",
        "linkColor": "#5cc8bf",
        "borderColor": "#34363c",
    },
}

_SIDEBAR = {"light": {"backgroundColor": "#f6f4ef"}, "dark": {"backgroundColor": "#1c1d21"}}


def streamlit_options() -> dict[str, str | int | bool]:
    """Streamlit's ``theme.*`` options. Fonts are the three that Streamlit ships, so nothing is fetched."""
    options: dict[str, str | int | bool] = {f"theme.{name}": value for name, value in _SHARED.items()}
    for scheme, colours in _BY_SCHEME.items():
        options |= {f"theme.{scheme}.{name}": value for name, value in colours.items()}
        options |= {f"theme.{scheme}.sidebar.{name}": value for name, value in _SIDEBAR[scheme].items()}
    return options


def page_style() -> str:
    """The style sheet of every page: the palette as properties, which components inherit, and classes of snippets."""
    light, dark = PALETTES["light"], PALETTES["dark"]
    pairs = {
        name.replace("_", "-"): (getattr(light, name), getattr(dark, name))
        for name in Palette._fields
        if isinstance(getattr(light, name), str)
    }
    for step in range(len(light.ramp)):
        pairs[f"step{step + 1}"] = (light.ramp[step], dark.ramp[step])
        pairs[f"on-step{step + 1}"] = (light.ramp_text[step], dark.ramp_text[step])
    for n in range(len(light.series)):
        pairs[f"series{n + 1}"] = (light.series[n], dark.series[n])
    # light-dark() follows the colour scheme that Streamlit sets on the app, so a change of theme needs no rerun
    properties = "".join(f"--sx-{name}:light-dark({one},{other});" for name, (one, other) in pairs.items())
    return f"<style>:root{{{properties}}}{Path(__file__).with_name('page.css').read_text('utf-8')}</style>"
