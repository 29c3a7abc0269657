"""Ways to use an SAE other than as its file says: the mistakes that people make, each undone.

A mistake in an SAE's file or in how it is used is a transformation; the reading that undoes it explains the activations
far better than the one as given. Each reading here stands for one such mistake, with the sentence that names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.moments import ActivationStats
from saelab.sae.base import SAE

#: What may be wrong. "model" has no reading that undoes it.
Kind = Literal["hook", "scale", "bos", "transpose", "sign", "bias", "model", "dtype", "sparsity"]

Into = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_in"]]
Back = Callable[[Float[Tensor, "n d_out"], Float[Tensor, "n d_in"]], Float[Tensor, "n d_out"]]


def _as_they_are(acts: Tensor) -> Tensor:
    return acts


def _as_it_is(recon: Tensor, acts: Tensor) -> Tensor:
    return recon


@dataclass(frozen=True, eq=False)
class Reading:
    """What the SAE is given, what is made of its answer, and which weights it works with."""

    kind: Kind
    name: str
    """How the activations are read, as a table names it."""
    mistake: str
    """What went wrong, if this reading is the right one."""
    cure: str
    """What to do about it."""
    into: Into = _as_they_are
    """Activations to the SAE's input."""
    back: Back = _as_it_is
    """The SAE's output, and the activations it was made from, to the reconstruction in their units."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters to put in place of the SAE's own."""

    @torch.no_grad()
    def reconstruct(self, sae: SAE, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        with with_weights(sae, self.weights):
            return self.back(sae(self.into(acts)), acts)


@contextlib.contextmanager
def with_weights(sae: SAE, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other parameters within the block, its own again after it."""
    before = {name: sae.get_parameter(name).data for name in weights}
    try:
        for name, tensor in weights.items():
            sae.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in before.items():
            sae.get_parameter(name).data = tensor


def scalings(stats: ActivationStats) -> list[Reading]:
    """Factors on the activations: the powers of two, and those of the usual normalisations.

    The SAE is given ``factor * (acts - shift)`` and its answer is brought back, as if it had been trained on these.
    """
    d_in = len(stats.mean)
    fold = "fold the factor into the weights: b_enc, b_dec and thresholds divided by it"
    readings = [
        _scaled(
            2.0**power,
            name=f"activations {_times(power)}",
            mistake=f"the SAE expects activations {_times(power)}",
            cure=f"{fold} ({2.0**power:g})",
        )
        for power in (-6, -4, -3, -2, -1, 1, 2, 3, 4, 6)
    ]
    root = d_in**0.5
    second_moment = (stats.centred_norm**2 + float(stats.mean.square().sum())) ** 0.5
    for factor, what in (
        (root / stats.mean_norm, "mean norm sqrt(d)"),
        (root / second_moment, "root mean square 1"),
        (1 / stats.mean_norm, "mean norm 1"),
    ):
        readings.append(
            _scaled(
                factor,
                name=f"activations scaled to {what}",
                mistake=f"the SAE was trained on activations scaled to {what}, and that scale is not in its weights",
                cure=f"{fold} ({factor:.4g})",
            )
        )
    readings.append(
        _scaled(
            root / stats.centred_norm,
            shift=stats.mean,
            name="activations centred, then scaled to root mean square 1",
            mistake="the SAE was trained on centred activations of root mean square 1, and neither is in its weights",
            cure=f"fold the mean and the factor {root / stats.centred_norm:.4g} into the weights",
        )
    )
    readings.append(
        _scaled(
            1.0,
            shift=stats.mean,
            name="activations centred",
            mistake="the SAE was trained on centred activations, and the mean is not in its weights",
            cure="add the mean activation to b_dec",
        )
    )
    return [*readings, _unit_norm(), _layer_norm()]


def _scaled(factor: float, *, name: str, mistake: str, cure: str, shift: Tensor | None = None) -> Reading:
    def into(acts: Tensor) -> Tensor:
        return (acts if shift is None else acts - shift.to(acts)) * factor

    def back(recon: Tensor, acts: Tensor) -> Tensor:
        return recon / factor if shift is None else recon / factor + shift.to(acts)

    return Reading("scale", name, mistake, cure, into, back)


def _unit_norm() -> Reading:
    def norms(acts: Tensor) -> Tensor:
        return acts.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    return Reading(
        "scale",
        "each token scaled to norm 1",
        "the SAE was trained on activations scaled to norm 1 token by token",
        "divide each token's activations by their norm before encoding, and multiply the reconstruction by it",
        lambda acts: acts / norms(acts),
        lambda recon, acts: recon * norms(acts),
    )


def _layer_norm() -> Reading:
    def moments(acts: Tensor) -> tuple[Tensor, Tensor]:
        return acts.mean(-1, keepdim=True), acts.std(-1, keepdim=True) + 1e-5

    def into(acts: Tensor) -> Tensor:
        mean, std = moments(acts)
        return (acts - mean) / std

    def back(recon: Tensor, acts: Tensor) -> Tensor:
        mean, std = moments(acts)
        return recon * std + mean

    return Reading(
        "scale",
        "each token layer-normed",
        "the SAE was trained on layer-normed activations",
        "subtract each token's mean and divide by its standard deviation before encoding, and undo both after decoding",
        into,
        back,
    )


def weight_mistakes(sae: SAE) -> list[Reading]:
    """Matrices transposed, reshaped where they should have been transposed, exchanged, or of the wrong sign."""
    own = {name: p.data for name, p in sae.named_parameters() if name in ("encoder", "W_dec") and p.ndim == 2}
    readings = []
    for names in (["encoder"], ["W_dec"], ["encoder", "W_dec"]):
        for turn in (_read_by_columns, _read_by_rows):
            if own.keys() >= set(names):
                readings.append(_turned({name: own[name] for name in names}, turn))
            if all(matrix.shape[0] == matrix.shape[1] for matrix in own.values()):
                break  # both are the transpose
    if len(own) == 2 and own["encoder"].shape == own["W_dec"].shape:
        readings.append(
            Reading(
                "transpose",
                "W_enc and W_dec exchanged",
                "W_enc and W_dec are exchanged",
                "exchange the two matrices in the file",
                weights={"encoder": own["W_dec"], "W_dec": own["encoder"]},
            )
        )
    return readings + [
        Reading(
            "sign",
            f"{_LABEL[name]} of the other sign",
            f"{_LABEL[name]} has the wrong sign",
            f"negate {_LABEL[name]} in the file",
            weights={name: -matrix},
        )
        for name, matrix in own.items()
    ]


_LABEL = {"encoder": "W_enc", "W_dec": "W_dec"}


def _read_by_columns(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The memory as that of the transpose: undoes a reshape of [columns, rows] to [rows, columns]."""
    return matrix.reshape(matrix.shape[1], matrix.shape[0]).T.contiguous()


def _read_by_rows(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The reverse: undoes that of [rows, columns] to [columns, rows], which was then transposed."""
    return matrix.T.reshape(matrix.shape)


def _turned(matrices: Mapping[str, Tensor], turn: Callable[[Tensor], Tensor]) -> Reading:
    labels = " and ".join(_LABEL[name] for name in matrices)
    are = "are both" if len(matrices) == 2 else "is"
    return Reading(
        "transpose",
        f"{labels} transposed",
        f"{labels} {are} transposed, or reshaped where a transpose was due",
        f"transpose {labels} in the file",
        weights={name: turn(matrix) for name, matrix in matrices.items()},
    )


def bias_mistakes(sae: SAE) -> list[Reading]:
    """b_dec left out or applied once too often, before the encoder or behind the decoder; none where b_dec is 0."""
    b_dec = sae.b_dec.data
    if not b_dec.any():
        return []

    def behind(sign: float) -> Back:
        return lambda recon, acts: recon + sign * b_dec

    readings = [
        Reading(
            "bias",
            "b_dec added once more behind the decoder",
            "the decoder leaves b_dec out",
            "add b_dec to the reconstruction",
            back=behind(1.0),
        ),
        Reading(
            "bias",
            "b_dec taken off behind the decoder",
            "b_dec is added twice behind the decoder",
            "add b_dec to the reconstruction only once",
            back=behind(-1.0),
        ),
    ]
    if sae.d_in == sae.d_out:
        readings += [
            Reading(
                "bias",
                "b_dec not subtracted before the encoder",
                "the SAE was trained without subtracting b_dec from its input",
                "set apply_b_dec_to_input to false, or add W_enc's image of b_dec to b_enc",
                into=lambda acts: acts + b_dec,
            ),
            Reading(
                "bias",
                "b_dec subtracted once more before the encoder",
                "the SAE was trained with b_dec subtracted from its input, and here it is not",
                "set apply_b_dec_to_input to true, or take W_enc's image of b_dec off b_enc",
                into=lambda acts: acts - b_dec,
            ),
        ]
    return readings


def _times(power: int) -> str:
    return f"times {2**power}" if power > 0 else f"divided by {2**-power}"
