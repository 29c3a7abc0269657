"""saelab lens: what each layer would predict, what features say to the unembedding, and who writes a logit."""

from __future__ import annotations

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
)
from saelab.cli.inputs import model_and_sae
from saelab.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saelab.interp.direct_logit import LogitAttribution
    from saelab.interp.lens import FeatureLens, LensReading
    from saelab.interp.tuned_lens_training import TunedLensConfig
    from saelab.models.load import Model
    from saelab.sae.base import SAE

#: Parts of a logit that the table shows.
_N_PARTS = 20


def lens(
    prompt: Annotated[str | None, typer.Argument(help="Text to read; none with --feature or --train-tuned.")] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Directory of a tuned lens, or its workspace; without it the logit lens.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to name in each cell, or of each feature.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(help="Heat map to write (.png, .svg or .html); with --train-tuned the directory to write."),
    ] = None,
    logit: Annotated[
        bool,
        typer.Option("--logit", help="Instead: direct logit attribution, which component writes how much of a logit."),
    ] = False,
    answer: Annotated[
        str | None, typer.Option(help="logit: one token, with its space (default: the model's own prediction).")
    ] = None,
    wrong: Annotated[str | None, typer.Option(help="logit: token whose logit is subtracted.")] = None,
    position: Annotated[int, typer.Option(help="logit: token after which; 0 is BOS, -1 the last.")] = -1,
    heads: Annotated[bool, typer.Option("--heads", help="logit: attention outputs head by head.")] = False,
    sae: Annotated[
        Path | None, typer.Option(help="SAE (or its workspace) of --feature, or to divide a --logit by.")
    ] = None,
    feature: Annotated[
        list[int] | None, typer.Option(help="Instead: tokens that this feature promotes; repeat for several.")
    ] = None,
    train_tuned: Annotated[
        bool, typer.Option("--train-tuned", help="Instead: train a tuned lens, and measure it on held-out text.")
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted --train-tuned.")] = None,
    tokens: Annotated[int | None, typer.Option(help="train-tuned: training tokens.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name, directory or hub name (default: demo, or the model of the SAE).")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Precision of the model (default: float32; with --train-tuned the checkpoint's own)."),
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Read every layer of a text through the unembedding, as it is or through a tuned lens.

    With --logit: divide a logit by who wrote it. With --feature: read an SAE's features. With --train-tuned: train a
    tuned lens into --out, with its KL to the model on held-out text beside that of the logit lens.
    """
    if train_tuned or resume is not None:
        if given := prompt or tuned or logit or feature or sae:
            raise ConfigError(f"training a tuned lens reads a text, not {str(given)!r}; leave that out")
        _train(
            resume,
            out,
            device=device,
            file=config,
            overrides=set_ or [],
            print_config=print_config,
            json=json,
            model=model,
            tokens=tokens,
            dtype=dtype,
        )
        return
    if config is not None or set_ or print_config or tokens is not None:
        raise ConfigError("--config, --set, --print-config and --tokens belong to --train-tuned; add it or leave them")
    if not logit and (answer is not None or wrong is not None or heads or position != -1):
        raise ConfigError("--answer, --wrong, --heads and --position belong to --logit; add it or leave them out")
    if (prompt is None) != bool(feature):
        raise ConfigError("lens needs a text to read, or --feature with --sae, and not both; give one of them")
    if (feature or logit) and out is not None:
        raise ConfigError("--out draws the heat map of a text's layers; leave it out with --feature and --logit")
    if logit and (feature or tuned is not None):
        raise ConfigError("--logit divides a prompt's logit, without features or a tuned lens; leave those out")
    if (sae is None) == bool(feature) and not (logit and sae is not None):
        raise ConfigError("--sae goes with --feature (which needs it) or with --logit; add or leave out")
    if out is not None:
        from saelab.interp.picture_page import check_suffix

        check_suffix(out, numbers=False)
    loaded, found_sae = model_and_sae(model, sae, dtype=dtype or "float32", device=device)
    if logit:
        _attribute(loaded, str(prompt), found_sae, answer, wrong, position, heads=heads, json=json)
    elif found_sae is not None:
        _read_features(loaded, found_sae, feature or [], tuned, top=top, json=json)
    else:
        _read(loaded, str(prompt), tuned, top=top, out=out, json=json)


def _read(model: Model, prompt: str, tuned: Path | None, *, top: int, out: Path | None, json: bool) -> None:
    from saelab.interp.lens import logit_lens
    from saelab.interp.tuned_lens import load_tuned_lens

    lens = None if tuned is None else load_tuned_lens(tuned, model)
    reading = logit_lens(model, prompt, tuned=lens, top=top)
    if out is not None:
        from saelab.interp.lens_plot import write_reading

        write_reading(reading, out)
        say(f"heat map in {out}")
    if json:
        emit(reading.to_json())
        return
    print(as_table(reading))


def as_table(reading: LensReading) -> str:
    """The layers at the last token, late ones last."""
    rows = [
        [
            hook.removeprefix("blocks."),
            f"{float(reading.kl[row, -1]):.3f}",
            " ".join(f"{p.token!r} {p.probability:.2f}" for p in reading.top(hook, -1)),
        ]
        for row, hook in enumerate(reading.hook_names)
    ]
    return (
        f"{reading.kind}, after {reading.tokens[-1]!r} ({len(reading.tokens)} tokens; --out draws, --json gives all)\n"
        + table(rows, header=["layer", "KL", "likeliest next tokens"])
    )


def _read_features(model: Model, sae: SAE, features: list[int], tuned: Path | None, *, top: int, json: bool) -> None:
    from saelab.interp.lens import feature_lens
    from saelab.interp.tuned_lens import load_tuned_lens

    lens = None if tuned is None else load_tuned_lens(tuned, model)
    found = feature_lens(model, sae, features, tuned=lens, top=top)
    if json:
        emit([_plain(one) for one in found])
        return
    for one in found:
        print(
            f"feature {one.feature}, {one.kind}: strongest effect {one.z:.1f} standard deviations over the "
            f"vocabulary (99 % of random directions: below {one.noise_z:.1f})\n"
            f"  promotes   {_words(one.promoted)}\n  suppresses {_words(one.suppressed)}"
        )


def _plain(one: FeatureLens) -> dict[str, Any]:
    effects = {side: [e._asdict() for e in getattr(one, side)] for side in ("promoted", "suppressed")}
    return one._asdict() | effects


def _words(effects: tuple[Any, ...]) -> str:
    return "  ".join(f"{e.token!r} {e.effect:+.3f}" for e in effects)


def _attribute(
    model: Model,
    prompt: str,
    sae: SAE | None,
    answer: str | None,
    wrong: str | None,
    position: int,
    *,
    heads: bool,
    json: bool,
) -> None:
    from saelab.interp.direct_logit import direct_logit_attribution

    found = direct_logit_attribution(model, prompt, answer=answer, wrong=wrong, position=position, heads=heads, sae=sae)
    if json:
        emit(found.to_json())
    else:
        print(as_parts(found))


def as_parts(found: LogitAttribution) -> str:
    """The strongest parts, and what they leave."""
    shown = found.strongest(_N_PARTS)
    rows = [[part.name, f"{part.value:+.3f}"] for part in shown]
    rest = len(found.parts) - len(shown)
    if rest:
        rows.append([f"{rest} others", f"{sum(p.value for p in found.parts) - sum(p.value for p in shown):+.3f}"])
    minus = "" if found.wrong is None else f" minus {found.wrong!r}"
    return (
        f"logit of {found.answer!r}{minus} after {found.tokens[found.position]!r}: {found.logit:+.3f}, the sum of:\n"
        + table(rows, header=["part", "logit"])
        + f"\nthe last norm is frozen: it divides by {found.scale:.3f}, whatever is added or left out"
    )


def _train(
    resume: Path | None,
    out: Path | None,
    *,
    device: str | None,
    file: Path | None,
    overrides: list[str],
    print_config: bool,
    json: bool,
    **flags: Any,
) -> None:
    from saelab import config as configs
    from saelab.interp.tuned_lens_training import TunedLensConfig

    if resume is not None:
        if out is not None or file is not None or overrides or any(value is not None for value in flags.values()):
            raise ConfigError("--resume goes on with the settings of its directory; leave the other options out")
        settings = _settings_of(resume)
    else:
        settings = configs.load(TunedLensConfig, file, overrides, **flags)
        if print_config:
            print(configs.to_toml(settings), end="")
            return
        if out is None:
            raise ConfigError("--train-tuned needs a directory to write; give --out, for example --out runs/demo/lens")
    result = run_training(settings, resume=resume, out=out, device=device)
    if json:
        emit(result)
    else:
        print(as_kl_table(result))


def _settings_of(path: Path) -> TunedLensConfig:
    from saelab import config as configs
    from saelab import rundir
    from saelab.interp.tuned_lens import STAGE
    from saelab.interp.tuned_lens_training import TunedLensConfig

    config = rundir.read_run(path, STAGE)["config"]
    if (path / "DONE").exists():
        raise ArtifactError(f"{path} is finished, there is nothing to resume; read with it: saelab lens --tuned {path}")
    return configs.from_mapping(TunedLensConfig, config)


def run_training(
    settings: TunedLensConfig, *, resume: Path | None = None, out: Path | None = None, device: str | None = None
) -> dict[str, Any]:
    """Train into ``out``, or go on in ``resume``; the content of lens.json."""
    import json

    from saelab import config as configs
    from saelab import rundir
    from saelab.interp.tuned_lens import STAGE
    from saelab.interp.tuned_lens_training import train_tuned_lens
    from saelab.models.load import load_model

    path = resume or out
    assert path is not None
    with rundir.only_writer(path):
        if resume is None:
            rundir.refuse_taken(path)
        model = load_model(settings.model, device=device, dtype=settings.dtype)
        if resume is not None:
            run = rundir.StageWriter.resume(path, stage=STAGE)
        else:
            run = rundir.StageWriter.create(path, stage=STAGE, config=configs.to_mapping(settings))
        say(
            f"plan: {settings.n_steps} steps of {settings.step_tokens} tokens; {model.n_layers} translators of "
            f"{model.d_model} x {model.d_model}"
        )
        with progress_bar("tuned lens") as progress:
            train_tuned_lens(settings, model, run, progress=progress)
    say(f"written to {path}")
    return json.loads((path / rundir.STAGES[STAGE]).read_text("utf-8"))


def as_kl_table(result: dict[str, Any]) -> str:
    def shown(interval: dict[str, float]) -> str:
        return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"

    rows = [
        [
            layer["hook_name"].removeprefix("blocks."),
            *(shown(layer[name]) for name in ("logit_kl", "tuned_kl", "difference")),
        ]
        for layer in result["layers"]
    ]
    return (
        table(rows, header=["layer", "logit lens", "tuned lens", "difference"])
        + f"\nKL(model || lens) in nats a token on {result['n_held_out_tokens']:,} tokens of "
        f"{result['n_held_out_documents']} held-out documents, with 95 % intervals over documents; trained on "
        f"{result['n_training_tokens']:,} tokens.\nA lens that reads nothing (the training text's mean prediction) has "
        f"{shown(result['constant_kl'])}."
    )
