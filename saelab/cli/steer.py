"""saelab steer: features pushed, set, capped or ablated while the model writes; and the record of what that does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from saelab.cli.console import AsJson, Device, emit
from saelab.cli.inputs import model_of
from saelab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from saelab.interp.steering import Edit, Mode
    from saelab.sae.base import SAE


def steer(
    run: Annotated[Path, typer.Argument(help="Directory of an SAE, or its workspace.")],
    feature: Annotated[list[int] | None, typer.Option(help="Feature to steer; repeat for several.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The most important thing about",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message through the chat template.")
    ] = False,
    mode: Annotated[str, typer.Option(help="add, orthogonal, clamp, ablate or cap.")] = "add",
    strength: Annotated[
        float | None,
        typer.Option(
            help="Share of the mean residual norm: add: norm of the added vector (default 0.6); orthogonal: what the "
            "part along the feature is set to; cap: the most it may be."
        ),
    ] = None,
    value: Annotated[float | None, typer.Option(help="clamp: activation to hold the feature at.")] = None,
    when: Annotated[
        str | None,
        typer.Option(metavar="FEATURE[:ABOVE]", help="Steer only tokens where this feature fires, at more than ABOVE."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    record: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instead: measure the N most token-specific features against random directions at equal KL."
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="record, or the --feature given: also dose curves beside mean difference, probe, prompts and random "
            "features, as a page to read (slow; may be interrupted and run again).",
        ),
    ] = False,
    kl: Annotated[
        float | None, typer.Option(help="record: next-token KL at which they are compared, in nats (default 1.5).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="record: directory to write; by default steer/ beside the SAE. An older one is replaced."),
    ] = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Write a text with and without a feature, side by side.

    With --record N: measure instead what steering the N most token-specific features does, against random directions.
    """
    if record is not None or baselines:
        from saelab.cli.steer_record import as_text, run_record
        from saelab.interp.steering_record import RecordConfig

        if feature and record is not None:
            raise ConfigError(
                "--record chooses the features itself, by the precision of their labels; leave out --feature"
            )
        if strength is not None or value is not None or when is not None:
            raise ConfigError(
                "a record pushes features by itself, to equal KL; leave out --strength, --value and --when"
            )
        settings = RecordConfig(seed=seed) if kl is None else RecordConfig(seed=seed, kl=kl)
        chosen = feature or record
        if chosen is None:
            raise ConfigError("--baselines needs features to measure; give --record N, or --feature once or more")
        result = run_record(run, chosen, settings, baselines=baselines, out=out, device=device)
        if json:
            emit(result)
        else:
            print(as_text(result))
        return
    if kl is not None or out is not None:
        raise ConfigError("--kl and --out belong to --record N; leave them out, or add it")
    if not feature:
        raise ConfigError(
            f"steer needs a feature; find one with: saelab features {run} --specific, then give --feature N"
        )
    texts = steered_and_not(
        run,
        feature,
        prompt,
        chat=chat,
        mode=mode,
        strength=strength,
        value=value,
        when=when,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
    )
    if json:
        emit(texts)
    else:
        print(f"prompt:    {texts['prompt']}\nunsteered: {texts['unsteered']}\nsteered:   {texts['steered']}")


def steered_and_not(
    run: Path,
    features: list[int],
    prompt: str,
    *,
    chat: bool,
    mode: str,
    strength: float | None,
    value: float | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None,
    when: str | None = None,
) -> dict[str, Any]:
    """The two continuations of ``prompt``."""
    from saelab.interp import steering
    from saelab.sae.io import load_sae

    sae = load_sae(run)
    edits = steering.as_edits([sae.feature(i) for i in features], strength=strength, mode=checked(mode), value=value)
    if when is not None:
        edits = waiting(edits, sae, when)
    model = model_of(sae, device=device)
    text = model.chat([{"role": "user", "content": prompt}]) if chat else prompt

    def written() -> str:
        return model.generate(text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    unsteered = written()
    with steering.steer(model, edits):
        steered = written()
    return {
        "prompt": prompt,
        "features": features,
        "mode": mode,
        "strength": steering.DEFAULT_STRENGTH if mode == "add" and strength is None else strength,
        "value": value,
        "when": when,
        "unsteered": unsteered,
        "steered": steered,
    }


def checked(mode: str) -> Mode:
    """``mode`` if there is one of this name.

    Raises:
        ConfigError: there is none.
    """
    from saelab.interp.steering import Mode

    for known in get_args(Mode):
        if mode == known:
            return known
    raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}; {nearest(mode, get_args(Mode))}")


def waiting(edits: list[Edit], sae: SAE, when: str) -> list[Edit]:
    """``edits`` at the tokens where a feature fires, named as on the command line: FEATURE or FEATURE:ABOVE.

    Raises:
        ConfigError: ``when`` is written otherwise.
        ShapeError: there is no such feature.
    """
    from saelab.interp.steering import conditional
    from saelab.interp.steering_conditions import feature_fires

    index, _, above = when.partition(":")
    try:
        condition = feature_fires(sae.feature(int(index)), above=float(above or 0))
    except ValueError as error:
        raise ConfigError(f"--when needs FEATURE or FEATURE:ABOVE, got {when!r}; for example --when 12:3.5") from error
    return [conditional(edit, condition) for edit in edits]
