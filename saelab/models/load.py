"""Loading a model by name, directory or hub id, and checking that hooking it did not change it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from saelab.errors import ArtifactError, AssetError, ConfigError, SaelabError, nearest
from saelab.models.demo import NAMES as DEMO_NAMES
from saelab.models.demo import demo_model_dir
from saelab.models.model import EditFn, Model
from saelab.models.quiet import missing_weights, quiet_loading
from saelab.models.tokens import Tokens

__all__ = ["EditFn", "Model", "Tokens", "check_fidelity", "load_model"]

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SENTENCE = "The lighthouse keeper counted 1,984 waves before the storm, and wrote: \u201cna\u00efve, but true\u201d."


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> Model:
    """A model with hook points: ``"demo"``, a directory in the Hugging Face layout, or a name on the Hugging Face hub.

    ``device`` is CUDA where there is one, else the CPU. ``dtype`` is the checkpoint's own (float32 instead of float16
    on a CPU, which has no fast arithmetic for it). ``progress`` is told each long step of making the demo model.

    Raises:
        AssetError: no such directory, or the hub does not know or give the model, or cannot be reached.
        ArtifactError: the directory holds no complete model.
        ConfigError: no name, an unknown device, dtype or architecture.
    """
    name = os.fspath(name_or_path)
    device = checked_device(device)
    source = located(name, progress=progress)
    with quiet_loading(), _explained(name, source):
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoConfig

        with _offline_if_unreachable(source), missing_weights() as missing:
            config = AutoConfig.from_pretrained(source)
            chosen = _checked_dtype(dtype, config, device)
            bridge = TransformerBridge.boot_transformers(source, device=device, dtype=chosen)
    if missing:
        others = f" and {len(missing) - 1} others" if missing[1:] else ""
        raise ArtifactError(f"the weights of {name} lack {missing[0]}{others}; get the complete model again")
    bridge.eval()
    bridge.requires_grad_(False)
    tokenizer = bridge.tokenizer
    eos = tokenizer.eos_token_id
    return Model(
        name=name,
        path_or_id=source,
        bridge=bridge,
        tokenizer=tokenizer,
        device=torch.device(device),
        dtype=chosen,
        bos_id=eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_id=eos,
        pad_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def check_fidelity(model: Model, text: str = _SENTENCE, *, tolerance: float = 0.0) -> float:
    """Largest difference between the hooked model's logits on ``text`` and those of the plain Hugging Face model.

    The plain model is loaded anew from the same place, in the same dtype and with the same (eager) attention; 0 is
    expected. Do not call it within an edit.

    Raises:
        ArtifactError: the difference exceeds ``tolerance``.
    """
    from transformers import AutoModelForCausalLM

    with quiet_loading(), _offline_if_unreachable(model.path_or_id):
        plain = AutoModelForCausalLM.from_pretrained(model.path_or_id, dtype=model.dtype, attn_implementation="eager")
    plain = plain.to(model.device).eval()
    tokens = model.to_tokens(text)
    with torch.no_grad():
        expected = plain(tokens.ids, use_cache=False).logits.float()
    difference = float((model.logits(*tokens) - expected).abs().max())
    if not difference <= tolerance:
        raise ArtifactError(
            f"the hooked {model.name} differs from the plain model by up to {difference:.3g} in its logits (allowed"
            f" {tolerance:.3g}); is an edit active, or is this architecture new to TransformerBridge?"
        )
    return difference


def located(name: str, *, progress: Callable[[str], None] | None = None) -> str:
    """The directory of a model as an absolute path, that of the demo model included, or ``name`` itself for the hub.

    Raises:
        ConfigError: an empty name.
        AssetError: a path that is not there.
        ArtifactError: a directory without a model.
    """
    if name in DEMO_NAMES:
        return str(demo_model_dir(progress=progress))
    if not name:
        raise ConfigError(f"the model's name is empty; give {DEMO_NAMES[0]!r}, a directory or a hub name")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ArtifactError(f"{path} holds no config.json; give a directory in the Hugging Face layout")
        return str(path.resolve())
    if path.is_file():
        raise AssetError(f"{path} is a file, not a model; give the directory that holds config.json and the weights")
    # a hub id is "name" or "owner/name" and never begins like a path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else "check the path"
        raise AssetError(f"there is no directory {path}; {hint}")
    return name


def checked_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device {device!r} is unknown; {nearest(device, ['cpu', 'cuda', 'cuda:0'])}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch sees no CUDA device here; use --device cpu")
    return device


def _checked_dtype(dtype: str | torch.dtype | None, config: Any, device: str) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown; {nearest(dtype, DTYPES)}")
        return DTYPES[dtype]
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.float32
        if dtype == torch.float16 and device == "cpu":
            return torch.float32
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")
    return dtype


def _hub_is_reachable() -> bool:
    """One quick look, through the proxy if one is set; the hub client itself would retry for half a minute a file."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # which class depends on the HTTP library that the installed hub client uses
        _log.info("the Hugging Face hub does not answer (%s); using what its cache holds", error)
        return False
    return True


@contextlib.contextmanager
def _offline_if_unreachable(source: str) -> Iterator[None]:
    """Work from the Hugging Face cache when ``source`` is a hub id and the hub does not answer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not Path(source).is_dir() and not _hub_is_reachable():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _explained(name: str, source: str) -> Iterator[None]:
    """One sentence for what goes wrong while a model is loaded; anything unforeseen passes as it is."""
    try:
        yield
    except SaelabError:
        raise
    except Exception as error:
        known = _hub_error(name, error) if not Path(source).is_dir() else None
        sentence = known or _file_error(name, error)
        if sentence is None:
            raise
        raise sentence from error


def _hub_error(name: str, error: Exception) -> AssetError | None:
    from huggingface_hub import errors as hub

    def has(*classes: type[BaseException]) -> bool:
        return any(isinstance(cause, classes) for cause in _chain(error))

    if has(hub.GatedRepoError):  # before its parent class, RepositoryNotFoundError
        return AssetError(f"{name} is gated on the Hugging Face hub; accept its terms there and run: hf auth login")
    if has(hub.RepositoryNotFoundError, hub.HFValidationError):
        hint = nearest(name, DEMO_NAMES)
        return AssetError(f"there is neither a directory nor a public model {name} on the Hugging Face hub; {hint}")
    if has(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError):
        return AssetError(
            f"{name} is no directory, and the Hugging Face hub cannot be reached to look for it; connect to the"
            f" network, put the model's files into a directory and give that, or take the built-in {DEMO_NAMES[0]!r}"
        )
    return None


def _file_error(name: str, error: Exception) -> SaelabError | None:
    from safetensors import SafetensorError

    text = str(error)
    foreign = ("trust_remote_code", "nsupported architecture", "ould not determine", "not recognize this arch")
    if any(clue in text for clue in foreign):
        return ConfigError(f"{name} has an architecture that TransformerBridge does not read; use another model")
    if "ignore_mismatched_sizes" in text:
        return ArtifactError(f"the weights of {name} have other shapes than its config.json says; get the model again")
    if isinstance(error, (OSError, ValueError, KeyError, SafetensorError)):
        reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        return ArtifactError(f"{name} cannot be loaded ({reason}); check that its directory is complete")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
