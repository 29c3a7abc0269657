"""saelab doctor: does this SAE fit this model, and if not, what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saelab.cli.console import AsJson, Device, emit, say, table
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.evals.doctor import Diagnosis

_N_TRIALS = 6


def doctor(
    sae: Annotated[str, typer.Argument(help="Directory or file of an SAE, its workspace, or owner/name/folder.")],
    model: Annotated[
        str | None, typer.Option(help="Hub name, local directory, or 'demo'; by default the one that its file names.")
    ] = None,
    text: Annotated[str, typer.Option(help="Data set name, .txt/.jsonl/.parquet file or folder, or 'demo'.")] = "demo",
    hook: Annotated[str | None, typer.Option(help="Hook point; by default the one that its file names.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on.")] = 4096,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Tell whether an SAE fits a model, hook point and scale, and name the probable mistake if not.

    Exit code 0 when it fits, 1 when it does not or nothing can be told, 2 when the question itself is wrong.
    """
    from saelab.activations.text import TextConfig
    from saelab.evals.doctor import as_plain, diagnose, expected_l0
    from saelab.evals.examination import ScanConfig
    from saelab.models.load import load_model
    from saelab.sae.io import load_sae

    settings = ScanConfig(text=TextConfig(source=text), tokens=tokens)
    opened = load_sae(sae)
    name = model or opened.metadata.model_name
    if not name:
        raise ConfigError("the SAE's file does not say which model it belongs to; give one with --model")
    language_model = load_model(name, device=device)
    say(f"examining on {tokens:,} tokens of {text} at the hooks of {name}")
    diagnosis = diagnose(
        opened.to(language_model.device),
        language_model,
        settings,
        hook_name=hook,
        expected_l0=expected_l0(opened, _directory_of(sae)),
    )
    if json:
        emit(as_plain(diagnosis))
    else:
        print(as_text(diagnosis))
    raise typer.Exit(0 if diagnosis.fits else 1)


def _directory_of(sae: str) -> Path:
    """Where the SAE's files lie, if they lie here."""
    from saelab import rundir

    path = Path(sae)
    return rundir.find(path, "sae") if path.is_dir() and not (path / "cfg.json").exists() else path


def as_text(diagnosis: Diagnosis) -> str:
    """What was measured, the best other readings, and the verdict."""
    parts = []
    seen = diagnosis.examination
    if seen is not None:
        measured = [
            ["explained variance", f"{seen.fit.explained_variance:.3f}", _range(seen.interval)],
            ["  with outliers", f"{seen.explained_with_outliers:.3f}", f"{seen.n_outliers} tokens"],
            ["  with the first position", f"{seen.first.explained_variance_with:.3f}", _first(seen.first)],
            ["  best factor and offset", f"{seen.fit.explained_affine:.3f}", f"factor {seen.fit.slope:.3f}"],
            ["  randomly turned", f"{seen.turned:.3f}", "what chance explains"],
            [f"  PCA of rank {max(1, round(seen.l0.value))}", f"{seen.pca:.3f}", ""],
            ["active features (L0)", f"{seen.l0.value:.1f}", _range(seen.l0)],
            ["dead features", f"{seen.dead_fraction:.3f}", f"in {seen.fit.n_tokens:,} tokens"],
            ["|recon| / |acts|", f"{seen.fit.norm_ratio:.3f}", f"mean norm {seen.mean_norm:.4g}"],
            ["cosine", f"{seen.fit.cosine:.3f}", ""],
        ]
        others = [[t.reading.name, f"{t.explained_variance:.3f}", f"{t.ratio:.2f}"] for t in seen.trials[:_N_TRIALS]]
        parts += [
            table(measured, header=[f"at {seen.where.reads}", "value", ""]),
            table(others, header=["other readings, best first", "explained", "ratio of unexplained"]),
        ]
    further = [f"also: {finding.sentence}" for finding in diagnosis.findings if finding.sentence != diagnosis.sentence]
    return "\n\n".join([*parts, "\n".join([f"{diagnosis.verdict}: {diagnosis.sentence}", *further])])


def _range(interval: tuple[float, float, float]) -> str:
    return f"95% {interval[1]:.3f} to {interval[2]:.3f}"


def _first(first: tuple[float, float, float, float]) -> str:
    return f"norm {first[0]:.1f} medians, {first[2]:.0%} of the variance"
