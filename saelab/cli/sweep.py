"""saelab train --sweep: many SAEs from one file of settings and one reading of the activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.cli.console import emit, human_bytes, need_memory, progress_bar, say, table
from saelab.cli.inputs import model_of_store
from saelab.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.evals.reconstruction import EvalConfig
    from saelab.train.config import TrainConfig
    from saelab.train.sweep import Comparison, Stream


def start_sweep(
    file: Path,
    flags: dict[str, Any],
    store: ActivationStore | None,
    second: ActivationStore | None,
    out: Path | None,
    *,
    expansion: float | None,
    refused: bool,
    device: str | None,
    json: bool,
) -> None:
    """Read the grid, refuse what does not go with it, and train."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.cli.train import with_defaults
    from saelab.train.sweep import members_of, read_grid

    if refused:
        raise ConfigError(f"--sweep takes its settings from {file}; leave out --config, --live and --print-config")
    if store is None:
        raise ConfigError("a sweep needs activations; make some with saelab cache, which captures several --hook")
    base, blocks = read_grid(configs.read_mapping(file))
    evaluation = _evaluation(base.pop("eval", None), second)
    if expansion is not None:
        flags["expansion"] = expansion
    for name in configs.flattened(flags):
        if any(name in configs.flattened(block) for block in blocks):
            raise ConfigError(f"{name} is set on the command line and by a [[grid]] block of {file}; take one out")

    def resolve(mapping: dict[str, Any]) -> TrainConfig:
        return with_defaults(mapping, store, _expansion(mapping.pop("expansion", None)))

    members = members_of(configs.merged(base, flags), blocks, resolve)
    out = out or store.path.parent / "sweep"
    rundir.refuse_taken(out)
    run_sweep(members, store, out, device=device, second=second, json=json, evaluation=evaluation)


def _evaluation(settings: Any, second: ActivationStore | None) -> EvalConfig | None:
    """What to measure after the training, from the [eval] block of the file; None without one."""
    from saelab import config as configs
    from saelab.evals.reconstruction import EvalConfig

    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"eval must be a table of settings, got {settings!r}; write [eval] and below it tokens = 50_000"
        )
    if second is not None:
        raise ConfigError("[eval] measures SAEs of one model's activations; leave it out with --with and --minus")
    return configs.from_mapping(EvalConfig, settings)


def _expansion(value: Any) -> float | None:
    """The width as a multiple of the input's, from a file."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"expansion must be a number, got {value!r}; 8 is usual")
    return float(value)


def run_sweep(
    members: Mapping[str, TrainConfig] | None,
    store: ActivationStore,
    out: Path,
    *,
    device: str | None,
    second: ActivationStore | None,
    json: bool,
    evaluation: EvalConfig | None = None,
) -> None:
    """Train ``members`` (None: those that were begun in ``out``), and print how they compare.

    ``evaluation``, or that which was asked for when ``out`` was begun, follows the training.

    Raises:
        TrainingError: some of them failed; the others are finished all the same.
    """
    from saelab import config as configs
    from saelab import dist, rundir
    from saelab.cli.train import gamma_of, source_of, verified
    from saelab.evals.reconstruction import EvalConfig
    from saelab.models.load import checked_device
    from saelab.train.plan import memory_bytes_together
    from saelab.train.sources import batches_of, metadata_of
    from saelab.train.sweep import Stream, begin, begun, streams_of, train_sweep

    dist.refuse_several("--sweep")
    device = checked_device(device)
    parents = verified(store, second)
    resume = members is None
    if members is None:
        members = begun(out)
        settings = rundir.read_run(out, "sweep")["config"].get("eval")
        evaluation = None if settings is None else configs.from_mapping(EvalConfig, settings)
    groups = streams_of(members)
    d_in = store.d_in(store.hook_names[0])
    n_bytes = max(memory_bytes_together(group.values(), d_in) for group in groups)
    if device == "cpu":
        need_memory(n_bytes)

    def open_stream(settings: TrainConfig) -> Stream:
        batches = batches_of(settings, store, second)
        say(
            f"stream: {metadata_of(settings, store, second).hook_name}, seed {settings.seed}, batches of "
            f"{settings.batch_size} ({source_of(batches, settings.tokens)}, "
            f"gamma {gamma_of(batches.statistics(settings.stats_tokens)):.2f})"
        )
        n_held_out = len(store.rows("held_out")) * (store.context - 1)
        held_out = None
        if n_held_out:
            few = replace(settings, batch_size=min(1024, n_held_out), outlier_factor=None)
            held_out = batches_of(few, store, second, split="held_out")
        return Stream(batches, metadata_of(settings, store, second), held_out)

    kinds = ", ".join(dict.fromkeys(config.sae.arch for config in members.values()))
    say(
        f"plan: {len(members)} SAEs ({kinds}) in {out}, in {len(groups)} passes over the activations ({device}); "
        f"up to {human_bytes(n_bytes)} of memory at a time"
    )
    with rundir.only_writer(out):
        run = (
            rundir.StageWriter.resume(out, stage="sweep")
            if resume
            else begin(
                out,
                members,
                parents=parents,
                evaluation=None if evaluation is None else configs.to_mapping(evaluation),
            )
        )
        with progress_bar("train") as progress:
            rows = train_sweep(run, members, open_stream, parents=parents, device=device, progress=progress)
    if evaluation is None or not json:  # of --json the evaluation is the one result
        _print_comparison(out, rows, json=json)
    _refuse_failed(out, rows)
    if evaluation is not None:
        evaluate_sweep(out, evaluation, store, device=device, json=json)


def evaluate_sweep(
    sweep: Path, config: EvalConfig, store: ActivationStore, *, device: str | None, json: bool, out: Path | None = None
) -> None:
    """Evaluate every member of ``sweep`` on the same held-out text, write ``eval/`` into it, and print the table.

    Raises:
        ArtifactError: no member is finished, or the activations are another model's.
    """
    from saelab import config as configs
    from saelab import rundir
    from saelab.evals.members import as_rows, evaluate_members, members_html, members_markdown, sentences, to_json
    from saelab.sae.io import load_sae

    out = out or sweep / "eval"
    rundir.check_replaceable(out, "members")
    paths = rundir.find_all(sweep, "sae")
    model = model_of_store(store, device=device)
    saes = {path.name: load_sae(path).to(model.device) for path in paths}
    with progress_bar("eval") as progress:
        results = evaluate_members(saes, store, model, config, progress=progress)
    result = to_json(results, config)
    parents = {path.name: path for path in paths} | {"activations": store.path}
    texts = {"report.md": members_markdown(results), "report.html": members_html(results)}
    rundir.replace_result(out, result, stage="members", config=configs.to_mapping(config), parents=parents, texts=texts)
    if json:
        emit({"path": str(sweep), **result})
    else:
        header, rows = as_rows(results)
        print(table(rows, header=header))
        for sentence in sentences(results):
            print(sentence)
    say(f"written to {out}; to read: {out / 'report.html'}")


def _print_comparison(out: Path, rows: list[Comparison], *, json: bool) -> None:
    numbers = ("d_sae", "l0", "reconstruction", "loss", "n_dead", "decoder_projection")
    if json:
        emit({"path": str(out), "members": [row._asdict() for row in rows]})
    else:
        lines = [[row.name, *(_short(getattr(row, name)) for name in numbers)] for row in rows]
        print(table(lines, header=["SAE", *numbers]))


def _refuse_failed(out: Path, rows: list[Comparison]) -> None:
    failed = [row for row in rows if row.state != "finished"]
    if failed:
        names = ", ".join(row.name for row in failed)
        raise TrainingError(f"{len(failed)} of {len(rows)} SAEs in {out} failed ({names}): {failed[0].state}")
    say(f"trained {len(rows)} SAEs in {out}; next: saelab eval {out}")


def _short(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
