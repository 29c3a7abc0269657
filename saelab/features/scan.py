"""The one pass over the activations: encode, search, and put the pairs on disk. It goes on where a kill left it.

What is sought in all pairs (top examples, samples, histogram, counts, means) is kept up to date chunk by chunk in
memory that does not grow with the text (``saelab_kernels.search``); the pairs themselves go to disk for what needs all
of a feature's (labels, windows, quantiles, co-activation).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.checkpoint import Checkpoints
from saelab.errors import ArtifactError
from saelab.features.codes import Codes, CodesFiles
from saelab.features.config import IndexConfig
from saelab_kernels.search.stream import FeatureSearch, SearchSettings
from saelab_kernels.search.types import Bins, TopState

if TYPE_CHECKING:
    from saelab.sae.base import SAE

Progress = Callable[[int, int, str], None]

#: Eight bins an octave from 6e-5 to 260,000; what lies beyond counts to the bins at the ends.
BINS = Bins(per_octave=8, lowest=-14, n_octaves=32)

#: Neighbouring bins that are sampled together: half an octave.
GROUP = 4

#: Where the state of the pass lies within the directory of an index that is being built.
CODES, CHECKPOINTS = "codes", "checkpoints"


@runtime_checkable
class ActsByRow(Protocol):
    """What the pass needs of a store of activations."""

    @property
    def path(self) -> Path: ...

    @property
    def context(self) -> int: ...

    def acts(self, hook_name: str, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n seq d_in"]: ...


class FoundFeatures(NamedTuple):
    """What the pass found of each feature."""

    n_fired: Int[np.ndarray, " features"]
    max: Float[np.ndarray, " features"]
    mean: Float[np.ndarray, " features"]
    top_positions: Int[np.ndarray, "features n_examples"]
    """Places in the store (row x context + column) of the highest activations, one from each row; -1 where there are
    fewer. Highest first, of equals the lower place first."""
    bin_counts: Int[np.ndarray, "features bins"]
    """Firings in each of ``BINS``."""
    sample: TopState
    """Of each half octave of each feature, the firings with the smallest hashes of (seed, feature, place)."""


class Scanned(NamedTuple):
    codes: Codes
    found: FoundFeatures


class Fired(NamedTuple):
    """The active pairs of some rows, by token."""

    places: Int[Tensor, " pairs"]
    """Row x context + column, rows counted from the first of these."""
    positions: Int[Tensor, " pairs"]
    """The same in the store."""
    features: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]


def scan(
    sae: SAE,
    store: ActsByRow,
    rows: Int[np.ndarray, " rows"],
    folder: Path,
    *,
    hook_name: str,
    settings: IndexConfig,
    chunk_rows: int = 64,
    checkpoint_chunks: int = 32,
    progress: Progress | None = None,
) -> Scanned:
    """Everything but the first position (BOS) of each of ``rows``, from where the last checkpoint in ``folder`` ends.

    ``rows`` ascend. The result depends neither on ``chunk_rows`` nor on how often the pass was killed and resumed.

    Raises:
        ArtifactError: the disk is full, or an activation is no number.
    """
    search = new_search(len(sae.W_dec), store.context, settings, device=str(sae.W_dec.device))
    files = CodesFiles(folder / CODES, context=store.context)
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    saved = checkpoints.latest()
    if saved is not None:
        search.restore(saved.tensors)
    n_done = saved.step if saved is not None else 0
    files.cut(n_done)
    for number, start in enumerate(range(n_done, len(rows), chunk_rows), start=1):
        chunk = rows[start : start + chunk_rows]
        fired = encoded(sae, store, chunk, hook_name=hook_name)
        search.add(fired.features, fired.positions, fired.values)
        places, _, features, values = (column.cpu().numpy() for column in fired)
        files.append(places, features, values, n_rows=len(chunk))
        n_done = start + len(chunk)
        if number % checkpoint_chunks == 0 or n_done == len(rows):
            files.sync()  # before the checkpoint that counts on them
            checkpoints.save(n_done, search.tensors(), {})
        if progress:
            progress(n_done, len(rows), "rows encoded")
    found = found_features(search)
    return Scanned(files.read(found.n_fired), found)


@torch.inference_mode()
def encoded(sae: SAE, store: ActsByRow, rows: Int[np.ndarray, " rows"], *, hook_name: str) -> Fired:
    """The features that fire on every position of ``rows`` but the first.

    Raises:
        ArtifactError: an activation is no number.
    """
    device, context = sae.W_dec.device, store.context
    acts = store.acts(hook_name, rows)[:, 1:].to(device, torch.float32)
    codes = sae.sparse_codes(acts.reshape(-1, acts.shape[-1]))
    fires = ~(codes.values <= 0)
    tokens, values = codes.rows[fires], codes.values[fires].float()
    places, positions = (_of_tokens(numbers, context, device)[tokens] for numbers in (np.arange(len(rows)), rows))
    if not torch.isfinite(values).all():
        row = int(positions[~torch.isfinite(values)][0]) // context
        raise ArtifactError(
            f"the SAE gives values that are no numbers on row {row} of {store.path}; "
            "look for NaN in its weights, or capture the activations again"
        )
    return Fired(places, positions, codes.features[fires], values)


def _of_tokens(rows: Int[np.ndarray, " rows"], context: int, device: torch.device) -> Int[Tensor, " tokens"]:
    """The position of each encoded token of ``rows``: all but the first of each."""
    return torch.from_numpy((rows[:, None] * context + np.arange(1, context)).reshape(-1)).to(device)


def new_search(n_features: int, context: int, settings: IndexConfig, *, device: str = "cpu") -> FeatureSearch:
    """A search for what an index with these settings keeps."""
    wanted = SearchSettings(
        n_top=settings.n_examples,
        row_length=context,
        bins=BINS,
        group=GROUP,
        n_sampled=settings.per_interval,
        seed=settings.seed,
    )
    return FeatureSearch(n_features, wanted, device=device)


def found_features(search: FeatureSearch) -> FoundFeatures:
    """What ``search`` amounts to, on the CPU."""
    top, tally, sample = search.found()
    return FoundFeatures(
        n_fired=tally.n_fired.cpu().numpy(),
        max=top.values[:, 0].cpu().numpy(),
        mean=tally.means().cpu().numpy(),
        top_positions=top.positions.cpu().numpy(),
        bin_counts=tally.counts.cpu().numpy(),
        sample=TopState(*(tensor.cpu() for tensor in sample)),
    )


def memory_bytes(n_features: int, settings: IndexConfig) -> int:
    """What the state of the pass takes."""
    n_sampled = BINS.n_bins // GROUP * settings.per_interval
    return n_features * (12 * settings.n_examples + 4 * BINS.n_bins + 256 + 16 * n_sampled)
