"""Timings, each behind a correctness gate and beside an honest baseline; results/ has them with device, versions."""

import importlib.util
import sys
from pathlib import Path

# A rented GPU machine has torch, triton and numpy but no installed saelab; the kernels need nothing more than their
# folder on the path, so a copy of the repository is enough.
if importlib.util.find_spec("saelab_kernels") is None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
