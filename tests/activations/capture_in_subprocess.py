"""Runs one capture and says so: the tests kill it, or forbid it to write large files.

    python capture_in_subprocess.py OUT CONFIG.json MODEL [FILE_LIMIT_BYTES]

MODEL is "fake" or a directory. Prints "begun" when the imports are done; an error's sentence, if there is one; "done".
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels"), str(Path(__file__).parent)]

from activations_fake_model import FakeModel  # noqa: E402

from saelab.activations.capture import CacheConfig, capture  # noqa: E402
from saelab.config import from_mapping  # noqa: E402
from saelab.errors import SaelabError  # noqa: E402
from saelab.models.load import Model, load_model  # noqa: E402


def main(out: Path, config_file: Path, model_name: str, limit: int | None) -> None:
    config = from_mapping(CacheConfig, json.loads(config_file.read_text()))
    model: Model = FakeModel(seconds_per_forward=2e-3) if model_name == "fake" else load_model(model_name, device="cpu")
    model.weights_sha256  # noqa: B018 (hashed once, before the time that the test measures)
    print("begun", flush=True)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        capture(config, out, model=model, resume=True)
    except SaelabError as error:
        print(error, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else None)
