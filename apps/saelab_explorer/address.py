"""The address bar: it holds names and numbers, checked here, and never a path, a prompt or anything that is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self
from urllib.parse import urlencode

from saelab.errors import ConfigError

#: Stops of the density filter, as powers of ten; the first lets silent features through too.
DECADES = tuple(half / 2 for half in range(-14, 1))

KINDS = ("token", "previous", "bigram", "promotes", "weak", "none", "dead")
ORDERS = ("density", "max", "f1", "precision", "recall", "feature")


def whole_number(text: str, *, below: int, what: str) -> int:
    """``text`` as a whole number from 0 to ``below - 1``.

    Raises:
        ConfigError: it is anything else, also digits of other scripts, which Python's ``int`` would take.
    """
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < below:
        return int(text)
    raise ConfigError(f"{what} in the address must be a whole number from 0 to {below - 1}, got {text[:40]!r}")


def feature_query(run: str, feature: int) -> dict[str, str]:
    """The query of a feature's own address."""
    return {"run": run, "feature": str(feature)}


def link(page: str, query: Mapping[str, str]) -> str:
    """A relative address."""
    return f"{page}?{urlencode(query)}"


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What the feature table shows. Defaults stay out of the address, so that it is short."""

    q: str = ""
    """Words to look for; a quoted word means exactly that token."""
    kinds: tuple[str, ...] = ()
    """Kinds of label; empty for all."""
    low: float = DECADES[0]
    """Densities from 10^low ..."""
    high: float = DECADES[-1]
    """... to 10^high."""
    sort: str = ""
    """An order, ascending with a minus in front; empty for the best match of a search, else the best label first."""
    page: int = 0

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        """Filters of an address; what cannot be meant is left at its default."""
        sort = query.get("sort", "")
        return cls(
            q=query.get("q", "")[:200],
            kinds=tuple(kind for kind in KINDS if kind in query.get("kinds", "").split(",")),
            low=_stop(query.get("low"), DECADES, DECADES[0]),
            high=_stop(query.get("high"), DECADES, DECADES[-1]),
            sort=sort if sort.removeprefix("-") in ORDERS else "",
            page=int(page) if (page := query.get("page", "0")).isascii() and page.isdigit() and len(page) < 7 else 0,
        )

    def query(self) -> dict[str, str]:
        """The part of the address that brings these filters back."""
        given = {"q": self.q, "kinds": ",".join(self.kinds), "sort": self.sort}
        numbers = {"low": (self.low, DECADES[0]), "high": (self.high, DECADES[-1]), "page": (self.page, 0)}
        return {k: v for k, v in given.items() if v} | {
            k: f"{v:g}" for k, (v, default) in numbers.items() if v != default
        }

    def first_page(self) -> Self:
        return replace(self, page=0)


SteerMode = Literal["completion", "chat"]


@dataclass(frozen=True, kw_only=True)
class SteerSettings:
    """Settings of the steering page, prompt excepted."""

    strength: float = 0.6
    """Norm of the added vector as a share of the mean residual norm."""
    mode: SteerMode = "completion"

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        strength = _number(query.get("strength"))
        return cls(
            strength=cls.strength if strength is None else min(max(round(strength, 2), -2.0), 2.0),
            mode="chat" if query.get("mode") == "chat" else "completion",
        )

    def query(self) -> dict[str, str]:
        return {"strength": f"{self.strength:g}"} | ({"mode": self.mode} if self.mode != "completion" else {})


#: Strengths of the pull to the reference that the lab offers, from a policy close to it to one that has left it.
BETAS = (4.0, 3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.015, 0.01)
PAIRS = (10, 30, 100, 300, 1000, 3000)
ProxyKind = Literal["linear", "well_specified"]


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """Settings of the preference lab."""

    beta: float = 0.5
    good: float = 2.0
    """Place of the answers that are preferred."""
    bad: float = -1.0
    pairs: int = 300
    """Comparisons that the proxy is trained on."""
    proxy: ProxyKind = "linear"

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        """Settings of an address; what cannot be meant is left at its default, what is between stops goes to one."""
        return cls(
            beta=_stop(query.get("beta"), BETAS, cls.beta),
            good=_place(query.get("good"), cls.good),
            bad=_place(query.get("bad"), cls.bad),
            pairs=int(_stop(query.get("pairs"), PAIRS, cls.pairs)),
            proxy="well_specified" if query.get("proxy") == "well_specified" else "linear",
        )

    def query(self) -> dict[str, str]:
        numbers = {"beta": self.beta, "good": self.good, "bad": self.bad, "pairs": self.pairs}
        return {name: f"{value:g}" for name, value in numbers.items()} | (
            {"proxy": self.proxy} if self.proxy != "linear" else {}
        )


Similarity = Literal["direction", "activation"]
PairAxis = Literal["density", "norm", "max"]

#: Tokens over which activations of two SAEs can be compared.
TOKENS = (2048, 8192, 32768)


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Which two SAEs are compared, and how. Names are looked up among the indexed ones."""

    first: str = ""
    """Empty for the open run's only one."""
    second: str = ""
    by: Similarity = "direction"
    tokens: int = 8192
    axis: PairAxis = "density"

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        axis = query.get("axis")
        return cls(
            first=query.get("first", ""),
            second=query.get("second", ""),
            by="activation" if query.get("by") == "activation" else "direction",
            tokens=int(_stop(query.get("tokens"), TOKENS, cls.tokens)),
            axis="norm" if axis == "norm" else "max" if axis == "max" else "density",
        )

    def query(self) -> dict[str, str]:
        """The part of the address that brings these settings back; defaults are left out."""
        default = CompareSettings()
        pairs = {name: (str(getattr(self, name)), str(getattr(default, name))) for name in self.__dataclass_fields__}
        return {name: value for name, (value, usual) in pairs.items() if value != usual}


def _number(text: str | None) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _stop(text: str | None, stops: Sequence[float], default: float) -> float:
    value = _number(text)
    return default if value is None else min(stops, key=lambda stop: abs(stop - value))


def _place(text: str | None, default: float) -> float:
    value = _number(text)
    return default if value is None else round(min(max(value, -4.0), 4.0), 1)
