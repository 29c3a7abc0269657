"""saelab eval: how good is an SAE on text it never saw, and what are its features worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import (
    AsJson,
    ConfigFile,
    Device,
    Overrides,
    PrintConfig,
    emit,
    progress_bar,
    say,
    table,
    written,
)
from saelab.cli.inputs import opened, store_of
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.evals.suite import Run, SuiteConfig

SUITES = ("core", "full", "toy")


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Directory of an SAE, its workspace, or a sweep.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="core: reconstruction and predictions. full: and baselines, controls, probing, absorption, stability, "
            "meta-SAE. toy: architectures on worlds of known features, without a RUN."
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Another SAE of the same hook to compare with, over the same text; may be repeated."),
    ] = None,
    probe_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:text=FIELD,label=FIELD]",
            help="Labelled texts (.jsonl, .csv, .parquet) for sparse probing (full); may be repeated.",
        ),
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="With --suite toy: an architecture to try; may be repeated.")
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(help="Activations whose held-out text to use; by default those it was trained on.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens to evaluate on; with --suite toy tokens of a training.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; by default eval/ beside the SAE. An older one is replaced.")
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Measure an SAE on held-out text, with intervals.

    Reconstruction, sparsity, dead features, and what the model predicts with the SAE spliced in; with --suite full also
    what its features are worth, beside the same SAE on a model with random weights.
    """
    from saelab import config as configs

    if suite is not None and suite not in SUITES:
        raise ConfigError(f"--suite must be one of {', '.join(SUITES)}, got {suite!r}; leave it out for core")
    if suite == "toy":
        beside = {"RUN": run, "--against": against, "--probe-data": probe_data, "--activations": activations}
        if given := [name for name, value in beside.items() if value]:
            raise ConfigError(f"--suite toy makes its own activations and SAEs; leave {given[0]} out")
        toy_worlds(
            configs.merge(config, set_ or (), tokens=tokens, arch=arch), out, print_config=print_config, json=json
        )
        return
    from saelab.evals.suite import SuiteConfig
    from saelab.interp.labelled_files import parse

    if arch:
        raise ConfigError(f"--arch {arch[0]} belongs to --suite toy; the SAE in RUN has its architecture")
    settings = configs.load(SuiteConfig, config, set_ or (), tokens=tokens, suite=suite)
    if probe_data:
        files = tuple(parse(spec) for spec in probe_data)
        settings = replace(settings, probing=replace(settings.probing, data=(*settings.probing.data, *files)))
    if print_config:
        print(configs.to_toml(settings), end="")
        return
    if run is None:
        raise ConfigError("eval needs the directory of an SAE; give one, for example: saelab eval runs/demo")
    if _is_sweep(run):
        if settings.suite != "core" or against:
            raise ConfigError(f"{run} is a sweep, whose members get the core suite side by side; name a member")
        _evaluate_sweep(run, settings, activations, out, device=device, json=json)
        return
    result = run_evaluation(run, settings, against=against or (), activations=activations, out=out, device=device)
    if json:
        emit(result)
    else:
        print(as_text(result))


def _is_sweep(run: Path) -> bool:
    from saelab import rundir

    return (run / "run.json").exists() and rundir.read_run(run)["stage"] == "sweep"


def _evaluate_sweep(
    sweep: Path, settings: SuiteConfig, activations: Path | None, out: Path | None, *, device: str | None, json: bool
) -> None:
    """The members of a sweep, with the settings of the core."""
    from dataclasses import fields

    from saelab.cli.sweep import evaluate_sweep
    from saelab.evals.reconstruction import EvalConfig

    config = EvalConfig(**{field.name: getattr(settings, field.name) for field in fields(EvalConfig)})
    store = store_of(sweep, activations)
    store.verify()
    evaluate_sweep(sweep, config, store, device=device, json=json, out=out)


def run_evaluation(
    run: Path,
    config: SuiteConfig,
    *,
    against: Sequence[Path] = (),
    activations: Path | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Evaluate, publish eval.json with its report to read, and return its content."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.evals.kept import KeptPieces
    from saelab.evals.report import html, markdown
    from saelab.evals.suite import Run, content, run_suite

    sae_path = rundir.find(run, "sae")
    out = out or sae_path.parent / "eval"
    rundir.check_replaceable(out, "eval")
    sae, store, model = opened(sae_path, activations=activations, device=device)
    this, others = Run(sae_path, sae), [_other(path, store, model.device) for path in against]
    kept = KeptPieces(out, content(this, others, store, config))
    result = run_suite(this, others, store, model, config, kept, progress_bar)
    parents = {"sae": sae_path, "activations": store.path}
    parents |= {f"against_{number}": other.path for number, other in enumerate(others, start=1)}
    texts = {"report.md": markdown(result), "report.html": html(result)}
    rundir.replace_result(out, result, stage="eval", config=configs.to_mapping(config), parents=parents, texts=texts)
    kept.discard()
    say(f"written to {out}; to read: {out / 'report.html'}")
    return result


def toy_worlds(mapping: dict[str, Any], out: Path | None, *, print_config: bool, json: bool) -> None:
    """Try architectures on toy worlds and print the table; with ``out`` also write it there."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.evals.toy_report import as_rows, to_json, toy_html, toy_markdown
    from saelab.evals.toy_suite import ToySuiteConfig, toy_suite

    config = configs.from_mapping(ToySuiteConfig, mapping)
    if print_config:
        print(configs.to_toml(config), end="")
        return
    if out is not None:
        rundir.check_replaceable(out, "eval")
    with progress_bar("toy") as progress:
        results = toy_suite(config, progress=progress)
    result = to_json(results, config)
    if out is not None:
        texts = {"report.md": toy_markdown(results, config), "report.html": toy_html(results, config)}
        rundir.replace_result(out, result, stage="eval", config=configs.to_mapping(config), parents={}, texts=texts)
        say(f"written to {out}; to read: {out / 'report.html'}")
    if json:
        emit(result)
    else:
        header, rows = as_rows(results)
        print(table(rows, header=header))


def as_text(result: dict[str, Any]) -> str:
    """The result for a terminal: the core's table, then each further section of the report."""
    from saelab.evals.report import sections

    return "\n\n".join([as_table(result), *written(list(sections(result))[2:])])


def as_table(result: dict[str, Any]) -> str:
    """The metrics with their intervals, and what they were measured on."""
    from saelab.metrics import METRICS

    names = [name for name in METRICS if name in result["metrics"]]
    rows = [
        [name, *(f"{result['metrics'][name][part]:.4f}" for part in ("value", "low", "high")), METRICS[name].unit]
        for name in names
    ]
    return (
        table(rows, header=["metric", "value", "95% low", "high", "unit"])
        + f"\n{result['n_tokens']:,} held-out tokens in {result['n_sequences']} sequences, "
        f"{result['n_outliers']} of outlying norm"
    )


def _other(path: Path, store: ActivationStore, device: Any) -> Run:
    """Another SAE, of the same model."""
    from saelab import rundir
    from saelab.evals.suite import Run
    from saelab.sae.io import load_sae

    found = rundir.find(path, "sae")
    sae = load_sae(found).to(device)
    if sae.metadata.model_sha256 is not None:
        store.check_model(sae.metadata.model_sha256)
    return Run(found, sae)
