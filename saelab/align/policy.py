"""The model that is trained and the frozen one it is compared with: full weights, or a LoRA adapter beside them."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saelab import dist
from saelab.align.encoding import Batch, Codec, Encoded, collate
from saelab.align.parallel import shard_layers_, whole_state
from saelab.errors import ArtifactError, ConfigError
from saelab.models.load import DTYPES, checked_device, located
from saelab.models.quiet import quiet_loading


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A, with B = 0 at the start."""

    rank: int = 8
    """Rank of the change of each matrix."""
    alpha: float = 16.0
    """Scale of the change: alpha / rank times B A."""
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")
    """Names of the matrices that get one."""
    layers: tuple[int, ...] | None = None
    """Layers that get one. Off: all."""
    seed: int = 0
    """Seed of A, which starts random."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}; 8 is usual")
        if not self.targets:
            raise ConfigError('lora.targets is empty, so there is nothing to train; name some, such as "down_proj"')


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Which model to start from and what of it to train."""

    model: str = "demo"
    """Hub name, directory, or "demo"; or the directory of an earlier alignment run."""
    dtype: str = "bfloat16"
    """Precision of the frozen weights; what is trained is kept in float32."""
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    """The adapter. Off: all weights are trained, and a frozen copy is the reference."""
    chat: bool = True
    """Plain prompts are a user's turn and go through the chat template."""
    context: int = 512
    """Longest sequence of prompt and answer, in tokens."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if self.context < 2:
            raise ConfigError(f"context must hold a prompt and an answer, got {self.context}; 512 is usual")


class Policy:
    """A causal language model to train, with its reference and its tokens."""

    def __init__(self, model: Any, codec: Codec, *, name: str) -> None:
        self.model = model
        self.codec = codec
        self.name = name
        self._frozen: Any = None

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained rather than all weights."""
        return hasattr(self.model, "disable_adapter")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def collate(self, sequences: Sequence[Encoded]) -> Batch:
        """Sequences as one batch on the model's device."""
        return collate(sequences, pad_id=self.codec.pad_id).to(self.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def keep_reference(self) -> None:
        """Remember the weights as they are now as the reference's; with an adapter there is nothing to do.

        Call it before a step, or a checkpoint, changes them.
        """
        if not self.adapted and self._frozen is None:
            self._frozen = copy.deepcopy(self.model).eval().requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The model as it was before training, without gradients.

        With an adapter it is the same weights with the adapter off; else the copy of ``keep_reference``, which the
        first use makes where nobody has.
        """
        with torch.no_grad():
            if self.adapted:
                with self.model.disable_adapter():
                    yield self.model
            else:
                self.keep_reference()
                yield self._frozen

    def shard_(self, mesh: dist.Mesh) -> None:
        """Spread the layers of the model, and of its reference, over the processes.

        Raises:
            ConfigError: an adapter is trained rather than all weights.
        """
        self.keep_reference()  # a spread model cannot be copied
        for model in (self.model, self._frozen):
            shard_layers_(model, mesh)

    def save(self, path: Path, mesh: dist.Mesh = dist.ONE_PROCESS) -> None:
        """Write the model in the layout of Hugging Face, or the adapter in that of PEFT, with its tokenizer.

        Every process of ``mesh`` calls it, and the first writes.
        """
        state = whole_state(self.model)

        def write() -> None:
            self.model.save_pretrained(path, safe_serialization=True, state_dict=state)
            self.codec.tokenizer.save_pretrained(path)

        dist.on_first(mesh, write)


def load_policy(config: PolicyConfig, *, device: str | None = None, trainable: bool = True) -> Policy:
    """The model of ``config``, ready to be trained: dropout off, the adapter at zero change.

    A directory that holds an adapter is loaded with its base model, the adapter merged into the weights, so that a
    second training starts from where the first ended.

    Raises:
        AssetError, ArtifactError, ConfigError: as ``load_model``; or a target that the model does not have.
    """
    from transformers import AutoModelForCausalLM

    device = checked_device(device)
    codec = load_codec(config)
    adapter = _adapter_in(config.model)
    base = located(_base_of(adapter) if adapter else config.model)
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=_weights_dtype(config))
        if adapter:
            model = _merged(model, adapter)
    model.config.use_cache = False
    model = model.to(device).eval()
    if trainable and config.lora is not None:
        model = with_adapter(model, config.lora)
    elif not trainable:
        model.requires_grad_(False)
    return Policy(model, codec, name=config.model)


def n_layers_of(model: str) -> int:
    """Layers of the model of this name, read from its config alone.

    Raises:
        AssetError, ArtifactError, ConfigError: as ``load_policy``.
    """
    from transformers import AutoConfig

    adapter = _adapter_in(model)
    return int(AutoConfig.from_pretrained(located(_base_of(adapter) if adapter else model)).num_hidden_layers)


def load_codec(config: PolicyConfig) -> Codec:
    """The tokenizer of ``config``'s model, with which data can be checked before the model itself is loaded.

    Raises:
        AssetError, ArtifactError, ConfigError: as ``load_policy``.
    """
    from transformers import AutoConfig, AutoTokenizer

    adapter = _adapter_in(config.model)
    base = located(_base_of(adapter) if adapter else config.model)
    with quiet_loading():
        longest = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", config.context)
        tokenizer = AutoTokenizer.from_pretrained(adapter or base)
    return Codec(tokenizer, context=min(config.context, longest), chat=config.chat)


def with_adapter(model: nn.Module, settings: LoraSettings) -> Any:
    """``model`` with a fresh adapter in float32 and everything else frozen.

    Raises:
        ConfigError: the model has no matrix of one of the names, or no such layer.
    """
    import peft

    modules = dict(model.named_modules())
    missing = [target for target in settings.targets if not any(name.split(".")[-1] == target for name in modules)]
    if missing:
        linear = sorted({name.split(".")[-1] for name, m in modules.items() if isinstance(m, nn.Linear)})
        raise ConfigError(f"lora.targets has {missing[0]!r}, but the model's matrices are {', '.join(linear)}")
    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    beyond = [layer for layer in settings.layers or () if n_layers is not None and not 0 <= layer < n_layers]
    if beyond:
        raise ConfigError(f"lora.layers has {beyond[0]}, but the model has layers 0 to {n_layers - 1}")  # type: ignore[operator]
    chosen = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(settings.targets),
        layers_to_transform=None if settings.layers is None else list(settings.layers),
        task_type="CAUSAL_LM",
    )
    with _quiet_peft(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        adapted = peft.get_peft_model(model, chosen)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _adapter_in(model: str) -> Path | None:
    return Path(model) if (Path(model) / "adapter_config.json").exists() else None


def _merged(model: Any, adapter: Path) -> Any:
    import peft

    with _quiet_peft():
        return peft.PeftModel.from_pretrained(model, os.fspath(adapter)).merge_and_unload()


def _base_of(adapter: Path) -> str:
    import json

    try:
        return str(json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{adapter}/adapter_config.json does not name its base model ({error})") from error


def _weights_dtype(config: PolicyConfig) -> torch.dtype:
    """All weights in float32 where they are trained: in bfloat16 small steps would be rounded away."""
    return DTYPES[config.dtype] if config.lora is not None else torch.float32


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT asks transformers for an attribute under a name that is on its way out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
