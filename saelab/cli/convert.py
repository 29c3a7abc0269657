"""saelab convert: an SAE from one tool's format into another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.cli.console import AsJson, emit
from saelab.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

    from saelab.sae.base import SAE

#: Largest relative RMS, and share of flipped features, at which the written file counts as the same SAE.
TOLERANCE = 1e-3
N_INPUTS = 256


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Directory or file of an SAE, or hf://owner/name/folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the result.")],
    format: Annotated[
        str, typer.Option("--format", help="saelens, dictionary_learning, sparsify or gemma_scope.")
    ] = "saelens",
    source_format: Annotated[
        str | None, typer.Option("--from", help="Format of IN, where its directory holds files of several.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write an SAE in another tool's format, say what was folded into its weights, and check the result."""
    result = converted(source, out, format=format, source_format=source_format)
    if json:
        emit(result)
        return
    print(f"{result['source']} -> {result['out']}  [{result['format']}]")
    hook = result["hook_name"] or "hook unknown"
    print(f"  {result['architecture']}, d_in {result['d_in']}, d_sae {result['d_sae']}, {hook}")
    for line in (*result["folded"], *result["notes"]):
        print(f"  {line}")
    same = result["read_back"]
    print(
        f"  read back on {same['n_random_inputs']:.0f} random inputs (L0 {same['l0']:.1f}): relative RMS of features "
        f"{same['features_rms']:.1e}, of reconstructions {same['reconstructions_rms']:.1e}; "
        f"share of active features on in only one of the two {same['flipped_share']:.1e}"
    )


def converted(source: str, out: Path, *, format: str, source_format: str | None = None) -> dict[str, Any]:
    """Write the SAE at ``source`` to ``out``, read it back, and return what was done.

    Raises:
        ArtifactError: ``out`` holds something already, the format cannot hold this SAE, or the result computes
            something else; then nothing is left at ``out``.
    """
    from saelab import atomic
    from saelab.sae.io import load_sae_files, read_sae, save_sae_as

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} already holds something; choose another OUT, or remove it first")
    read = read_sae(source, format=source_format)
    with atomic.replacing_directory(out) as folder:
        notes = save_sae_as(read.sae, folder, format=format)
        same = agreement(read.sae, load_sae_files(folder, format=format))
        worst = max(same["features_rms"], same["reconstructions_rms"], same["flipped_share"])
        if worst > TOLERANCE:
            raise ArtifactError(
                f"{source} cannot be written as {format}: what comes back computes something else (by {worst:.1e}); "
                "choose another format"
            )
    return {
        "source": source,
        "out": str(out),
        "format": format,
        "architecture": read.sae.cfg.arch,
        "d_in": read.sae.d_in,
        "d_sae": read.sae.d_sae,
        "hook_name": read.sae.metadata.hook_name,
        "folded": list(read.folded),
        "notes": list(notes),
        "read_back": same,
    }


def agreement(sae: SAE, other: SAE) -> dict[str, float]:
    """How close the second comes to the first on random inputs of its scale.

    A feature whose pre-activation is within rounding of its threshold may be on in the one and off in the other. Such
    flips are counted, as a share of all active features; the relative RMS is that of everything else.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    slots = (sae.b_dec.shape[0],) if sae.b_dec.dim() == 2 else ()
    spread = sae.b_dec.pow(2).mean().sqrt().item() or 1.0
    acts = spread * torch.randn((N_INPUTS, *slots, sae.d_in), generator=generator).to(sae.dtype)
    if sae.b_dec.shape[-1] == sae.d_in:
        acts = acts + sae.b_dec
    with torch.no_grad():
        mine, theirs = sae.encode(acts), other.encode(acts)
        flipped = (mine != 0) != (theirs != 0)
        whole = ~flipped.any(1)
        return {
            "n_random_inputs": float(N_INPUTS),
            "l0": float((mine != 0).sum() / N_INPUTS),
            "flipped_share": float(flipped.sum() / (mine != 0).sum().clamp_min(1)),
            "features_rms": _relative_rms(mine.masked_fill(flipped, 0), theirs.masked_fill(flipped, 0)),
            "reconstructions_rms": _relative_rms(sae(acts)[whole], other(acts)[whole]),
        }


def _relative_rms(mine: Tensor, theirs: Tensor) -> float:
    return float((theirs - mine).norm() / mine.norm().clamp_min(1e-30))
