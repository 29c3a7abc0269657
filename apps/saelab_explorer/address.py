"""The address bar: it holds names and numbers, checked here, and never a path, a prompt or anything that is run."""

from __future__ import annotations

from collections.abc import Mapping
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
            low=_decade(query.get("low"), DECADES[0]),
            high=_decade(query.get("high"), DECADES[-1]),
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


def _decade(text: str | None, default: float) -> float:
    """The stop of ``DECADES`` nearest to a number in the address."""
    try:
        value = float(text) if text else default
    except ValueError:
        return default
    return min(DECADES, key=lambda stop: abs(stop - value)) if value == value else default


SteerMode = Literal["completion", "chat"]


@dataclass(frozen=True, kw_only=True)
class SteerSettings:
    """Settings of the steering page, prompt excepted."""

    strength: float = 0.6
    """Norm of the added vector as a share of the mean residual norm."""
    mode: SteerMode = "completion"

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        try:
            strength = float(query.get("strength", "0.6"))
        except ValueError:
            strength = 0.6
        return cls(strength=min(max(round(strength, 2), -2.0), 2.0) if strength == strength else 0.6,
                   mode="chat" if query.get("mode") == "chat" else "completion")  # fmt: skip

    def query(self) -> dict[str, str]:
        return {"strength": f"{self.strength:g}"} | ({"mode": self.mode} if self.mode != "completion" else {})
