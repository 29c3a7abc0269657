"""The table of verbs, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from saelab.cli import (
    align,
    attribute,
    cache,
    convert,
    demo,
    doctor,
    evaluate,
    explain,
    explore,
    features,
    index,
    lens,
    patch,
    plan,
    probe,
    show,
    steer,
    train,
)
from saelab.errors import Interrupted, SaelabError

app = typer.Typer(
    name="saelab",
    help="Train sparse autoencoders on a model's activations, find what its features mean, and prove it by steering.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "cache": cache.cache,
    "train": train.train,
    "eval": evaluate.evaluate,
    "index": index.index,
    "features": features.features,
    "explain": explain.explain,
    "steer": steer.steer,
    "probe": probe.probe,
    "patch": patch.patch,
    "lens": lens.lens,
    "attribute": attribute.attribute,
    "explore": explore.explore,
    "doctor": doctor.doctor,
    "plan": plan.plan,
    "convert": convert.convert,
    "show": show.show,
}
for _name, _function in VERBS.items():
    app.command(_name)(_function)
app.add_typer(align.app, name="align")


def main() -> None:
    """Entry point: 0 when all went well, 2 for what the user can mend, 130 after Ctrl-C; no traceback for these."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(prog_name="saelab")
    except Interrupted as error:
        _fail(str(error), code=130)
    except SaelabError as error:
        _fail(f"error: {error}", code=2)
    except SystemExit as stop:
        if stop.code == 130:  # typer's answer to Ctrl-C, which says nothing
            _fail("stopped; run the same command again, with --resume DIR where a directory was begun", code=130)
        raise


def _fail(sentence: str, *, code: int) -> None:
    print(" ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)
