"""saelab explain: what a feature fires on, found and scored without a judge, beside a control."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
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
from saelab.cli.inputs import opened
from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.align.critics import Critic
    from saelab.features.encoders import Encoder
    from saelab.features.explain import Explained
    from saelab.features.explain_run import ExplainConfig
    from saelab.models.load import Model


def explain(
    run: Annotated[Path | None, typer.Argument(help="Directory of an SAE, or its workspace.")] = None,
    feature: Annotated[int | None, typer.Argument(help="Explain this feature alone, by every explainer.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Explain all features and those of the control, and write the report to this directory."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of text to find, choose and score on.")] = None,
    activations: Annotated[
        Path | None, typer.Option(help="Activations to explain on; by default those it was trained on.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Sentence encoder of the example score: a directory or hub name, or model (its own).")
    ] = "model",
    judge: Annotated[
        str | None,
        typer.Option(help="Also let a language model explain and judge: its directory or name, or http://host/v1."),
    ] = None,
    judge_name: Annotated[str | None, typer.Option(help="Name of the model on the judge's server.")] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    print_config: PrintConfig = False,
    json: AsJson = False,
) -> None:
    """Explain features by rules on the text, scored on documents that did not find them.

    With a FEATURE: what each explainer says of it. With --report: the distribution of held-out precision and recall
    over all live features, beside the same for an SAE of the model with random weights. A report that was stopped goes
    on where it was when the same command is run again. The key of a judge's server is read from OPENAI_API_KEY.
    """
    from saelab import config as configs
    from saelab.features.explain_run import ExplainConfig

    settings = configs.load(ExplainConfig, config, set_ or (), tokens=tokens)
    if print_config:
        print(configs.to_toml(settings), end="")
        return
    if run is None:
        raise ConfigError("explain needs the directory of an SAE; give one, for example: saelab explain runs/demo 42")
    if (feature is None) == (report is None):
        raise ConfigError("explain needs either the number of a feature or --report DIR; give one of them")
    if report is not None:
        result = run_report(
            run,
            settings,
            report,
            activations=activations,
            encoder=encoder,
            judge=judge,
            judge_name=judge_name,
            device=device,
        )
        if json:
            emit(result)
        else:
            print(as_text(result))
        return
    if judge is not None or encoder != "model":
        raise ConfigError("a judge and an encoder belong to --report; leave them out for a single feature")
    assert feature is not None
    explained = explain_one(run, feature, settings, activations=activations, device=device)
    if json:
        emit(explained.to_json())
    else:
        print(as_card(explained))


def run_report(
    run: Path,
    config: ExplainConfig,
    out: Path,
    *,
    activations: Path | None = None,
    encoder: str = "model",
    judge: str | None = None,
    judge_name: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Explain everything, publish explain.json with its report to read, and return its content."""
    from saelab import config as configs
    from saelab import rundir
    from saelab.features.explain_report import explain_features, html, markdown
    from saelab.features.explain_run import ExplainRun
    from saelab.features.explain_scores import Referees

    sae_path = rundir.find(run, "sae")
    rundir.check_replaceable(out, "explain")
    critic = _critic(judge, judge_name, device)
    sae, store, model = opened(sae_path, activations=activations, device=device)
    referees = Referees(_encoder(encoder, model, device), critic)
    work = ExplainRun(sae_path, sae, store, model, config, out, progress_bar)
    say(
        f"plan: {sae.d_sae:,} features over {work.corpus.n_tokens:,} tokens"
        + (
            ""
            if work.no_control
            else f", and as many of a control, trained on the way and kept in {sae_path.parent}/controls"
        )
    )
    with rundir.only_writer(out):
        result, explained = explain_features(work, referees)
        texts = {f"{side.replace(' ', '_')}.jsonl": _lines(features) for side, features in explained.items()}
        texts |= {"report.md": markdown(result), "report.html": html(result)}
        parents = {"sae": sae_path, "activations": store.path}
        rundir.replace_result(
            out, result, stage="explain", config=configs.to_mapping(config), parents=parents, texts=texts
        )
        work.kept.discard()
    say(f"written to {out}; to read: {out / 'report.html'}")
    return result


def explain_one(
    run: Path, feature: int, config: ExplainConfig, *, activations: Path | None = None, device: str | None = None
) -> Explained:
    """What each explainer says of one feature; nothing is written."""
    import tempfile

    from saelab import rundir
    from saelab.features.explain_run import ExplainRun

    sae_path = rundir.find(run, "sae")
    sae, store, model = opened(sae_path, activations=activations, device=device)
    if not 0 <= feature < sae.d_sae:
        raise ConfigError(f"there is no feature {feature}; the SAE holds 0 to {sae.d_sae - 1}")
    with tempfile.TemporaryDirectory() as folder:
        work = ExplainRun(sae_path, sae, store, model, config, Path(folder) / "explain", progress_bar)
        return work.explain_feature(feature)


def as_text(result: dict[str, Any]) -> str:
    """The report for a terminal, without its pictures."""
    from saelab.features.explain_report import sections

    return "\n\n".join(written(sections(result)))


def as_card(explained: Explained) -> str:
    """What each explainer says, with its scores; the chosen one is marked."""
    from saelab.features.explain_summary import MEASURES, measured

    n_fit, n_choose, n_score = explained.n_clear
    lines = [
        f"feature {explained.feature}: fires clearly {n_fit:,} times where explanations are found, {n_choose:,} where "
        f"the best is chosen, {n_score:,} where they are scored"
    ]
    if not explained.candidates:
        return "\n".join([*lines, "no explainer says anything of it"])
    rows = [
        [
            "*" if each is explained.best else "",
            each.kind,
            *(f"{measured(each, m):.2f}" for m in MEASURES),
            f"{each.choose.f1:.2f}",
            each.text if len(each.text) <= 100 else each.text[:99] + "…",
        ]
        for each in explained.candidates
    ]
    return "\n".join([*lines, table(rows, header=["", "kind", *MEASURES, "f1 (choosing)", "explanation"])])


def _lines(features: Sequence[Explained]) -> str:
    return "".join(jsonlib.dumps(each.to_json(), ensure_ascii=False) + "\n" for each in features)


def _encoder(name: str, model: Model, device: str | None) -> Encoder:
    from saelab.features.encoders import ModelEncoder, SentenceEncoder

    return ModelEncoder(model) if name == "model" else SentenceEncoder(name, device=device)


def _critic(judge: str | None, judge_name: str | None, device: str | None) -> Critic | None:
    import os

    from saelab.align.critics import LocalCritic, ServerCritic
    from saelab.align.policy import PolicyConfig, load_policy

    if judge is None:
        return None
    if judge.startswith(("http://", "https://")):
        if judge_name is None:
            raise ConfigError(f"the judge at {judge} needs the name of its model; give --judge-name")
        return ServerCritic(judge, judge_name, api_key=os.environ.get("OPENAI_API_KEY"), temperature=0.0)
    policy = load_policy(PolicyConfig(model=judge, context=2048), device=device, trainable=False)
    return LocalCritic(policy, temperature=0.0)
