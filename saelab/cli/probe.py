"""saelab probe: can a class of texts be read off the model, and is that more than its words give away."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab import atomic
from saelab.cli.console import AsJson, ConfigFile, Device, Overrides, PrintConfig, emit, progress_bar, say, table
from saelab.cli.inputs import model_and_sae
from saelab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from saelab.interp.probe_data import ProbeSource
    from saelab.interp.probes import ProbeConfig, ProbeStudy
    from saelab.models.load import Model


def probe(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE[:text=FIELD,label=FIELD]", help="Labelled texts (.jsonl, .csv, .parquet; also with .gz)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name, local directory, or 'demo'; by default the model of --sae.")
    ] = None,
    hook: Annotated[
        list[str] | None,
        typer.Option(
            help="Hook point to probe; may be repeated, and 'blocks.*.hook_resid_post' is every layer. By default "
            "that of --sae."
        ),
    ] = None,
    sae: Annotated[
        Path | None, typer.Option(help="Directory of an SAE, or its workspace: probes on k of its features as well.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Only texts whose field has this value; may be repeated."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field that says which texts belong together.")
    ] = None,
    group_pattern: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Instead: texts in which it finds the same belong together."),
    ] = None,
    positive: Annotated[str | None, typer.Option(metavar="LABEL", help="Label to tell from the others.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts to use, at most, in whole groups.")] = 1000,
    position: Annotated[str | None, typer.Option(help="Token to read: last (default), mean, max, or a number.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the probes and their report. An older one is replaced.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split, the permutations and the bootstrap.")] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Train probes on labelled texts and test them on groups of texts that they have not seen.

    Every figure stands beside two controls: shuffled labels, and a bag of words. With --out the probes are kept, to
    steer with.
    """
    from saelab import config as configs
    from saelab.interp.probes import ProbeConfig

    settings = configs.load(ProbeConfig, config, set_ or (), position=position, seed=seed)
    if print_config:
        print(configs.to_toml(settings), end="")
        return
    if data is None:
        raise ConfigError("probe needs a file of labelled texts; give one, for example: saelab probe reviews.jsonl")
    if model is None and sae is None:
        raise ConfigError("probe needs a model; give --model, or --sae whose model it is")
    if model is not None and sae is None and not hook:
        raise ConfigError("probe needs a hook; give --hook blocks.10.hook_resid_post, or 'blocks.*.hook_resid_post'")
    source = source_of(
        data, where=where or (), group=group, group_pattern=group_pattern, positive=positive, texts=texts
    )
    result = run_probes(source, settings, model=model, hooks=hook or (), sae=sae, out=out, device=device)
    if json:
        emit(result)
    else:
        print(as_text(result))


def source_of(
    data: str,
    *,
    where: Sequence[str],
    group: str | None,
    group_pattern: str | None,
    positive: str | None,
    texts: int,
) -> ProbeSource:
    """The file and its groups, as the flags say.

    Raises:
        ConfigError: a --where that is not FIELD=VALUE, or settings that exclude each other.
    """
    from saelab.interp.labelled_files import parse
    from saelab.interp.probe_data import ProbeSource

    conditions = {}
    for condition in where:
        name, equals, value = condition.partition("=")
        if not equals or not name:
            raise ConfigError(f"--where needs FIELD=VALUE, got {condition!r}; write for example --where set=cities")
        conditions[name] = value
    return ProbeSource(
        file=parse(data),
        where=conditions,
        group=group,
        group_pattern=group_pattern,
        positive=positive,
        texts=texts,
    )


def run_probes(
    source: ProbeSource,
    config: ProbeConfig,
    *,
    model: str | None,
    hooks: Sequence[str] = (),
    sae: Path | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Train and test the probes and return the content of probe.json; with ``out`` keep them there with a report."""
    from saelab import rundir
    from saelab.interp.probe_data import read_probe_texts
    from saelab.interp.probe_report import to_json
    from saelab.interp.probes import probe as probe_texts

    if out is not None:
        rundir.check_replaceable(out, "probe")
    data = read_probe_texts(source, seed=config.seed)
    sae_path = None if sae is None else rundir.find(sae, "sae")
    loaded, loaded_sae = model_and_sae(model, sae_path, device=device)
    at = list(dict.fromkeys(name for pattern in hooks for name in hooks_like(loaded, pattern)))
    if loaded_sae is not None and not at:
        at = [loaded_sae.metadata.hook_name]
    say(
        f"plan: {len(data.texts):,} texts in {data.n_groups:,} groups, read once at {len(at)} hooks; every probe "
        f"{1 + config.shuffles} times, {config.shuffles} of them with shuffled labels"
    )
    with progress_bar("probe") as progress:
        study = probe_texts(loaded, data, at, sae=loaded_sae, config=config, progress=progress)
    result = to_json(study)
    if out is not None:
        settings = {"model": loaded.name, "hooks": at} | _settings(source, config)
        parents = {"data": source.file.path} | ({} if sae_path is None else {"sae": sae_path})
        _publish(out, study, result, settings, parents)
        say(f"written to {out}; to read: {out / 'report.html'}")
    return result


def hooks_like(model: Model, pattern: str) -> list[str]:
    """The hooks that a name with stars stands for, in the order of the forward pass; a name without, itself.

    Raises:
        ConfigError: no hook is like it.
    """
    from saelab.models.hooks import canonical_hook_name

    if "*" not in pattern:
        return [model.check_hook(pattern)]
    spelled = canonical_hook_name(pattern.replace("blocks.*.", "blocks.0.")).replace("blocks.0.", "blocks.*.", 1)
    found = [name for name in model.hook_names() if fnmatchcase(name, spelled if "blocks.*." in pattern else pattern)]
    if not found:
        raise ConfigError(f"no hook of {model.name} is like {pattern!r}; {nearest(pattern, model.hook_names())}")
    return found


def as_text(result: dict[str, Any]) -> str:
    """The tables and sentences of the report, for a terminal."""
    from saelab.interp.probe_report import sentences, tables

    parts = [f"{part.title}\n{table(part.rows, header=part.header)}" for part in tables(result)]
    return "\n\n".join([*parts, *sentences(result)])


def _settings(source: ProbeSource, config: ProbeConfig) -> dict[str, Any]:
    from saelab import config as configs

    return {"source": configs.to_mapping(source), "probe": configs.to_mapping(config)}


def _publish(
    out: Path, study: ProbeStudy, result: dict[str, Any], settings: dict[str, Any], parents: dict[str, Path]
) -> None:
    """The stage directory in the place of an older one: probe.json, the probes, the picture, and report.* to read."""
    from saelab import rundir
    from saelab.evals.report import Section, Table, as_html, as_markdown
    from saelab.interp.probe_plot import layer_sweep_svg
    from saelab.interp.probe_report import directory_of, sentences, tables

    picture = layer_sweep_svg(result)
    sections = [Section(f"Probes on {result['data']['name']}", sentences=tuple(sentences(result)), pictures=(picture,))]
    sections += [Section(part.title, tables=(Table(part.header, part.rows),)) for part in tables(result)]
    html = as_html(sections, title=f"saelab probe {result['data']['name']}")
    with atomic.replacing_directory(out) as folder:
        writer = rundir.StageWriter.create(folder, stage="probe", config=settings, parents=parents)
        for one in study.results:
            one.probe.save(folder / directory_of(one))
        atomic.write_bytes(folder / "sweep.svg", picture.encode())
        atomic.write_bytes(folder / "report.md", as_markdown(sections).encode())
        atomic.write_bytes(folder / "report.html", html.encode())
        atomic.write_json(folder / rundir.STAGES["probe"], result)
        writer.finish()
