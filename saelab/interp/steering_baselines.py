"""What steering with a feature has to be better than: other directions, other features, and plain words.

Sources: Wu et al. 2025, arXiv 2501.17148 (AxBench), where prompting and the mean difference beat SAE features.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.errors import ConfigError
from saelab.interp.linear_fits import LinearFit, logistic_fit, mean_difference_fit
from saelab.interp.steering_record import Progress
from saelab.sae.base import SAE

_ROWS_AT_ONCE = 8


class Firings(NamedTuple):
    """Activations by whether features fire on them."""

    firing: dict[int, Float[Tensor, "_ d_model"]]  # feature -> the tokens on which it clearly fires
    others: Float[Tensor, "others d_model"]  # a random sample of all tokens
    fires_on_others: dict[int, Bool[Tensor, " others"]]  # feature -> the others on which it fires, however little


class Directions(NamedTuple):
    """Two directions for what a feature stands for, found without its decoder."""

    mean_difference: Float[np.ndarray, " d_model"]
    probe: Float[np.ndarray, " d_model"]
    n_firing: int
    n_others: int


@torch.inference_mode()
def firings(
    sae: SAE,
    store: ActivationStore,
    clear: Mapping[int, float],
    *,
    n_others: int = 2000,
    most: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Firings:
    """One pass over the store: the activations on which each feature of ``clear`` fires above its threshold there.

    Of every feature at most the first ``most`` in the order of the store are kept. BOS counts nowhere.

    Raises:
        ConfigError: a feature fires nowhere above its threshold.
    """
    hook_name = sae.metadata.hook_name
    found: dict[int, list[Tensor]] = {i: [] for i in clear}
    sampled, sampled_fire = [], {i: list[Tensor]() for i in clear}
    chance = n_others / (store.n_rows * (store.context - 1))
    generator = torch.Generator().manual_seed(seed)
    rows = store.rows("all")
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        acts = store.acts(hook_name, rows[start : start + _ROWS_AT_ONCE])[:, 1:].flatten(0, 1).float()
        codes = sae.sparse_codes(acts.to(sae.device))
        chosen = torch.rand(len(acts), generator=generator) < chance
        sampled.append(acts[chosen])
        for i, threshold in clear.items():
            mine = codes.features == i
            values = torch.zeros(len(acts)).index_put((codes.rows[mine].cpu(),), codes.values[mine].float().cpu())
            found[i].append(acts[values > threshold])
            sampled_fire[i].append(values[chosen] > 0)
        if progress:
            progress(min(start + _ROWS_AT_ONCE, len(rows)), len(rows), "rows of activations")
    firing = {i: torch.cat(parts)[:most] for i, parts in found.items()}
    for i, acts in firing.items():
        if not len(acts):
            raise ConfigError(
                f"feature {i} does not fire above {clear[i]:.3g} anywhere in {store.path}, so there is no mean "
                "difference to steer with; choose a feature that fires, or give more activations"
            )
    return Firings(firing, torch.cat(sampled), {i: torch.cat(parts) for i, parts in sampled_fire.items()})


def directions(found: Firings, feature: int) -> Directions:
    """From the tokens on which the feature fires against the others on which it does not."""
    firing, others = found.firing[feature], found.others[~found.fires_on_others[feature]]
    columns = torch.cat([firing, others]).numpy().astype(np.float64)
    positive = np.arange(len(columns)) < len(firing)
    fits: list[LinearFit] = [mean_difference_fit(columns, positive), logistic_fit(columns, positive)]
    return Directions(fits[0].direction, fits[1].direction, len(firing), len(others))


def features_of_equal_density(
    density: Float[np.ndarray, " d_sae"], feature: int, n: int, *, exclude: Collection[int] = (), seed: int = 0
) -> list[int]:
    """``n`` features drawn among the 10 n whose density is nearest to that of ``feature``, by ratio.

    Raises:
        ConfigError: fewer than ``n`` other features fire at all, or ``feature`` itself does not.
    """
    candidates = np.array([i for i in np.flatnonzero(density > 0) if i != feature and i not in exclude], dtype=int)
    if density[feature] <= 0 or len(candidates) < n:
        raise ConfigError(
            f"feature {feature} has density {density[feature]:.2g} and {len(candidates)} others fire, so there are no "
            f"{n} random features of equal density; choose a feature that fires, or lower n_twins"
        )
    distance = np.abs(np.log(density[candidates]) - math.log(density[feature]))
    near = candidates[np.argsort(distance, kind="stable")[: 10 * n]]
    return sorted(np.random.default_rng([seed, feature]).choice(near, size=n, replace=False).tolist())


def instructions(words: Sequence[str]) -> dict[str, str]:
    """Three prompts that ask for ``words``, from a mention to the words themselves; each is put before a text."""
    quoted = ", ".join(f'"{word}"' for word in dict.fromkeys(word.strip() for word in words))
    bare = " ".join(dict.fromkeys(word.strip() for word in words))
    return {
        "prompt: write about": f"Write about {quoted}. ",
        "prompt: next word": f"The next word is {quoted}. ",
        "prompt: words twice": f"{bare}. {bare}. ",
    }


def random_directions(n: int, d_model: int, *, seed: int) -> Float[Tensor, "n d_model"]:
    """Directions of no meaning, uniform over the sphere."""
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
