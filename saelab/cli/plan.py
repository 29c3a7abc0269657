"""saelab plan: what a capture and a training will take, before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import (
    AsJson,
    ConfigFile,
    Device,
    Overrides,
    emit,
    human_bytes,
    human_seconds,
    say,
    table,
)
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.train.config import TrainConfig
    from saelab.train.plan import Plan, Timing


def plan(
    activations: Annotated[
        Path | None, typer.Argument(help="Directory that saelab cache wrote, or its workspace.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, local directory, or 'demo'.")] = None,
    text: Annotated[str | None, typer.Option(help="Data set name, file, folder or 'demo'.")] = None,
    hook: Annotated[str | None, typer.Option(help="Hook point, e.g. blocks.10.hook_resid_post.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, and without activations to capture.")] = None,
    arch: Annotated[str | None, typer.Option(help="topk, batchtopk, relu, ...")] = None,
    k: Annotated[int | None, typer.Option(help="Features kept for each token.")] = None,
    d_sae: Annotated[int | None, typer.Option("--d-sae", help="Number of features.")] = None,
    expansion: Annotated[
        float | None, typer.Option(help="Number of features as a multiple of the activations' width.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Plan for a model that runs during training.")] = False,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    json: AsJson = False,
) -> None:
    """Tell memory, disk, tokens and time of a capture and a training, and what would be cheaper.

    Takes the settings of saelab train; those of the capture stand under live, e.g. --set live.dtype=int8. Times come
    from a few real steps and forward passes.
    """
    from saelab import config as configs
    from saelab.models.load import checked_device

    flags: dict[str, Any] = {
        "sae__arch": arch,
        "sae__k": k,
        "sae__d_sae": d_sae,
        "tokens": tokens,
        "hook_name": hook,
    }
    device = checked_device(device)
    if activations is not None:
        if live or model or text:
            raise ConfigError(f"{activations} holds activations, so leave out --model, --text and --live")
        plans = _of_store(activations, configs.merge(config, set_ or (), **flags), expansion, device)
    else:
        flags |= {
            "live__model": model,
            "live__text__source": text,
            "live__hook_names": [hook] if hook else None,
            "live__tokens": tokens,
        }
        mapping = configs.merge(config, set_ or (), **flags)
        if "live" not in mapping:
            raise ConfigError("plan needs activations, or what to capture: give a directory, or --model and --hook")
        plans = _of_model(mapping, expansion, device, live=live)
    if json:
        emit({"plans": [as_plain(one) for one in plans]})
    else:
        print("\n\n".join(as_text(one) for one in plans))


def _of_store(activations: Path, mapping: dict[str, Any], expansion: float | None, device: str) -> list[Plan]:
    """Training on activations that are there."""
    from saelab import rundir
    from saelab.activations.store import ActivationStore, token_bytes
    from saelab.cli.train import with_defaults
    from saelab.train.plan import measured_step, plan_training
    from saelab.train.sources import the_hook

    store = ActivationStore.open(rundir.find(activations, "activations"))
    settings = with_defaults(mapping, store, expansion)
    d_in = store.d_in(the_hook(store.hook_names, settings.hook_name))
    planned = _unmeasured(settings, d_in)
    _refuse_too_large(planned)
    return [
        plan_training(
            settings,
            d_in,
            n_tokens=len(store.rows("train")) * (store.context - 1),
            store_bytes=store.n_rows * store.context * token_bytes(store.manifest.dtype, [d_in]),
            step=measured_step(settings, d_in, device=device),
            device=device,
        )
    ]


def _of_model(mapping: dict[str, Any], expansion: float | None, device: str, *, live: bool) -> list[Plan]:
    """A capture and a training on it; with ``live`` both in one."""
    from dataclasses import replace

    from saelab import config as configs
    from saelab.activations.settings import CacheConfig
    from saelab.activations.store import token_bytes
    from saelab.cli.train import with_defaults
    from saelab.models.load import load_model
    from saelab.train.plan import measured_model, measured_step, plan_capture, plan_training, text_size
    from saelab.train.sources import the_hook

    capture = configs.from_mapping(CacheConfig, mapping["live"])
    language_model = load_model(capture.model, device=device)
    hook_name = the_hook(capture.hook_names, mapping.get("hook_name"))
    widths = [language_model.hook_width(name) for name in capture.hook_names]
    d_in = language_model.hook_width(hook_name)
    sae = mapping.setdefault("sae", {})
    if isinstance(sae, dict) and "d_sae" not in sae:
        sae["d_sae"] = round((8 if expansion is None else expansion) * d_in)
        expansion = None
    settings = with_defaults(mapping, None, expansion)
    _refuse_too_large(_unmeasured(settings, d_in))
    size = text_size(capture, language_model)
    if size.exhausted:
        say(f"{capture.text.source} has about {size.n_tokens:,} tokens, fewer than the {capture.tokens:,} asked for")
    n_tokens = min(size.n_tokens, capture.tokens) if size.exhausted else capture.tokens
    running = measured_model(language_model, capture)
    step = measured_step(settings, d_in, device=device)
    n_training = round(n_tokens * (1 - capture.held_out) * (capture.context - 1) / capture.context)
    if live:
        return [plan_training(settings, d_in, n_tokens=n_training, running=running, step=step, device=device)]
    stored, mapped = replace(settings, live=None), n_tokens * token_bytes(capture.dtype, [d_in])
    return [
        plan_capture(capture, widths, n_tokens=n_tokens, running=running),
        plan_training(stored, d_in, n_tokens=n_training, store_bytes=mapped, step=step, device=device),
    ]


def _unmeasured(settings: TrainConfig, d_in: int) -> Plan:
    from saelab.train.plan import plan_training

    return plan_training(settings, d_in)


def _refuse_too_large(planned: Plan) -> None:
    """A shape whose weights do not fit cannot be tried out either."""
    from saelab.cli.console import need_memory

    need_memory(planned.memory_bytes)


def as_plain(planned: Plan) -> dict[str, Any]:
    """For JSON: bytes and seconds."""
    from dataclasses import asdict

    plain = asdict(planned)
    for name in ("memory", "disk"):
        plain[name] = {part.name: part.n_bytes for part in getattr(planned, name)}
    plain["seconds"] = None if planned.seconds is None else planned.seconds._asdict()
    plain["cheaper"] = [other._asdict() for other in planned.cheaper]
    return {**plain, "memory_bytes": planned.memory_bytes, "disk_bytes": planned.disk_bytes}


def as_text(planned: Plan) -> str:
    """The parts as a table, and all of it in a sentence."""
    rows = [
        [kind, part.name, human_bytes(part.n_bytes)] for kind in ("memory", "disk") for part in getattr(planned, kind)
    ]
    steps = "" if planned.n_steps is None else f" in {planned.n_steps:,} steps"
    passes = "" if planned.passes is None else f" ({planned.passes:.1f} passes)"
    sentence = (
        f"{planned.what}: {planned.n_tokens:,} tokens{steps}{passes}, {human_bytes(planned.memory_bytes)} of memory"
        + (f" and up to {human_bytes(planned.mapped_bytes)} of file cache" if planned.mapped_bytes else "")
        + f", {human_bytes(planned.disk_bytes)} of disk{_in_time(planned.seconds)}"
    )
    cheaper = [f"cheaper: {other.change}: {_saved(other)}" for other in planned.cheaper]
    return "\n".join([table(rows, header=["of", "part", "size"]), sentence, *cheaper])


def _in_time(seconds: Timing | None) -> str:
    if seconds is None:
        return ""
    return (
        f", about {human_seconds(seconds.median)} "
        f"({human_seconds(seconds.low)} to {human_seconds(seconds.high)} by {seconds.n} measured steps)"
    )


def _saved(other: Any) -> str:
    parts = []
    if other.memory_bytes is not None:
        parts.append(f"{human_bytes(other.memory_bytes)} of memory")
    if other.disk_bytes is not None:
        parts.append(f"{human_bytes(other.disk_bytes)} of disk")
    if other.seconds is not None:
        parts.append(f"about {human_seconds(other.seconds)}")
    return ", ".join(parts)
