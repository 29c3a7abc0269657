"""The templates that carry words of the sentence they stand in, such as ``{{convert|3|mi|km}}``: "3 miles".

All others read as nothing: notes, boxes, flags, pronunciations, requests to editors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

#: unit as Wikipedia's convert template abbreviates it -> (after the number, inside a compound such as "3-mile")
_UNITS = {
    "mi": ("miles", "mile"),
    "km": ("kilometres", "kilometre"),
    "m": ("metres", "metre"),
    "ft": ("feet", "foot"),
    "in": ("inches", "inch"),
    "cm": ("centimetres", "centimetre"),
    "mm": ("millimetres", "millimetre"),
    "yd": ("yards", "yard"),
    "sqmi": ("square miles", "square-mile"),
    "km2": ("square kilometres", "square-kilometre"),
    "m2": ("square metres", "square-metre"),
    "m3": ("cubic metres", "cubic-metre"),
    "sqft": ("square feet", "square-foot"),
    "cuft": ("cubic feet", "cubic-foot"),
    "acre": ("acres", "acre"),
    "ha": ("hectares", "hectare"),
    "lb": ("pounds", "pound"),
    "kg": ("kilograms", "kilogram"),
    "g": ("grams", "gram"),
    "oz": ("ounces", "ounce"),
    "t": ("tonnes", "tonne"),
    "mph": ("miles per hour", "mile-per-hour"),
    "km/h": ("kilometres per hour", "kilometre-per-hour"),
    "nmi": ("nautical miles", "nautical-mile"),
    "impgal": ("imperial gallons", "imperial-gallon"),
    "USgal": ("US gallons", "US-gallon"),
    "MW": ("megawatts", "megawatt"),
    "hp": ("horsepower", "horsepower"),
    **dict.fromkeys(["C", "°C"], ("°C", "°C")),
    **dict.fromkeys(["F", "°F"], ("°F", "°F")),
}
_RANGES = {
    **{"to": " to ", "to(-)": " to ", "-": "–", "–": "–", "and": " and ", "or": " or ", "+/-": " ± "},
    **dict.fromkeys(["by", "x", "×"], " by "),
}
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

#: Stands where a number or a formula cannot be told; the bracket or sentence around it makes no sense without it.
HOLE = "\x04"

_Named = dict[str, str]


def template_text(template: Any, render: Callable[[Any], str]) -> str:
    """The words that ``template`` (a parser node) shows in a sentence; ``render`` turns its arguments into text."""
    name = re.sub(r"[\s_]+", " ", render(template.name)).strip().lower()
    if name.startswith("formatnum:"):
        return name.partition(":")[2].strip()
    show = _SHOWN.get(name) or (_first if name.startswith("lang-") else None)
    if show is None:
        return ""
    positional, named = [], {}
    for parameter in template.params:
        text = render(parameter.value)
        if parameter.showkey and not str(parameter.name).strip().isdigit():
            named[str(parameter.name).strip().lower()] = text.strip()
        else:
            positional.append(text if "\n" in text else text.strip())
    return show(positional, named)


def _first(args: list[str], named: _Named) -> str:
    return args[0] if args else ""


def _second(args: list[str], named: _Named) -> str:
    return args[1] if len(args) > 1 else ""


def _last(args: list[str], named: _Named) -> str:
    return args[-1] if args else ""


def _joined(args: list[str], named: _Named) -> str:
    return "".join(args)


def _listed(args: list[str], named: _Named) -> str:
    return ", ".join(arg for arg in args if arg)


def _constant(text: str) -> Callable[[list[str], _Named], str]:
    return lambda args, named: text


def _paragraph(args: list[str], named: _Named) -> str:
    return f"\n\n{named.get('text') or named.get('quote') or _first(args, named)}\n\n"


def _as_of(args: list[str], named: _Named) -> str:
    year, month, day = [*args, "", "", ""][:3]
    if month.isdigit() and 1 <= int(month) <= 12:
        month = _MONTHS[int(month) - 1]
    start = "as of" if named.get("lc") else "As of"
    return named.get("alt") or " ".join(part for part in (start, day, month, year) if part)


def _fraction(args: list[str], named: _Named) -> str:
    match args:
        case [denominator]:
            return f"1/{denominator}"
        case [numerator, denominator]:
            return f"{numerator}/{denominator}"
        case [whole, numerator, denominator]:
            return f"{whole} {numerator}/{denominator}"
    return ""


def _value(args: list[str], named: _Named) -> str:
    exponent = f" × 10^{named['e']}" if named.get("e") else ""
    unit = named.get("u") or named.get("ul") or ""
    return f"{_first(args, named)}{exponent}" + (f" {unit}" if unit else "")


def _convert(args: list[str], named: _Named) -> str:
    """The first quantity, ranges included, in words; the conversion itself is left out."""
    compound = named.get("adj") in ("on", "mid")
    text, rest, unit = _first(args, named), args[1:], ""
    while len(rest) >= 2 and rest[0] in _RANGES:
        text, rest = text + _RANGES[rest[0]] + rest[1], rest[2:]
    if rest:
        unit, rest = rest[0], rest[1:]
    text = _quantity(text, unit, compound)
    if len(rest) >= 2 and re.fullmatch(r"[\d.]+", rest[0]) and rest[1] in ("in", "oz", "lb", "ft"):  # 5 ft 10 in
        text += (" " if not compound else "-") + _quantity(rest[0], rest[1], compound)
    return text


def _quantity(number: str, unit: str, compound: bool) -> str:
    plural, single = _UNITS.get(unit, (unit, unit))
    if plural.startswith("°"):
        return f"{number} {plural}"
    if compound:
        return f"{number}-{single}"
    return f"{number} {single.replace('-', ' ') if number == '1' else plural}"


def _ship(prefix: str) -> Callable[[list[str], _Named], str]:
    return lambda args, named: f"{prefix} {_first(args, named)}"


_SHOWN: dict[str, Callable[[list[str], _Named], str]] = {
    **dict.fromkeys(["nowrap", "nobr", "nobold", "small", "smaller", "big", "bigger", "large", "larger"], _first),
    **dict.fromkeys(["sc", "smallcaps", "italics", "em", "strong", "sup", "sub", "code", "key", "keypress"], _first),
    **dict.fromkeys(["abbr", "tooltip", "math", "mvar", "vanchor", "visible anchor", "linktext", "nihongo"], _first),
    **dict.fromkeys(["flag", "flagcountry", "nq", "vr", "nts"], _first),
    **dict.fromkeys(["lang", "script", "rtl-lang", "wikt-lang", "ill2"], _second),
    **dict.fromkeys(["transl", "transliteration"], _last),
    **dict.fromkeys(["chem", "chem2", "e!"], _joined),
    **dict.fromkeys(["hlist", "plainlist", "unbulleted list", "ubl"], _listed),
    **dict.fromkeys(["quote", "cquote", "blockquote", "quotation", "rquote", "centered pull quote"], _paragraph),
    **dict.fromkeys(["convert", "cvt"], _convert),
    **dict.fromkeys(["frac", "sfrac", "fraction"], _fraction),
    **dict.fromkeys(["inflation", "format price", "pop density", "currentyear", "age"], _constant(HOLE)),
    **dict.fromkeys(["ndash", "spaced ndash", "snd", "spnd"], _constant(" – ")),
    **dict.fromkeys(["mdash", "mdashb"], _constant("—")),
    **dict.fromkeys(["nbsp", "spaces", "thinsp", "space", "·", "dot", "bullet"], _constant(" ")),
    **dict.fromkeys(["' \"", "'\""], _constant("'\"")),
    "angbr": lambda args, named: f"⟨{_first(args, named)}⟩",
    "as of": _as_of,
    "val": _value,
    "coord": lambda args, named: HOLE if "title" not in named.get("display", "") else "",
    "ipa": _first,
    "ipaslink": lambda args, named: f"/{_first(args, named)}/",
    "e": lambda args, named: f" × 10^{_first(args, named)}",
    "circa": lambda args, named: f"c. {_first(args, named)}".strip(),
    "c.": lambda args, named: f"c. {_first(args, named)}".strip(),
    "nuclide2": lambda args, named: "-".join(args[:2]),
    "simplenuclide2": lambda args, named: "-".join(args[:2]),
    "us$": lambda args, named: f"US${_first(args, named)}",
    "railgauge": lambda args, named: _first(args, named),
    "'s": _constant("'s"),
    "'": _constant("'"),
    '-"': _constant('"'),
    "=": _constant("="),
    "harvtxt": lambda args, named: f"{' and '.join(args[:-1])} ({args[-1]})" if len(args) > 1 else "",
    "hms": _ship("HMS"),
    "uss": _ship("USS"),
    "oldstyledate": lambda args, named: " ".join(args[:2]),
    "ill": lambda args, named: _second(args, named),
    "music": lambda args, named: {"flat": "♭", "sharp": "♯"}.get(_first(args, named), ""),
}
