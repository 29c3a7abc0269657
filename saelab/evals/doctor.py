"""Does this SAE fit this model, at this hook and scale? A few thousand tokens tell, and if not, what went wrong.

What decides is not how good the SAE is but two comparisons: whether another reading of it leaves much less of the
variance unexplained (then that is the mistake), and whether it does better than on the same activations turned at
random about their mean, which it cannot know (if not, it belongs to another model). So a small or undertrained SAE
passes, and an excellent one at the wrong layer does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from saelab.errors import ArtifactError, ConfigError
from saelab.evals.examination import Examination, ScanConfig, Trial, Where, examine, token_rows
from saelab.evals.readings import Kind
from saelab.models.load import Model
from saelab.sae.base import SAE

Verdict = Literal["fits", "fits with a caveat", "does not fit", "cannot tell"]

# Thresholds of the verdict. Over 20 good SAEs of six architectures and eight hooks of a small Llama, undertrained ones
# among them, the best other reading reached a ratio of 1.0; one layer off gives 1.05 to 1.3, a factor of two 1.5 to 3.
MISTAKEN = 1.15
"""Another reading is the right one when the SAE as given leaves this many times as much variance unexplained."""
DOUBTFUL = 1.05
"""From this ratio on, another reading is mentioned."""
KNOWN = 0.85
"""The SAE knows these activations when it leaves at most this share of what it leaves of the turned ones."""
UNKNOWN = 0.95
"""It does not know them when it leaves more than this share; between the two, nothing can be said."""
MASSIVE = 10.0
"""BOS matters when its norm is this many times the median."""
BOS_LEARNT = 0.05
"""BOS was in the training data when the SAE leaves at most this share of it."""
SPARSITY = 3.0
"""L0 is suspicious when it differs from what the file says by this factor."""
DTYPE_LOSS = 0.02
"""Explained variance that rounding the weights to the model's dtype may cost."""
MIN_TOKENS = 500
"""With fewer tokens there is no verdict."""


class Finding(NamedTuple):
    """One thing that is not as it should be."""

    kind: Kind
    sentence: str
    """Mistake, evidence and cure."""


class Diagnosis(NamedTuple):
    """What doctor says."""

    verdict: Verdict
    sentence: str
    """The verdict with its evidence, and the most probable mistake with its cure."""
    findings: tuple[Finding, ...]
    """What may be wrong, most probable first; empty when the SAE fits."""
    examination: Examination | None
    """None where widths alone decide."""

    @property
    def fits(self) -> bool:
        return self.verdict.startswith("fits")

    @property
    def suspect(self) -> Kind | None:
        return self.findings[0].kind if self.findings else None


def diagnose(
    sae: SAE, model: Model, config: ScanConfig, *, hook_name: str | None = None, expected_l0: float | None = None
) -> Diagnosis:
    """Whether ``sae`` fits ``model`` at ``hook_name`` (default: the hook that its file names), and if not, why.

    ``expected_l0`` is what the SAE's file says of its active features per token.

    Raises:
        ConfigError: no hook is known, the model has none of that name, or the SAE reads several vectors a token.
        TextError: the text gives fewer than two rows.
        ArtifactError: activations or reconstructions are not finite.
    """
    if sae.W_dec.ndim != 2:
        raise ConfigError(
            f"doctor examines SAEs that read one vector a token, but {sae.cfg.arch!r} reads several; use saelab eval"
        )
    name = hook_name or sae.metadata.hook_name
    if not name:
        raise ConfigError("the SAE's file does not say which hook it reads; give one with --hook")
    reads = model.check_hook(name)
    written = sae.metadata.extra.get("hook_name_out")
    where = Where(reads, model.check_hook(written) if written else reads)
    if (model.hook_width(where.reads), model.hook_width(where.writes)) != (sae.d_in, sae.d_out):
        return _of_wrong_width(sae, model, where)
    examination = examine(sae, model, where, token_rows(sae, model, config), config)
    return judge(sae, model, examination, expected_l0=expected_l0)


def judge(sae: SAE, model: Model, seen: Examination, *, expected_l0: float | None = None) -> Diagnosis:
    """The verdict that the measurements justify."""
    best = seen.trials[0]
    if seen.fit.n_tokens < MIN_TOKENS:
        sentence = f"only {seen.fit.n_tokens} tokens were measured, and {MIN_TOKENS} are needed; give more text"
        return Diagnosis("cannot tell", sentence, (), seen)
    if best.ratio >= MISTAKEN and _knows(best.explained_variance, seen.best_turned, KNOWN):
        finding = Finding(best.reading.kind, _named(best, seen))
        return Diagnosis("does not fit", finding.sentence, (finding, *_caveats(sae, model, seen, expected_l0)), seen)
    if not _knows(seen.fit.explained_variance, seen.turned, UNKNOWN):
        learnt_bos = _bos_finding(seen)
        if seen.bos and learnt_bos is not None:  # another model's SAE would not know this model's BOS
            return Diagnosis("does not fit", learnt_bos.sentence, (learnt_bos,), seen)
        finding = Finding("model", _of_another_model(sae, model, seen))
        return Diagnosis("does not fit", finding.sentence, (finding,), seen)
    if not _knows(seen.fit.explained_variance, seen.turned, KNOWN):
        sentence = (
            f"it explains {_ev(seen.fit.explained_variance)} of the variance, hardly more than the "
            f"{_ev(seen.turned)} of randomly turned activations, and no other reading does better: "
            "a very weak SAE, or one of a related model; compare it with one that is known to fit"
        )
        return Diagnosis("cannot tell", sentence, (), seen)
    findings = _caveats(sae, model, seen, expected_l0)
    if findings:
        return Diagnosis("fits with a caveat", findings[0].sentence, findings, seen)
    return Diagnosis("fits", _fitting(seen), (), seen)


def expected_l0(sae: SAE, path: Path) -> float | None:
    """Active features per token by the SAE's file: its k, a number among the metadata, or the densities beside it.

    Raises:
        ArtifactError: sparsity.safetensors is there, but damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    k = getattr(sae.cfg, "k", None)
    details = sae.metadata.extra.get("training_architecture_details")
    for said in (k, sae.metadata.extra.get("l0"), details.get("k") if isinstance(details, dict) else None):
        if isinstance(said, int | float) and said > 0:
            return float(said)
    densities = path / "sparsity.safetensors"
    if not densities.exists():
        return None
    try:
        log10_density = load_file(densities)["sparsity"]
    except (SafetensorError, KeyError) as error:
        raise ArtifactError(f"{densities} is damaged ({error}); copy it again, or delete it") from error
    return float((10.0 ** log10_density.double()).sum())


def as_plain(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything measured, for JSON; of the other readings their names and numbers."""
    seen = diagnosis.examination
    measured: dict[str, Any] = {}
    if seen is not None:
        measured = seen._asdict()
        for name in ("where", "fit", "interval", "l0", "first"):
            measured[name] = measured[name]._asdict()
        measured["trials"] = [
            {
                "kind": trial.reading.kind,
                "name": trial.reading.name,
                "hook_name": trial.hook_name,
                "explained_variance": trial.explained_variance,
                "ratio": trial.ratio,
            }
            for trial in seen.trials
        ]
    return {
        "verdict": diagnosis.verdict,
        "fits": diagnosis.fits,
        "suspect": diagnosis.suspect,
        "sentence": diagnosis.sentence,
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "measured": measured,
    }


# --- sentences


def _knows(explained_variance: float, turned: float, share: float) -> bool:
    """Whether an SAE leaves at most ``share`` of what it leaves of turned activations, and beats the mean."""
    return 1 - explained_variance <= share * (1 - max(turned, 0.0))


def _named(best: Trial, seen: Examination) -> str:
    return (
        f"{best.reading.mistake}: {_ev(best.explained_variance)} of the variance is explained with "
        f"{best.reading.name}, as given {_ev(seen.fit.explained_variance)}; {best.reading.cure}"
    )


def _of_another_model(sae: SAE, model: Model, seen: Examination) -> str:
    best = seen.trials[0]
    named = sae.metadata.model_name
    of = f"one of {named}" if named and named != model.name else "one of another model, or broken"
    if sae.metadata.model_sha256 is not None and sae.metadata.model_sha256 != model.weights_sha256:
        of = f"one of {named or 'a model'} with other weights ({sae.metadata.model_sha256[:12]})"
    return (
        f"the SAE is probably {of}: it explains {_ev(seen.fit.explained_variance)} of the variance, no more than of "
        f"randomly turned activations ({_ev(seen.turned)}), and the best of {len(seen.trials)} other readings and "
        f"hooks {_ev(best.explained_variance)} ({best.reading.name}); give the model that it was trained on"
    )


def _fitting(seen: Examination) -> str:
    best = seen.trials[0]
    return (
        f"it explains {_ev(seen.fit.explained_variance)} of the variance at {seen.where.reads}, of randomly turned "
        f"activations {_ev(seen.turned)}, and none of {len(seen.trials)} other readings and hooks does better "
        f"(best: {best.reading.name}, {_ev(best.explained_variance)})"
    )


def _caveats(sae: SAE, model: Model, seen: Examination, expected: float | None) -> tuple[Finding, ...]:
    """What is noticed besides, most telling first."""
    ev, bos = seen.fit.explained_variance, _bos_finding(seen)
    findings = [] if bos is None else [bos]
    best = seen.trials[0]
    if best.ratio >= DOUBTFUL and best.explained_variance > ev:
        findings.append(Finding(best.reading.kind, f"perhaps {_named(best, seen)}"))
    trained_on = sae.metadata.model_sha256
    if trained_on is not None and trained_on != model.weights_sha256:
        findings.append(
            Finding(
                "model",
                f"it was trained on other weights ({trained_on[:12]}, here {model.weights_sha256[:12]}) but explains "
                f"{_ev(ev)} of the variance of these; evaluate it before relying on it",
            )
        )
    mean_norm = sae.metadata.mean_norm
    if mean_norm and not 1 / 1.5 < seen.mean_norm / mean_norm < 1.5:
        findings.append(
            Finding(
                "scale",
                f"activations have mean norm {seen.mean_norm:.3g} here and had {mean_norm:.3g} in its training; "
                "check the hook and the model's precision",
            )
        )
    if expected and not expected / SPARSITY < seen.l0.value < expected * SPARSITY:
        findings.append(
            Finding(
                "sparsity",
                f"{seen.l0.value:.1f} features are active per token, where its file says {expected:.1f}; "
                "check scale and text, and whether its threshold was saved",
            )
        )
    loss = ev - seen.explained_in_model_dtype
    if loss > DTYPE_LOSS:
        findings.append(
            Finding(
                "dtype",
                f"with weights in {str(model.dtype).removeprefix('torch.')} it explains {loss:.3f} less of the "
                "variance; keep its weights in float32",
            )
        )
    return tuple(findings)


def _bos_finding(seen: Examination) -> Finding | None:
    """BOS learnt, or missing where the SAE has seen it; None where BOS is a token like others."""
    first, ev = seen.first, _ev(seen.fit.explained_variance)
    if first.norm <= MASSIVE:
        return None
    if seen.bos and first.error <= BOS_LEARNT:
        return Finding(
            "bos",
            f"BOS was kept in its training: it reconstructs BOS (norm {first.norm:.0f} medians, "
            f"{first.variance_share:.1%} of the variance if kept) to {1 - first.error:.2%}, but explains {ev} of the "
            f"other tokens (with BOS {_ev(first.explained_variance_with)}); "
            "train without BOS, and leave BOS out of every metric",
        )
    if not seen.bos and first.error > BOS_LEARNT:
        return Finding(
            "bos",
            f"its file says that it reads text without BOS, but then the first token takes BOS's place (norm "
            f"{first.norm:.0f} medians), which the SAE has never seen: {ev} of the variance is explained without that "
            f"token and {_ev(first.explained_variance_with)} with it; set prepend_bos to true in its metadata",
        )
    return None


def _of_wrong_width(sae: SAE, model: Model, where: Where) -> Diagnosis:
    fitting = [name for name in model.hook_names() if model.hook_width(name) == sae.d_in]
    cure = (
        f"{model.name} has that width at {', '.join(fitting[:3])}{', ...' if len(fitting) > 3 else ''}"
        if fitting
        else f"no hook of {model.name} has that width, so the SAE is of another model"
    )
    widths = f"{sae.d_in}" if sae.d_in == sae.d_out else f"{sae.d_in} and writes {sae.d_out}"
    sentence = f"it reads vectors of width {widths}, but {where.reads} has {model.hook_width(where.reads)}; {cure}"
    finding = Finding("hook" if fitting else "model", sentence)
    return Diagnosis("does not fit", sentence, (finding,), None)


def _ev(explained_variance: float) -> str:
    return f"{explained_variance:.3f}"
