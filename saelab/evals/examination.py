"""What `saelab doctor` measures: an SAE as given and in other readings, at its hook and at others, on one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.activations.moments import moments, norm_limit
from saelab.activations.rows import rows_of, stacked
from saelab.activations.settings import CacheConfig
from saelab.activations.text import TextConfig, open_text
from saelab.errors import ArtifactError, ConfigError, TextError
from saelab.evals.readings import Reading, bias_mistakes, scalings, weight_mistakes, with_weights
from saelab.models.hooks import layer_of
from saelab.models.load import Model
from saelab.sae.base import SAE
from saelab.stats import Interval, bootstrap, ratio

#: The places in a block that an SAE may have been meant for.
PLACES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")

AS_GIVEN = Reading("model", "as given", "", "")

_NEARBY = 2  # layers to either side of which every place is scanned
_ROWS_PER_PASS = 8
_VALUES_AT_ONCE = 2**24  # feature activations: 64 MB in float32
_MAX_PCA_TOKENS = 2048  # the decomposition costs the cube of the smaller of tokens and width
_EASE_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """On what an SAE is examined."""

    text: TextConfig = field(default_factory=TextConfig)
    """Text to read."""
    tokens: int = 4096
    """Tokens to measure on."""
    scan_tokens: int = 1024
    """Of these, the ones that each other reading and hook is tried on."""
    context: int = 128
    """Tokens in a row; fewer where the model or the SAE's training had a shorter context."""
    outlier_factor: float = 10.0
    """A token counts as an outlier when its norm exceeds this many times the median."""
    seed: int = 0
    """Seed of the random rotation and of the bootstrap."""

    def __post_init__(self) -> None:
        if self.context < 3:
            raise ConfigError(f"context must be at least 3, got {self.context}; 128 is usual")
        for name in ("tokens", "scan_tokens"):
            if getattr(self, name) < 2 * self.context:
                raise ConfigError(
                    f"{name} must be at least two rows of context={self.context}, got {getattr(self, name)}; raise it"
                )


class Where(NamedTuple):
    """What the SAE reads and what it should answer: one hook, or for a transcoder two."""

    reads: str
    writes: str


class Probe(NamedTuple):
    """Activations of some rows at one hook."""

    acts: Float[Tensor, "rows seq d_in"]  # the first position apart
    first: Float[Tensor, "rows d_in"]  # BOS, or the first token of rows without it


class Fit(NamedTuple):
    """How well reconstructions fit activations."""

    explained_variance: float
    explained_affine: float
    """Explained variance after the best single factor and offset: what is left once scale and bias are right."""
    slope: float
    """That factor: 1 is right; above 1 reconstructions are too small, as L1 leaves them."""
    offset: float
    """|mean error|^2 as a share of the variance: 0 is right."""
    norm_ratio: float
    """Mean of |recon| / |acts|."""
    cosine: float
    """Mean cosine of reconstruction and activation."""
    n_tokens: int

    @property
    def unexplained(self) -> float:
        return 1 - self.explained_variance


class Trial(NamedTuple):
    """One reading at one hook, and how well it did."""

    reading: Reading
    hook_name: str
    explained_variance: float
    ratio: float
    """Unexplained variance as given, divided by that of this reading: above 1 this one is better. Where it
    is, each is first divided by what as many principal components as features are active leave, because layers differ
    in how much there is to explain, and a larger input may explain more of it only by activating more features."""


class FirstPosition(NamedTuple):
    """The position that BOS takes, or the first token of rows without BOS."""

    norm: float
    """In units of the median norm of the others."""
    error: float
    """|acts - recon|^2 / |acts - mean|^2 there: near 0 the SAE has learnt it, around 1 and above it has not."""
    variance_share: float
    """Share of the variance that it has when it is kept."""
    explained_variance_with: float
    """Explained variance when it is kept."""


class Examination(NamedTuple):
    """All measurements of an SAE. Outliers and the first position are left out where nothing else is said."""

    where: Where
    bos: bool
    """Whether rows began with BOS, as the SAE's file says."""
    fit: Fit
    interval: Interval
    """Of the explained variance; rows resampled."""
    explained_with_outliers: float
    n_outliers: int
    l0: Interval
    """Rows resampled."""
    dead_fraction: float
    mean_norm: float
    first: FirstPosition
    explained_in_model_dtype: float
    """Explained variance with the SAE's weights rounded to the model's dtype."""
    pca: float
    """Explained variance of as many principal components as features are active."""
    turned: float
    """Explained variance on the same activations turned at random about their mean, which no SAE knows."""
    best_turned: float
    """The same for the best of ``trials``."""
    trials: tuple[Trial, ...]
    """All other readings and hooks, best first."""


@torch.no_grad()
def examine(
    sae: SAE, model: Model, where: Where, tokens: Int[np.ndarray, "rows seq"], config: ScanConfig
) -> Examination:
    """Measure ``sae`` on ``tokens``, rows that begin with BOS; the hooks are all read in one forward pass.

    Raises:
        ArtifactError: activations or reconstructions are not finite.
    """
    bos = sae.metadata.prepend_bos
    every = max(1, tokens.size // config.scan_tokens)
    hooks = neighbours(model, where.reads, width=sae.d_in)
    probes = read(model, tokens if bos else tokens[:, 1:], where, hooks, every=every, device=sae.device)
    acts, goal = probes[where.reads], probes[where.writes]
    usual = _usual(acts.acts, config.outlier_factor) & _usual(goal.acts, config.outlier_factor)
    recon = reconstructed(AS_GIVEN, sae, acts.acts.flatten(0, 1)).view(goal.acts.shape)
    if not recon.isfinite().all():
        raise ArtifactError(f"the SAE answers the activations at {where.reads} with values that are no numbers")
    fit = fit_between(goal.acts[usual].float(), recon[usual])

    l0, dead_fraction = _sparsity(sae, acts.acts, usual, seed=config.seed)
    rank = max(1, round(l0.value))

    near = usual[::every]
    near_in, near_out = acts.acts[::every][near].float(), goal.acts[::every][near].float()
    unexplained = fit_between(near_out, recon[::every][near]).unexplained
    left_by_pca = residual_share(near_out, rank=rank)

    def tried(reading: Reading, hook_name: str, inputs: Tensor, outputs: Tensor) -> Trial:
        found = fit_between(outputs, reconstructed(reading, sae, inputs))
        ratio = unexplained / max(found.unexplained, 1e-9)
        if ratio > 1:
            active = max(1, round(active_features(reading, sae, inputs)))
            ratio *= residual_share(outputs, rank=active) / left_by_pca
        return Trial(reading, hook_name, found.explained_variance, ratio)

    stats = moments([acts.acts[usual].float()])
    trials = [
        tried(reading, where.reads, near_in, near_out)
        for reading in (*scalings(stats), *weight_mistakes(sae), *bias_mistakes(sae))
    ]
    for names, other in _distinct_hooks(probes, where, every).items():
        keep = near & _usual(other, config.outlier_factor)
        outputs = other if where.reads == where.writes else goal.acts[::every]
        trials.append(tried(_at_hook(names), names, other[keep].float(), outputs[keep].float()))
    trials.append(tried(_other_bos(bos=bos), where.reads, *_with_other_bos(sae, model, tokens[::every], where, config)))
    trials.sort(key=lambda trial: -trial.ratio)

    def by_chance(reading: Reading, inputs: Tensor) -> float:
        strange = turned(inputs, seed=config.seed)
        outputs = strange if where.reads == where.writes else near_out
        return fit_between(outputs, reconstructed(reading, sae, strange)).explained_variance

    best, best_in = trials[0], near_in
    if best.reading.kind == "hook" and where.reads == where.writes:
        there = probes[best.hook_name.partition(" = ")[0]].acts
        best_in = there[near & _usual(there, config.outlier_factor)].float()
    return Examination(
        where=where,
        bos=bos,
        fit=fit,
        interval=_interval(goal.acts, recon, usual, seed=config.seed),
        explained_with_outliers=fit_between(goal.acts.flatten(0, 1).float(), recon.flatten(0, 1)).explained_variance,
        n_outliers=int((~usual).sum()),
        l0=l0,
        dead_fraction=dead_fraction,
        mean_norm=stats.mean_norm,
        first=_first_position(sae, acts.first.float(), goal.first.float(), goal.acts[usual].float(), recon[usual]),
        explained_in_model_dtype=fit.explained_variance
        + unexplained
        - fit_between(near_out, reconstructed(_rounded(sae, model.dtype), sae, near_in)).unexplained,
        pca=pca_explained(goal.acts[usual].float(), rank=rank),
        turned=by_chance(AS_GIVEN, near_in),
        best_turned=by_chance(best.reading, best_in),
        trials=tuple(trials),
    )


# --- what is read


def token_rows(sae: SAE, model: Model, config: ScanConfig) -> Int[np.ndarray, "rows seq"]:
    """Rows of the text's tokens behind BOS; no document gives more than one row, so that they are different ones.

    Raises:
        TextError: fewer than two rows.
    """
    context = min(config.context, model.context, sae.metadata.context_size or config.context)
    one_row = CacheConfig(
        text=TextConfig(
            source=config.text.source,
            column=config.text.column,
            split=config.text.split,
            subset=config.text.subset,
            max_tokens_per_document=context,
        ),
        tokens=config.tokens,
        context=context,
        held_out=0.0,
    )
    rows = list(rows_of(open_text(one_row.text), model, one_row))
    if len(rows) < config.tokens // context:  # few long documents
        whole = CacheConfig(text=config.text, tokens=config.tokens, context=context, held_out=0.0)
        rows = list(rows_of(open_text(whole.text), model, whole))
    if len(rows) < 2:
        raise TextError(
            f"the text {config.text.source!r} gives {len(rows)} rows of {context} tokens, and doctor needs at least 2; "
            "give a longer text"
        )
    return stacked(rows).tokens


def neighbours(model: Model, hook_name: str, *, width: int) -> list[str]:
    """Hooks that an SAE of this width may have been meant for, in the order of a forward pass.

    The same place in every layer, the end of every layer, and every place of the layers nearby.
    """
    layer = layer_of(hook_name)
    place = hook_name.rpartition(".")[2]
    wanted = {
        f"blocks.{other}.{name}"
        for other in range(model.n_layers)
        for name in (place, "hook_resid_post", *PLACES)
        if name in (place, "hook_resid_post") or (layer is not None and abs(other - layer) <= _NEARBY)
    }
    return [name for name in model.hook_names() if name in wanted and model.hook_width(name) == width]


def read(
    model: Model,
    tokens: Int[np.ndarray, "rows seq"],
    where: Where,
    hooks: Sequence[str],
    *,
    every: int,
    device: torch.device,
) -> dict[str, Probe]:
    """Activations of all rows at ``where``, and of every ``every``-th row at the other ``hooks``, in one forward pass.

    Raises:
        ArtifactError: they are not finite.
    """
    names = list(dict.fromkeys([*where, *hooks]))
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(tokens), _ROWS_PER_PASS):
        rows = torch.from_numpy(tokens[start : start + _ROWS_PER_PASS]).long()
        scanned = torch.arange(start, start + len(rows)) % every == 0
        for name, acts in model.capture(rows, names).items():
            parts[name].append((acts if name in where else acts[scanned.to(acts.device)]).to(device))
    probes = {name: Probe(acts[:, 1:], acts[:, 0]) for name, acts in ((n, torch.cat(p)) for n, p in parts.items())}
    for name in where:
        if not probes[name].acts.isfinite().all():
            raise ArtifactError(
                f"the activations of {model.name} at {name} are not finite in {model.dtype}; load it in float32"
            )
    return probes


def _usual(acts: Float[Tensor, "rows seq d_in"], factor: float) -> Bool[Tensor, "rows seq"]:
    norms = acts.float().norm(dim=-1)
    return norms <= norm_limit(norms.flatten(), outlier_factor=factor)


# --- readings


def reconstructed(reading: Reading, sae: SAE, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
    """What ``sae`` makes of ``acts`` in this reading, in bounded memory."""
    n_rows = max(1, _VALUES_AT_ONCE // sae.d_sae)
    return torch.cat([reading.reconstruct(sae, part.to(sae.dtype)) for part in acts.split(n_rows)])


def active_features(reading: Reading, sae: SAE, acts: Float[Tensor, "n d_in"]) -> float:
    """L0 in this reading."""
    n_rows = max(1, _VALUES_AT_ONCE // sae.d_sae)
    with with_weights(sae, reading.weights):
        parts = [sae.sparse_codes(reading.into(part.to(sae.dtype))) for part in acts.split(n_rows)]
    return sum(len(codes.rows) for codes in parts) / len(acts)


def fit_between(acts: Float[Tensor, "n d_out"], recon: Float[Tensor, "n d_out"]) -> Fit:
    """How well ``recon`` fits ``acts``; sums are in float64."""
    acts, recon = acts.double(), recon.double()
    centred, answer = acts - acts.mean(0), recon - recon.mean(0)
    error = acts - recon
    variance, answered, shared = centred.square().sum(), answer.square().sum(), (centred * answer).sum()
    tiny = torch.finfo(torch.float64).tiny
    return Fit(
        explained_variance=float(1 - error.square().sum() / variance.clamp_min(tiny)),
        explained_affine=float(shared.square() / (variance * answered).clamp_min(tiny)),
        slope=float(shared / answered.clamp_min(tiny)),
        offset=float(len(acts) * error.mean(0).square().sum() / variance.clamp_min(tiny)),
        norm_ratio=float((recon.norm(dim=1) / acts.norm(dim=1).clamp_min(tiny)).mean()),
        cosine=float(torch.nn.functional.cosine_similarity(acts, recon, dim=1).mean()),
        n_tokens=len(acts),
    )


def _distinct_hooks(probes: dict[str, Probe], where: Where, every: int) -> dict[str, Float[Tensor, "rows seq d_in"]]:
    """The scanned rows at all hooks but the SAE's own; hooks at which the activations are the same count once."""
    own = probes[where.reads].acts[::every]
    found: dict[str, Tensor] = {}
    for name, probe in probes.items():
        if name in where and where.reads != where.writes:
            continue
        acts = probe.acts[::every] if name in where else probe.acts
        twin = next((other for other, seen in found.items() if torch.equal(seen, acts)), None)
        if torch.equal(acts, own):
            continue
        if twin is not None:
            found[f"{twin} = {name}"] = found.pop(twin)
        else:
            found[name] = acts
    return found


def _at_hook(names: str) -> Reading:
    return Reading("hook", f"at {names}", f"the SAE belongs to {names}", f"use it at {names.partition(' = ')[0]}")


def _other_bos(*, bos: bool) -> Reading:
    kept, left = ("with", "without") if bos else ("without", "with")
    return Reading(
        "bos",
        f"text {left} BOS",
        f"the SAE was trained on text {left} BOS, not {kept} it",
        f"set prepend_bos to {'false' if bos else 'true'} in its metadata",
    )


def _with_other_bos(
    sae: SAE, model: Model, tokens: Int[np.ndarray, "rows seq"], where: Where, config: ScanConfig
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
    """Activations and targets of the scanned rows in the other habit, the first position and outliers left out."""
    rows = tokens[:, 1:] if sae.metadata.prepend_bos else tokens
    probes = read(model, rows, where, [], every=1, device=sae.device)
    acts, goal = probes[where.reads].acts, probes[where.writes].acts
    usual = _usual(acts, config.outlier_factor) & _usual(goal, config.outlier_factor)
    return acts[usual].float(), goal[usual].float()


def _rounded(sae: SAE, dtype: torch.dtype) -> Reading:
    weights = {name: value.data.to(dtype).to(value.dtype) for name, value in sae.named_parameters()}
    return Reading("dtype", f"weights in {dtype}", "", "", weights=weights)


# --- sparsity, BOS, baselines


def _sparsity(
    sae: SAE, acts: Float[Tensor, "rows seq d_in"], usual: Bool[Tensor, "rows seq"], *, seed: int
) -> tuple[Interval, float]:
    """L0, and the share of features that did not fire once."""
    active = torch.zeros(usual.shape, dtype=torch.float64)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for row, (tokens, keep) in enumerate(zip(acts, usual, strict=True)):
        codes = sae.sparse_codes(tokens[keep].to(sae.dtype))
        fired[codes.features.cpu()] = True
        active[row, keep.cpu()] = torch.bincount(codes.rows.cpu(), minlength=int(keep.sum())).double()
    sums = torch.stack([active.sum(1), usual.sum(1).cpu().double()], 1).numpy()
    return bootstrap(ratio, sums, seed=seed), float(1 - fired.double().mean())


def _interval(
    acts: Float[Tensor, "rows seq d_out"],
    recon: Float[Tensor, "rows seq d_out"],
    usual: Bool[Tensor, "rows seq"],
    *,
    seed: int,
) -> Interval:
    """Explained variance with its bootstrap interval over rows."""
    weight = usual[..., None].double()
    acts, error = acts.double() * weight, (acts.double() - recon.double()) * weight
    squares = [weight.sum((1, 2)), error.square().sum((1, 2)), acts.square().sum((1, 2))]
    sums = torch.cat([torch.stack(squares, 1), acts.sum(1)], 1).cpu().numpy()

    def explained(s: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
        return 1 - s[:, 1] / (s[:, 2] - (s[:, 3:] ** 2).sum(1) / s[:, 0])

    return bootstrap(explained, sums, seed=seed)


def _first_position(
    sae: SAE,
    first: Float[Tensor, "rows d_in"],
    first_goal: Float[Tensor, "rows d_out"],
    goal: Float[Tensor, "n d_out"],
    recon: Float[Tensor, "n d_out"],
) -> FirstPosition:
    answer = reconstructed(AS_GIVEN, sae, first)
    away = (first_goal - goal.mean(0)).square().sum()
    whole = fit_between(torch.cat([goal, first_goal]), torch.cat([recon, answer.to(recon)]))
    total = (torch.cat([goal, first_goal]) - torch.cat([goal, first_goal]).mean(0)).square().sum()
    return FirstPosition(
        norm=float(first_goal.norm(dim=1).mean() / goal.norm(dim=1).median()),
        error=float((first_goal - answer).square().sum() / away),
        variance_share=float(1 - (goal - goal.mean(0)).square().sum() / total),
        explained_variance_with=whole.explained_variance,
    )


def turned(acts: Float[Tensor, "n d_in"], *, seed: int) -> Float[Tensor, "n d_in"]:
    """``acts`` turned about their mean by a random rotation: the same spectrum, in directions nobody has seen."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(acts.shape[1], acts.shape[1], generator=generator)).Q.to(acts)
    mean = acts.mean(0)
    return (acts - mean) @ rotation + mean


def pca_explained(acts: Float[Tensor, "n d_out"], *, rank: int) -> float:
    """Share of the variance of every second token that ``rank`` principal components of the others explain."""
    n = min(len(acts), 2 * _MAX_PCA_TOKENS)
    fitting, testing = acts[0:n:2] - acts[0:n:2].mean(0), acts[1:n:2]
    # the components are the eigenvectors of the smaller of the two matrices of scalar products
    if len(fitting) < fitting.shape[1]:
        directions = fitting.T @ torch.linalg.eigh(fitting @ fitting.T).eigenvectors[:, -rank:]
    else:
        directions = torch.linalg.eigh(fitting.T @ fitting).eigenvectors[:, -rank:]
    basis = torch.linalg.qr(directions).Q
    centred = testing - acts[0:n:2].mean(0)
    left = centred - centred @ basis @ basis.T
    return float(1 - left.square().sum() / (testing - testing.mean(0)).square().sum())


def residual_share(acts: Float[Tensor, "n d_out"], *, rank: int) -> float:
    """Share of the variance of some of these tokens that their own ``rank`` first principal components leave."""
    some = acts[:: max(1, len(acts) // _EASE_TOKENS)][:_EASE_TOKENS]
    some = some - some.mean(0)
    variances = torch.linalg.eigvalsh(some @ some.T).clamp_min(0)
    rank = min(rank, len(some) // 2, some.shape[1] // 2)  # beyond that nothing may be left to compare
    return float(variances[:-rank].sum() / variances.sum())
