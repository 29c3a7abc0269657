"""saelab align overopt: reward over-optimisation in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import AsJson, ConfigFile, Overrides, PrintConfig, emit, say, table

if TYPE_CHECKING:
    from saelab.align.overopt import Curve, Overoptimisation


def overopt(
    pairs: Annotated[int | None, typer.Option(help="Comparisons that the proxy is trained on.")] = None,
    proxy: Annotated[str | None, typer.Option(help="linear, or well_specified: the control without a hump.")] = None,
    ppo: Annotated[bool, typer.Option("--ppo", help="Also train each policy by PPO (about a minute).")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the comparisons.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves as SVG to this file.")] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Watch a proxy reward rise while what it stands for falls, with the published forms fitted to the curves."""
    from saelab import config as configs
    from saelab.align.overopt import OveroptConfig, overoptimise

    settings = configs.load(OveroptConfig, config, set_ or (), n_pairs=pairs, proxy=proxy, ppo=ppo or None, seed=seed)
    if print_config:
        print(configs.to_toml(settings), end="")
        return
    result = overoptimise(settings)
    if plot is not None:
        from saelab.align.overopt_plot import svg_of

        plot.write_text(svg_of(result), "utf-8")
        say(f"curves in {plot}")
    if json:
        emit(_plain(result))
        return
    print(f"the proxy agrees with gold on {100 * result.proxy_accuracy:.0f} % of the reference's pairs\n")
    for name, curve in _curves(result).items():
        rows = [[f"{p.setting:g}", f"{p.distance:.2f}", f"{p.proxy:.2f}", f"{p.gold:.2f}"] for p in curve.points]
        print(table(rows, header=[name, "sqrt(KL)", "proxy", "gold"]))
        alpha, beta, r_squared = curve.fit
        fit = f"fit: alpha {alpha:.2f}, beta {beta:.2f}, R^2 {r_squared:.3f}"
        print(f"peak {curve.peak.gold:.2f}, then {curve.drop:.2f} lost; {fit}\n")


def _curves(result: Overoptimisation) -> dict[str, Curve]:
    curves = {"beta, exact": result.exact, "best of n": result.best_of_n}
    return curves | ({"beta, PPO": result.ppo} if result.ppo else {})


def _plain(result: Overoptimisation) -> dict[str, Any]:
    curves = {
        name: {"points": [p._asdict() for p in curve.points], "fit": curve.fit._asdict(), "drop": curve.drop}
        for name, curve in _curves(result).items()
    }
    return {"proxy_accuracy": result.proxy_accuracy, "curves": curves}
