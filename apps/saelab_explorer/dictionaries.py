"""Which SAEs can be compared: those with an index, and what is needed to compare them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saelab import rundir
from saelab.errors import ArtifactError
from saelab_explorer.runs import Run, stage_directories, stage_of


@dataclass(frozen=True)
class Dictionary:
    """An indexed SAE. Its name, in the address, is looked up and never a path."""

    name: str
    """The run; with the index's directory where a run has several."""
    run: str
    index: Path

    @property
    def fingerprint(self) -> str:
        return rundir.fingerprint(self.index)

    def sae(self) -> Path:
        """The SAE that the index describes.

        Raises:
            ArtifactError: the index does not say which, it is gone, or it was trained anew since.
        """
        path = rundir.parent(self.index, "sae")
        if rundir.fingerprint(path) != rundir.parents(self.index)["sae"]["sha256"]:
            raise ArtifactError(f"the SAE in {path} is another one than {self.index} describes; index it again")
        return path

    def activations(self) -> Path:
        """The activations that were indexed, whose tokens are read again.

        Raises:
            ArtifactError: the index does not say which, or they are gone.
        """
        return rundir.parent(self.index, "activations")


def find_dictionaries(runs: dict[str, Run]) -> dict[str, Dictionary]:
    """Every finished index that records which SAE it describes, by name."""
    found = {}
    for run in runs.values():
        finished = [p for p in stage_directories(run.path) if stage_of(p) == "index" and (p / "DONE").exists()]
        indexes = [path for path in finished if "sae" in rundir.parents(path)]
        for path in indexes:
            name = run.name if len(indexes) == 1 else f"{run.name}/{path.name}"
            found[name] = Dictionary(name, run.name, path)
    return found
