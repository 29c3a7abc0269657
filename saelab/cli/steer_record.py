"""saelab steer --record: what steering features does, measured; with --baselines beside everything that might do it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.cli.console import progress_bar, say, table, written
from saelab.cli.inputs import model_of, opened
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.features.index import FeatureIndex
    from saelab.interp.steering_record import RecordConfig
    from saelab.interp.steering_suite import SteeringSuiteConfig, Target
    from saelab.models.load import Model
    from saelab.sae.base import SAE

#: Doses of a curve, as shares of the KL at which things are compared.
_SHARES = (1 / 6, 1 / 3, 2 / 3, 1)

#: Tokens that stand for a feature whose label is no rule of tokens, at most.
_N_TOKENS = 5


def run_record(
    run: Path,
    features: int | list[int],
    settings: RecordConfig,
    *,
    baselines: bool = False,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure features, publish steer.json, and return its content.

    ``features`` are their numbers, or how many of the index's most token-specific ones. With ``baselines`` there is
    also a page to read, report.md and report.html; what an interrupted call had finished is taken from there.
    """
    from saelab import config as configs
    from saelab import rundir
    from saelab.features.index import FeatureIndex
    from saelab.sae.io import load_sae

    sae_path, index = rundir.find(run, "sae"), FeatureIndex.open(run)
    rundir.check_parents(index.path)  # an index of an earlier SAE would name other features
    out = out or sae_path.parent / "steer"
    rundir.check_replaceable(out, "steer")
    chosen = features if isinstance(features, list) else index.most_token_specific(features)
    if not chosen:
        raise ConfigError(f"{index.path} has no feature with a token rule; index more text, or train on more tokens")
    tokens = {i: effect_tokens(index, i) for i in chosen}
    parents, config = {"sae": sae_path, "index": index.path}, configs.to_mapping(settings)
    if baselines:
        return _run_with_baselines(sae_path, index, tokens, settings, out=out, device=device)
    sae = load_sae(sae_path)
    result = measured_record(model_of(sae, device=device), sae, index, tokens, settings)
    rundir.replace_result(out, result, stage="steer", config=config, parents=parents)
    say(f"written to {out}")
    return result


def effect_tokens(index: FeatureIndex, feature: int) -> tuple[int, ...]:
    """The tokens that a feature should make likelier: those of its rule, else those it is most specific to.

    Raises:
        ConfigError: it never fired, so nothing is known of it.
    """
    ids = index.trigger_tokens(feature) or tuple(t.token_id for t in index.feature(feature).tokens[:_N_TOKENS])
    if not ids:
        raise ConfigError(f"feature {feature} never fired on the indexed text, so no token stands for it; try another")
    return ids


def measured_record(
    model: Model, sae: SAE, index: FeatureIndex, tokens: Mapping[int, tuple[int, ...]], settings: RecordConfig
) -> dict[str, Any]:
    """Features against random directions, at one KL."""
    from saelab.interp.steering_record import steering_record

    say(
        f"plan: {len(tokens)} features and {settings.n_random} random directions on {len(settings.prompts)} prompts, "
        f"each pushed to a KL of {settings.kl} nats"
    )
    with progress_bar("steer") as progress:
        record = steering_record(model, sae, tokens, settings, progress=progress)
    return {
        "kl": settings.kl,
        "n_prompts": len(settings.prompts),
        "advantage": record.advantage._asdict(),
        "random_strengths": record.random_strengths,
        "features": [
            effect._asdict() | {"advantage": effect.advantage, "label": index.label(effect.feature).text}
            for effect in record.effects
        ],
    }


def _run_with_baselines(
    sae_path: Path,
    index: FeatureIndex,
    tokens: Mapping[int, tuple[int, ...]],
    settings: RecordConfig,
    *,
    out: Path,
    device: str | None,
) -> dict[str, Any]:
    from saelab import config as configs
    from saelab import rundir
    from saelab.evals.kept import KeptPieces
    from saelab.evals.steering_page import html, markdown, to_json
    from saelab.interp.dose import DoseConfig
    from saelab.interp.steering_suite import SteeringSuiteConfig, steering_suite

    sae, store, model = opened(sae_path, activations=None, device=device)
    kls = tuple(share * settings.kl for share in _SHARES)
    suite = SteeringSuiteConfig(
        dose=DoseConfig(kls=kls, prompts=settings.prompts, seed=settings.seed), seed=settings.seed
    )
    parents = {"sae": sae_path, "index": index.path, "activations": store.path}
    config = {"record": configs.to_mapping(settings), "suite": configs.to_mapping(suite)}
    content = {"features": list(tokens), "config": config}
    kept = KeptPieces(out, content | {name: rundir.fingerprint(path) for name, path in parents.items()})
    result = kept.get("record", lambda: measured_record(model, sae, index, tokens, settings))
    targets = [target_of(index, i, ids, suite, exclude=list(tokens)) for i, ids in tokens.items()]
    say(f"plan: dose curves at {len(kls)} KLs up to {settings.kl} nats, all baselines beside; kept in {kept.folder}")
    with progress_bar("curves") as progress:
        measured = steering_suite(model, sae, store, targets, suite, kept.get, progress=progress)
    result |= {
        "baselines": to_json(measured, {i: index.label(i).text for i in tokens}, kl=settings.kl, seed=settings.seed)
    }
    texts = {"report.md": markdown(result), "report.html": html(result)}
    rundir.replace_result(out, result, stage="steer", config=config, parents=parents, texts=texts)
    kept.discard()
    say(f"written to {out}; to read: {out / 'report.html'}")
    return result


def target_of(
    index: FeatureIndex, feature: int, ids: tuple[int, ...], config: SteeringSuiteConfig, *, exclude: list[int]
) -> Target:
    """What the suite needs to know of a feature; it fires clearly above a quarter of its maximum, as for its label."""
    from saelab.interp.steering_baselines import features_of_equal_density
    from saelab.interp.steering_suite import Target

    density = index.column("density")
    twins = features_of_equal_density(density, feature, config.n_twins, exclude=exclude, seed=config.seed)
    words = tuple(index.vocabulary[i] for i in ids)
    return Target(feature, ids, words, float(index.column("max")[feature]) / 4, tuple(twins))


def as_text(result: dict[str, Any]) -> str:
    """The record as a table, and the verdicts if baselines were measured."""
    from saelab.evals.steering_page import sections

    verdicts = written(list(sections(result))[:2]) if "baselines" in result else []
    return "\n\n".join([as_table(result), *verdicts])


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
