"""saelab steer: a feature pushed, clamped or ablated while the model writes; and the record of what steering does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from saelab.cli.console import AsJson, Device, emit, progress_bar, say, table
from saelab.cli.inputs import model_of
from saelab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from saelab.interp.steering import Mode
    from saelab.interp.steering_record import RecordConfig


def steer(
    run: Annotated[Path, typer.Argument(help="Directory of an SAE, or its workspace.")],
    feature: Annotated[list[int] | None, typer.Option(help="Feature to steer; repeat for several.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The most important thing about",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message through the chat template.")
    ] = False,
    mode: Annotated[str, typer.Option(help="add, clamp or ablate.")] = "add",
    strength: Annotated[
        float | None,
        typer.Option(help="add: norm of the added vector as a share of the mean residual norm (default 0.6)."),
    ] = None,
    value: Annotated[float | None, typer.Option(help="clamp: activation to hold the feature at.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    record: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instead: measure the N most token-specific features against random directions at equal KL."
        ),
    ] = None,
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
    if record is not None:
        from saelab.interp.steering_record import RecordConfig

        if feature:
            raise ConfigError(
                "--record chooses the features itself, by the precision of their labels; leave out --feature"
            )
        settings = RecordConfig(seed=seed) if kl is None else RecordConfig(seed=seed, kl=kl)
        result = run_record(run, record, settings, out=out, device=device)
        if json:
            emit(result)
        else:
            print(as_table(result))
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
) -> dict[str, Any]:
    """The two continuations of ``prompt``."""
    from saelab.interp import steering
    from saelab.sae.io import load_sae

    sae = load_sae(run)
    edits = steering.as_edits([sae.feature(i) for i in features], strength=strength, mode=checked(mode), value=value)
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


def run_record(
    run: Path, n_features: int, settings: RecordConfig, *, out: Path | None = None, device: str | None = None
) -> dict[str, Any]:
    """Measure the most token-specific features of the index, publish steer.json, and return its content."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.features.index import FeatureIndex
    from saelab.interp.steering_record import steering_record
    from saelab.sae.io import load_sae

    sae_path, index = rundir.find(run, "sae"), FeatureIndex.open(run)
    rundir.check_parents(index.path)  # an index of an earlier SAE would name other features
    out = out or sae_path.parent / "steer"
    rundir.check_replaceable(out, "steer")
    chosen = index.most_token_specific(n_features)
    if not chosen:
        raise ConfigError(f"{index.path} has no feature with a token rule; index more text, or train on more tokens")
    sae = load_sae(sae_path)
    model = model_of(sae, device=device)
    say(
        f"plan: {len(chosen)} features and {settings.n_random} random directions on {len(settings.prompts)} prompts, "
        f"each pushed to a KL of {settings.kl} nats"
    )
    with progress_bar("steer") as progress:
        record = steering_record(model, sae, {i: index.trigger_tokens(i) for i in chosen}, settings, progress=progress)
    result = {
        "kl": settings.kl,
        "n_prompts": len(settings.prompts),
        "advantage": record.advantage._asdict(),
        "random_strengths": record.random_strengths,
        "features": [
            effect._asdict() | {"advantage": effect.advantage, "label": index.label(effect.feature).text}
            for effect in record.effects
        ],
    }
    parents = {"sae": sae_path, "index": index.path}
    rundir.replace_result(out, result, stage="steer", config=configs.to_mapping(settings), parents=parents)
    say(f"written to {out}")
    return result


def as_table(result: dict[str, Any]) -> str:
    rows = [
        [
            str(f["feature"]),
            f["label"],
            f"{f['strength']:.2f}",
            f"{f['kl']:.2f}",
            f"{f['rise']:+.2f}",
            f"{f['random_rise']:+.2f}",
            f"{f['advantage']:+.2f}",
        ]
        for f in result["features"]
    ]
    mean = result["advantage"]
    return (
        table(rows, header=["feature", "label", "strength", "KL", "rise", "random", "advantage"])
        + f"\nmean advantage {mean['value']:+.2f} nats (95 %: {mean['low']:+.2f} to {mean['high']:+.2f}) "
        f"over {len(rows)} features and "
        f"{result['n_prompts']} prompts, against {len(result['random_strengths'])} random directions at the same KL"
    )
