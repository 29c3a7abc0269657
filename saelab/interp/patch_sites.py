"""What a patch replaces: a place in the forward pass, and the grids of such places that a heat map shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from saelab.errors import ConfigError, nearest
from saelab.models.load import Model
from saelab.sae.base import Feature

Granularity = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "position", "feature"]

#: A hook, and the feature whose activation is replaced there, or None where the activations themselves are.
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Site:
    """Activations at one hook that are replaced together."""

    hook_name: str
    positions: tuple[int, ...]
    """Token positions, none of them 0: BOS is never edited."""
    columns: tuple[int, int] | None = None
    """First and one past the last entry of each token's vector, for a part of it such as a head; None for all."""
    feature: Feature | None = None
    """Replace this feature's activation alone; what the SAE does not explain, and the other features, stay."""

    @property
    def key(self) -> Key:
        return self.hook_name, None if self.feature is None else self.feature.index


class Cells(NamedTuple):
    """A grid of patches: ``sites[r][c]`` are replaced together for the cell in row r and column c."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    sites: tuple[tuple[tuple[Site, ...], ...], ...]


def cells(
    model: Model,
    at: Granularity,
    tokens: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    features: Sequence[Feature] = (),
) -> Cells:
    """The cells of a granularity for a text of these ``tokens``; rows are layers and columns are positions, except:

    ``head`` has heads as columns, each patched at all ``positions`` together; ``position`` has one row, in which the
    residual stream of a position is replaced in all ``layers``; ``feature`` has features as rows. Position 0 (BOS) is
    never edited and so is no column; ``layers`` and ``positions`` are all there are by default.

    Raises:
        ConfigError: an unknown granularity, layer or position, or features without ``feature`` or the other way round.
    """
    check_word(at, Granularity, "at")
    if (at == "feature") != bool(features):
        raise ConfigError(f"at={at!r} goes with {len(features)} features; give features=[...] with at='feature' only")
    if at == "feature" and layers is not None:
        raise ConfigError("features lie at the hook of their SAE, so layers cannot be chosen; leave them out")
    here = _checked(layers, 0, model.n_layers, "layer")
    where = _checked(positions, 1, len(tokens), "position")
    named = tuple(f"{p}: {tokens[p]}" for p in where)
    if at == "feature":
        rows = tuple(f"{feature.hook_name} {feature.index}" for feature in features)
        return Cells(rows, named, tuple(tuple((Site(f.hook_name, (p,), feature=f),) for p in where) for f in features))
    if at == "position":
        hooks = [f"blocks.{layer}.hook_{side}" for layer in here for side in ("resid_pre", "resid_post")]
        return Cells(("all layers",), named, (tuple(tuple(Site(h, (p,)) for h in hooks) for p in where),))
    rows = tuple(str(layer) for layer in here)
    if at == "head":
        n_heads = int(model.bridge.cfg.n_heads)
        heads = tuple(tuple((head_site(model, layer, h, where),) for h in range(n_heads)) for layer in here)
        return Cells(rows, tuple(f"head {h}" for h in range(n_heads)), heads)
    hook_names = [model.check_hook(f"blocks.{layer}.hook_{at}") for layer in here]
    return Cells(rows, named, tuple(tuple((Site(hook, (p,)),) for p in where) for hook in hook_names))


def head_site(model: Model, layer: int, head: int, positions: tuple[int, ...], *, part: str = "z") -> Site:
    """A head's output before the output matrix (``z``), or its queries, keys or values (``q``, ``k``, ``v``).

    Keys and values that several heads share (grouped-query attention) have the number of their group.

    Raises:
        ConfigError: no such layer or head.
    """
    hook_name = model.check_hook(f"blocks.{layer}.attn.hook_{part}")
    width = int(model.bridge.cfg.d_head)
    n_heads = model.hook_width(hook_name) // width
    if not 0 <= head < n_heads:
        raise ConfigError(f"there is no head {head} at {hook_name} of {model.name}; it has heads 0 to {n_heads - 1}")
    return Site(hook_name, positions, columns=(head * width, (head + 1) * width))


def check_word(given: str, known: object, name: str) -> None:
    """Raise ConfigError unless ``given`` is among the words of the literal type ``known``."""
    words = get_args(known)
    if given not in words:
        raise ConfigError(f"{name} must be one of {', '.join(words)}, got {given!r}; {nearest(given, words)}")


def _checked(chosen: Sequence[int] | None, first: int, stop: int, what: str) -> tuple[int, ...]:
    if chosen is None:
        return tuple(range(first, stop))
    wrong = [i for i in chosen if not first <= i < stop]
    if wrong or not chosen:
        given = wrong[0] if wrong else "none"
        raise ConfigError(f"{what} must be between {first} and {stop - 1}, got {given}; choose among these")
    return tuple(chosen)
