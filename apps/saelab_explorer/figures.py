"""How numbers and tokens are written on the pages."""

from __future__ import annotations


def percent(share: float) -> str:
    """A share with as many digits as it needs: 99.7 %, 12 %, 3.4 %, 0.056 %."""
    value = 100 * share
    if value == 0:
        return "0 %"
    if 99 < value < 100:  # not quite all is not all
        return f"{min(value, 99.9):.1f} %"
    if value >= 10:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %" if value >= 0.001 else f"{value:.0e} %"


def signed(value: float) -> str:
    """Two decimals with a sign, and a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def count(n: float) -> str:
    """A count with thin groups: 1,234 up to six digits, then 1.2 M."""
    return f"{n:,.0f}" if n < 1e6 else f"{n / 1e6:.1f} M" if n < 1e9 else f"{n / 1e9:.1f} G"


def plural(n: int, noun: str) -> str:
    return f"{count(n)} {noun}" + ("" if n == 1 else "s")


def visible(text: str) -> str:
    """``text`` with its line breaks and tabs drawn."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
