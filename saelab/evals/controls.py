"""Controls: the same SAE trained where there is nothing to find.

random weights   on a copy of the model whose weights are drawn anew, on the same text. What probing, absorption, seed
                 stability or a meta-SAE show there, they do not show about what the model learned. Source: Heap et al.
                 2025, arXiv 2501.17727, "re-randomised": each weight tensor Gaussian, with the mean and the standard
                 deviation that it had.
shuffled         on the model's own activations, each coordinate shuffled over the tokens: the same coordinates with all
                 that connects them gone.

A control is an SAE run of its own, kept beside the SAE under controls/, so that it is trained once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab import config as configs
from saelab import rundir
from saelab.activations.capture import read_activations
from saelab.activations.store import ActivationStore
from saelab.errors import ArtifactError, ConfigError, Interrupted
from saelab.evals.baselines import spread
from saelab.evals.fitting import RowBatches
from saelab.evals.piece import Piece, Score
from saelab.evals.reconstruction import explained, hooks, variance_sums
from saelab.models.load import Model, load_model
from saelab.sae.base import SAE, Metadata
from saelab.sae.io import load_sae
from saelab.stats import bootstrap, ratio
from saelab.train.config import TrainConfig
from saelab.train.loop import train_sae

Progress = Callable[[int, int, str], None]
Kind = Literal["random_weights", "shuffled"]

_SCHEMA = 1  # raise when the same settings begin to give other controls


@dataclass(frozen=True, kw_only=True)
class ControlsConfig:
    """The same SAE where there is nothing to find."""

    tokens: int = 100_000
    """Distinct tokens that a control is trained on, at most those of the activations' training half."""
    training_tokens: int = 400_000
    """Tokens of its training, counted with repetition; at most those of the SAE's own training."""
    seed: int = 0
    """Seed of the random weights, and of the shuffle."""

    def __post_init__(self) -> None:
        for name in ("tokens", "training_tokens"):
            if getattr(self, name) < 1000:
                raise ConfigError(
                    f"controls.{name} must be at least 1000, got {getattr(self, name)}; 100000 is the least to be fair"
                )


class Control(NamedTuple):
    """A control SAE, and held-out activations of the kind that it was trained on."""

    sae: SAE
    held_out: Float[Tensor, "rows seq d_in"]  # BOS left out
    config: TrainConfig
    n_tokens: int  # distinct tokens of its training


def randomised(model: Model, *, seed: int) -> Model:
    """A second copy of ``model`` whose every weight tensor is Gaussian, with the mean and the spread that it has."""
    copy = load_model(model.path_or_id, device=str(model.device), dtype=model.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in copy.bridge.parameters():
            drawn = torch.randn(weights.shape, generator=generator)
            spread_ = weights.float().std() if weights.numel() > 1 else torch.zeros(())
            weights.copy_((drawn * spread_.cpu() + weights.float().mean().cpu()).to(weights))
    return replace(copy, name=f"{model.name} with random weights (seed {seed})")


def random_weights_control(
    sae_path: Path,
    store: ActivationStore,
    model: Model,
    config: ControlsConfig,
    *,
    rows: Int[np.ndarray, " rows"],
    sae_seed: int | None = None,
    progress: Progress | None = None,
) -> Control:
    """The SAE of ``sae_path`` trained anew on the same text, as ``model`` (see `randomised`) reads it.

    ``sae_seed`` instead of the seed of the SAE's own training; ``rows`` are the held-out rows to read for it.

    Raises:
        ConfigError: the SAE does not say how it was trained, or was not trained on activations of one hook.
        Interrupted: Ctrl-C; what was trained is kept.
    """
    settings = training_of(sae_path, store, config)
    settings = settings if sae_seed is None else replace(settings, seed=sae_seed)

    def read(numbers: Int[np.ndarray, " rows"]) -> Float[Tensor, "rows seq d_in"]:
        hook_name = str(settings.hook_name)
        tokens = store.tokens(numbers).int().numpy()
        dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
        done = None if progress is None else lambda n: progress(n, tokens.size, "tokens read")
        acts = read_activations(model, tokens, [hook_name], batch_rows=16, dtype=dtype, progress=done)
        return acts[hook_name][:, 1:]

    return _trained("random_weights", sae_path, store, settings, config, rows, read, model.device, progress)


def shuffled_control(
    sae_path: Path,
    store: ActivationStore,
    config: ControlsConfig,
    *,
    rows: Int[np.ndarray, " rows"],
    device: torch.device,
    progress: Progress | None = None,
) -> Control:
    """The SAE of ``sae_path`` trained anew on the store's activations, each coordinate shuffled over the tokens.

    Raises:
        ConfigError: the SAE does not say how it was trained, or was not trained on activations of one hook.
        Interrupted: Ctrl-C; what was trained is kept.
    """
    settings = training_of(sae_path, store, config)

    def read(numbers: Int[np.ndarray, " rows"]) -> Float[Tensor, "rows seq d_in"]:
        acts = store.acts(str(settings.hook_name), numbers)[:, 1:]
        return shuffled(acts.flatten(0, 1), seed=config.seed).view_as(acts)

    return _trained("shuffled", sae_path, store, settings, config, rows, read, device, progress)


def shuffled(acts: Float[Tensor, "tokens d_in"], *, seed: int) -> Float[Tensor, "tokens d_in"]:
    """Each column in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([acts[torch.randperm(len(acts), generator=generator), i] for i in range(acts.shape[1])], dim=1)


def training_of(sae_path: Path, store: ActivationStore, config: ControlsConfig) -> TrainConfig:
    """The settings that the SAE was trained with, on less data.

    Raises:
        ConfigError: it was trained by another tool, or on several activations a token.
    """
    if not (sae_path / "run.json").exists():
        raise ConfigError(f"{sae_path} does not say how it was trained, so no control can be trained the same way")
    settings = configs.from_mapping(TrainConfig, rundir.read_run(sae_path, "sae")["config"])
    hook_name = settings.hook_name or store.hook_names[0]
    tokens = min(settings.tokens, config.training_tokens)
    return replace(settings, hook_name=hook_name, tokens=max(tokens, settings.batch_size), live=None, log_to=())


def why_no_control(sae: SAE, sae_path: Path, store: ActivationStore, config: ControlsConfig) -> str | None:
    """Why the SAE cannot be trained again on other activations; None if it can."""
    read, written = hooks(sae)
    if read != written:
        return "a transcoder's training is not repeated on a model with random weights"
    try:
        training_of(sae_path, store, config)
    except (ConfigError, ArtifactError) as error:
        return str(error)
    return None


class Quality(NamedTuple):
    """A control on its own held-out tokens."""

    piece: Piece
    live: Bool[Tensor, " d_sae"]


@torch.inference_mode()
def quality(control: Control, label: str, *, draws: int, seed: int) -> Quality:
    """Explained variance and L0 of a control on held-out tokens of its own kind, and which of its features fired."""
    sums, l0, live = [], [], torch.zeros(control.sae.d_sae, dtype=torch.bool)
    for acts in control.held_out.split(8):
        acts = acts.float().to(control.sae.device)
        feature_acts = control.sae.encode(acts)
        error = (acts - control.sae.decode(feature_acts)).pow(2).sum(-1)
        sums.append(variance_sums(acts, error, torch.ones_like(error)).cpu())
        l0.append((feature_acts != 0).sum((1, 2)).double().cpu())
        live |= (feature_acts != 0).any(0).any(0).cpu()
    variance = torch.cat(sums)
    n_tokens = int(variance[:, 0].sum())
    active = np.column_stack([torch.cat(l0).numpy(), variance[:, 0].numpy()])
    scores = (
        Score(
            "explained_variance",
            label,
            bootstrap(explained, variance.numpy(), draws=draws, seed=seed),
            n_tokens,
            "tokens",
        ),
        Score("l0", label, bootstrap(ratio, active, draws=draws, seed=seed), n_tokens, "tokens"),
    )
    note = f"{label}: {control.config.tokens:,} training tokens, {control.n_tokens:,} distinct."
    return Quality(Piece(name="controls", scores=scores, notes=(note,)), live)


def _trained(
    kind: Kind,
    sae_path: Path,
    store: ActivationStore,
    settings: TrainConfig,
    config: ControlsConfig,
    held_out: Int[np.ndarray, " rows"],
    read: Callable[[Int[np.ndarray, " rows"]], Float[Tensor, "rows seq d_in"]],
    device: torch.device,
    progress: Progress | None,
) -> Control:
    """The control of this kind: from its directory if it is finished there, trained (further) if not."""
    rows = spread(store.rows("train"), -(-config.tokens // (store.context - 1)))
    n_tokens = len(rows) * (store.context - 1)
    content = {
        "schema": _SCHEMA,
        "kind": kind,
        "training": configs.to_mapping(settings),
        "controls": configs.to_mapping(config),
        "activations": rundir.fingerprint(store.path),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    out = sae_path.parent / "controls" / f"{sae_path.name}-{kind}-{digest}"
    if (out / "DONE").exists():
        return Control(load_sae(out).to(device), read(held_out), settings, n_tokens)
    acts = read(rows).flatten(0, 1)
    batches = RowBatches(_without_outliers(acts, settings), batch_size=settings.batch_size, seed=settings.seed)
    if (out / "run.json").exists():
        run = rundir.StageWriter.resume(out, stage="sae")
    else:
        run = rundir.StageWriter.create(out, stage="sae", config=content, parents={"activations": store.path})
    metadata = Metadata(model_name=f"{store.manifest.model.name}, {kind}", hook_name=str(settings.hook_name))
    try:
        sae = train_sae(settings, batches, run, metadata=metadata, device=device, progress=progress)
    except Interrupted:
        raise Interrupted(
            "stopped while a control was being trained; what is finished is kept, run the same command again"
        ) from None
    return Control(sae, read(held_out), settings, n_tokens)


def _without_outliers(acts: Float[Tensor, "tokens d_in"], settings: TrainConfig) -> Float[Tensor, "tokens d_in"]:
    if settings.outlier_factor is None:
        return acts
    norms = acts.float().norm(dim=1)
    return acts[norms <= settings.outlier_factor * norms.median()]
