"""A language model that can be read and edited at its hook points: the one wrapper around TransformerLens' bridge."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError, ShapeError, TextError, nearest
from saelab.models import token_text, weights
from saelab.models.generation import Sampling, new_tokens
from saelab.models.hooks import canonical_hook_name, layer_of
from saelab.models.tokens import Tokens, behind_first, right_padded

#: ``fn(acts [batch, seq, width], keep [batch, seq]) -> acts`` of the same shape; see `Model.edit`.
EditFn = Callable[[Tensor, Tensor], Tensor]

#: Length of the text that finds out which hooks there are; no model has so many heads, so no axis is mistaken for it.
_PROBE_TOKENS = 13

_UNEMBEDDING = ("unembed.hook_in", "hook_unembed")


class _Captured(Exception):
    """Everything asked for has been seen, so the rest of the forward pass is not needed."""


@dataclass(eq=False)
class Model:
    """A causal language model with its tokenizer. Made by `load_model`.

    One object may serve several threads: `lock` is held during a forward pass, and from the beginning to the end of
    an `edit`. A thread that generates without an edit therefore waits while another thread's edit is active.
    """

    name: str
    """The name it was asked for by."""
    path_or_id: str
    """Its directory, or its name on the Hugging Face hub."""
    bridge: Any = field(repr=False)
    """The TransformerBridge, for what this class does not offer; while an edit is active it refuses to be called."""
    tokenizer: Any = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    bos_id: int
    """The token that begins every text; its position is never edited."""
    eos_id: int
    pad_id: int
    lock: Any = field(default_factory=threading.RLock, repr=False)
    _keep: Tensor | None = field(default=None, repr=False)

    # --- what it is

    @property
    def d_model(self) -> int:
        return int(self.bridge.cfg.d_model)

    @property
    def n_layers(self) -> int:
        return int(self.bridge.cfg.n_layers)

    @property
    def d_vocab(self) -> int:
        return int(self.bridge.cfg.d_vocab)

    @property
    def context(self) -> int:
        """Longest text in tokens that the model takes."""
        return int(self.bridge.cfg.n_ctx)

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Hash that identifies the weights, whatever their directory is called."""
        return weights.fingerprint(Path(self.path_or_id), hub_id=self.path_or_id)

    @property
    def unembed(self) -> Float[Tensor, "d_model d_vocab"]:
        """W_U in float32: the logits are ``normed_resid @ unembed`` (plus a bias where the model has one)."""
        return self.bridge.W_U.detach().float()

    def final_norm_scale(self) -> Float[Tensor, " d_model"] | None:
        """Gain of the last norm before the unembedding in float32, or None for a model without such a norm.

        A direction ``v`` added to the residual stream moves the logits along ``(v * scale) @ unembed``, up to the
        norm's division. The gain is measured, because some architectures store it minus one.
        """
        norm = getattr(getattr(self.bridge, "ln_final", None), "original_component", None)
        if norm is None:
            return None
        signs = torch.ones(1, self.d_model, device=self.device)
        signs[:, 1::2] = -1  # mean 0 and root mean square 1, so that the norm divides by 1
        with torch.no_grad():
            norm = copy.deepcopy(norm).float()
            return ((norm(signs) - norm(-signs)) / 2 * signs)[0]

    # --- hook points

    def hook_names(self) -> list[str]:
        """Every hook point with one vector a token, in the order in which a forward pass meets them."""
        return list(self._widths)

    def check_hook(self, name: str) -> str:
        """The canonical spelling of a hook name.

        Raises:
            ConfigError: the model has no such hook, or its activations are not one vector a token.
        """
        known = canonical_hook_name(name)
        if known in self._widths:
            return known
        # a wrong layer or a wrong place in the right layer: look among the hooks of its own block first
        block = f"blocks.{layer_of(known)}."
        hint = nearest(known, [other for other in self._widths if other.startswith(block)] or self._widths)
        if known in self.bridge.hook_dict:
            raise ConfigError(f"the hook {name} of {self.name} gives no vector for each token; {hint}")
        raise ConfigError(f"{self.name} has no hook {name}; {hint}")

    def hook_width(self, name: str) -> int:
        """Length of a token's vector at the hook; heads are laid side by side, so ``hook_z`` has n_heads * d_head.

        Raises:
            ConfigError: see `check_hook`.
        """
        return self._widths[self.check_hook(name)]

    def active_hooks(self) -> list[str]:
        """Hook points at which something is attached now; empty outside `edit`."""
        return [canonical_hook_name(p.name) for p in self._points() if p._forward_hooks or p._backward_hooks]

    def _points(self) -> list[Any]:
        """The bridge's hook points, each once whatever its names."""
        return list({id(point): point for point in self.bridge.hook_dict.values()}.values())

    @functools.cached_property
    def _widths(self) -> dict[str, int]:
        """Width of each usable hook, found by a short forward pass: which hooks fire differs between architectures."""
        length = min(_PROBE_TOKENS, self.context)
        shapes: dict[str, torch.Size] = {}

        def note(point: Any, args: Any, acts: Any) -> None:
            if isinstance(acts, Tensor) and acts.is_floating_point() and acts.ndim >= 3:
                shapes[point.name] = acts.shape

        # plain torch hooks: the bridge's own refuse those points that are switched off, which here just never fire
        with self.lock, contextlib.ExitStack() as stack:
            for point in self._points():
                stack.callback(point.register_forward_hook(note).remove)
            self._forward(torch.full((2, length), self.bos_id))
        aliases: dict[str, str] = {}
        for alias, point in self.bridge.hook_dict.items():
            if canonical_hook_name(alias) == alias != point.name:
                aliases.setdefault(point.name, alias)
        return {
            canonical_hook_name(aliases.get(name, name)): shape[2:].numel()
            for name, shape in shapes.items()
            # the rotary embedding is handed the residual stream, but uses no more of it than its dtype
            if shape[:2] == (2, length) and not name.startswith("rotary_emb.")
        }

    # --- text

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, without BOS."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def to_tokens(self, text: str | Sequence[str], *, bos: bool = True) -> Tokens:
        """Token ids of one or several texts, padded on the right.

        With ``bos`` each row begins with BOS; a text that spells it out (a chat template may) does not get a second.

        Raises:
            TextError: there is no text, or without ``bos`` an empty one.
        """
        rows = [self.encode(t) for t in ([text] if isinstance(text, str) else text)]
        if bos:
            rows = [row if row[:1] == [self.bos_id] else [self.bos_id, *row] for row in rows]
        if not rows or not all(rows):
            raise TextError("there is no text to tokenize (an empty string or list); give at least one character")
        ids, mask = right_padded(rows, pad_id=self.pad_id)
        return Tokens(ids.to(self.device), mask.to(self.device))

    def str_tokens(self, ids: Sequence[int] | Int[Tensor, " seq"]) -> list[str]:
        """Each token's own text; bytes that are no whole character by themselves are written as ``\\xe2``."""
        return [token_text.visible(self._token_bytes[int(i)]) for i in ids]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the model's own template writes it, up to where the assistant's answer begins.

        ``messages`` are ``{"role": "user" | "assistant" | "system", "content": text}``.

        Raises:
            ConfigError: the tokenizer has no chat template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ConfigError(f"{self.name} has no chat template; give the prompt as plain text, or use a chat model")
        for message in messages:
            if not {"role", "content"} <= set(message):
                raise ConfigError(f"a chat message needs the keys role and content, got {sorted(message)}; add them")
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(f"the chat template of {self.name} refuses this ({error}); change it") from error

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        return token_text.token_bytes(self.tokenizer, self.d_vocab)

    # --- forward passes

    def logits(
        self,
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"] | None = None,
        *,
        with_gradients: bool = False,
    ) -> Float[Tensor, "batch seq d_vocab"]:
        """Next-token logits in float32, under whatever edits are active. ``mask`` is False on padding, on either side.

        ``with_gradients`` lets gradients reach what the edits put in; the weights get none.

        Raises:
            ShapeError: no tokens, more than the model's context, or ids outside the vocabulary.
        """
        return self._forward(ids, mask, with_gradients=with_gradients)[0].float()

    def capture(
        self, ids: Int[Tensor, "batch seq"], hook_names: Sequence[str], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> dict[str, Float[Tensor, "batch seq _"]]:
        """Activations [batch, seq, width] at each of ``hook_names``, keyed as asked for, in the model's dtype.

        The forward pass ends as soon as the last of them is seen. Active edits count. Heads are laid side by side.

        Raises:
            ConfigError: an unknown hook.
            ShapeError: see `logits`.
        """
        wanted = {self.check_hook(name) for name in hook_names}
        found: dict[str, Tensor] = {}

        def noting(name: str) -> Callable[[Tensor, Any], None]:
            def note(acts: Tensor, hook: Any) -> None:
                found[name] = acts.flatten(2).clone()
                if len(found) == len(wanted):
                    raise _Captured

            return note

        hooks = [(name, noting(name)) for name in wanted]
        with self.lock, self.bridge.hooks(fwd_hooks=hooks), contextlib.suppress(_Captured):
            self._forward(ids, mask)
        return {name: found[canonical_hook_name(name)] for name in hook_names}

    def _forward(
        self,
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch total"] | None = None,
        editable: Bool[Tensor, "batch seq"] | None = None,
        cache: Any = None,
        *,
        generating: bool = False,
        with_gradients: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits and the KV cache (None unless ``generating``); ``mask`` spans the cached tokens too."""
        ids = ids.to(self.device)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(self.device)
        if cache is None:
            self._check_tokens(ids, mask)
        options: dict[str, Any] = {"use_cache": generating, "past_key_values": cache}
        if not bool(mask.all()):  # without padding the unmasked path gives the same and is faster
            options["attention_mask"] = mask.long()
        if generating and self._takes_logits_to_keep:
            options["logits_to_keep"] = 1  # the unembedding would be most of the work on a long prompt
        with self.lock, torch.set_grad_enabled(with_gradients):
            self._keep = behind_first(mask) if editable is None else editable.to(self.device)
            try:
                return self.bridge(ids, return_type="logits_and_cache", **options)
            finally:
                self._keep = None

    def _check_tokens(self, ids: Tensor, mask: Tensor) -> None:
        if ids.ndim != 2 or ids.numel() == 0:
            raise ShapeError(f"token ids must be [batch, seq] with at least one token, got {tuple(ids.shape)}")
        if mask.shape != ids.shape:
            raise ShapeError(f"the mask has shape {tuple(mask.shape)} and the ids {tuple(ids.shape)}; make them equal")
        if ids.shape[1] > self.context:
            raise ShapeError(f"the text has {ids.shape[1]} tokens, but {self.name} takes {self.context}; shorten it")
        low, high = ids.aminmax()
        if low < 0 or high >= self.d_vocab:
            raise ShapeError(
                f"token ids go from {int(low)} to {int(high)}, but {self.name} has {self.d_vocab} tokens;"
                " was the text tokenized for another model?"
            )

    @functools.cached_property
    def _takes_logits_to_keep(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.bridge.original_model.forward).parameters

    # --- edits

    def edit(self, hook_name: str, fn: EditFn) -> contextlib.AbstractContextManager[Model]:
        """Let ``fn`` change the activations at a hook in every forward pass and generation within the block.

        ``fn(acts [batch, seq, width], keep [batch, seq])`` returns activations of the same shape; heads are laid side
        by side. ``keep`` is False at each text's first token (BOS) and at padding, and there the result is thrown away,
        so ``fn`` need not care. While generating, ``fn`` sees the prompt once and then one new position at a time.
        Edits nest: the outer one acts first. On the way out, also by an exception, every trace is removed.

        Raises:
            ConfigError: an unknown hook.
            ShapeError: within the block, when ``fn`` returns another shape.
        """
        return self.edits([(hook_name, fn)])

    @contextlib.contextmanager
    def edits(self, edits: Mapping[str, EditFn] | Sequence[tuple[str, EditFn]]) -> Iterator[Model]:
        """Several edits at once, at one hook or several; those at the same hook act in their order. See `edit`."""
        pairs = edits.items() if isinstance(edits, Mapping) else edits
        checked = [(self.check_hook(name), fn) for name, fn in pairs]
        with self.lock, contextlib.ExitStack() as stack:
            for name, fn in checked:
                hook_fn = self._editing(name, fn)
                if name.endswith("hook_resid_mid"):
                    hook_fn = self._carried_to_block_end(name, hook_fn, stack)
                stack.enter_context(self.bridge.hooks(fwd_hooks=[(name, hook_fn)]))
            yield self

    def _editing(self, name: str, fn: EditFn) -> Callable[[Tensor, Any], Tensor]:
        def hook_fn(acts: Tensor, hook: Any) -> Tensor:
            keep = self._keep
            if keep is not None and name in _UNEMBEDDING:
                keep = keep[:, -acts.shape[1] :]  # generation computes the logits of the last position only
            if keep is None or keep.shape != acts.shape[:2]:
                raise ConfigError(
                    f"an edit at {name} is active, but this forward pass did not come through saelab's Model, so the"
                    " positions to leave alone are not known; use its logits, capture or generate"
                )
            before = acts.flatten(2)
            after = fn(before.clone(), keep)  # a copy, so that an fn that works in place cannot reach BOS
            if after.shape != before.shape:
                raise ShapeError(f"the edit at {name} made {tuple(before.shape)} {tuple(after.shape)}; keep the shape")
            return torch.where(keep[..., None], after.to(acts), before).view(acts.shape)

        return hook_fn

    def _carried_to_block_end(
        self, name: str, hook_fn: Callable[[Tensor, Any], Tensor], stack: contextlib.ExitStack
    ) -> Callable[[Tensor, Any], Tensor]:
        """``hook_fn``, with the change it makes added to the block's output as well.

        The bridge shows resid_mid where the MLP reads it, beside which the residual stream passes by untouched; an
        edit there would only reach the MLP. Users mean the stream itself.
        """
        change: dict[str, Tensor] = {}

        def at_middle(acts: Tensor, hook: Any) -> Tensor:
            after = hook_fn(acts, hook)
            change["delta"] = after.float() - acts.float()
            return after

        def at_end(point: Any, args: Any, acts: Tensor) -> Tensor:
            return (acts.float() + change.pop("delta")).to(acts.dtype)

        end = self.bridge.hook_dict[name.replace("hook_resid_mid", "hook_resid_post")]
        stack.callback(end.register_forward_hook(at_end, prepend=True).remove)  # before any edit of resid_post
        return at_middle

    # --- generation

    def generate(
        self,
        prompt: str | Tokens,
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
    ) -> str:
        """The text that the model writes after ``prompt`` (without the prompt itself), under whatever edits are active.

        ``temperature`` 0 always takes the likeliest token, otherwise tokens are drawn with ``seed``; the same call
        gives the same text. Special tokens are not written out.

        Raises:
            ShapeError: ``prompt`` holds several rows, or prompt and new tokens exceed the model's context.
            ConfigError: impossible sampling settings, or an edit so strong that the logits are not numbers.
        """
        pieces = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_at_eos=stop_at_eos,
        )
        return "".join(pieces)

    def stream(
        self,
        prompt: str | Tokens,
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
    ) -> Iterator[str]:
        """The pieces of `generate` as they are written, each of whole characters; draw them within the edit's block.

        The lock is taken for each token anew, so a reader who pauses between two pieces keeps nobody waiting.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop_at_eos=stop_at_eos
        )
        tokens = self.to_tokens(prompt) if isinstance(prompt, str) else prompt
        if len(tokens.ids) != 1:
            raise ShapeError(f"generate writes one text, got {len(tokens.ids)} rows; use generate_batch for several")
        return token_text.text_pieces(
            self._written_bytes(token) for (token,) in self._new_tokens(tokens, sampling, seeds=[seed])
        )

    def generate_batch(
        self,
        prompts: Sequence[str] | Tokens,
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
    ) -> list[str]:
        """The texts that the model writes after each prompt; row i is ``generate(prompts[i], seed=seed + i)``."""
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop_at_eos=stop_at_eos
        )
        tokens = prompts if isinstance(prompts, Tokens) else self.to_tokens(prompts)
        texts = [b""] * len(tokens.ids)
        for chosen in self._new_tokens(tokens, sampling, seeds=[seed + i for i in range(len(texts))]):
            texts = [text + self._written_bytes(token) for text, token in zip(texts, chosen, strict=True)]
        return [text.decode(errors="replace") for text in texts]

    def _new_tokens(self, tokens: Tokens, sampling: Sampling, *, seeds: Sequence[int]) -> Iterator[list[int | None]]:
        if tokens.ids.shape[1] + sampling.max_new_tokens > self.context:
            raise ShapeError(
                f"{tokens.ids.shape[1]} tokens of prompt and {sampling.max_new_tokens} new ones exceed the"
                f" {self.context} that {self.name} takes; shorten the prompt or lower max_new_tokens"
            )
        forward = functools.partial(self._forward, generating=True)
        return new_tokens(forward, tokens, sampling, seeds=seeds, stop_ids=self._stop_ids)

    def _written_bytes(self, token: int | None) -> bytes:
        """What a generated token adds to the text: nothing for a special token and after the end."""
        return b"" if token is None or token in self._unwritten else self._token_bytes[token]

    @functools.cached_property
    def _unwritten(self) -> frozenset[int]:
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    @functools.cached_property
    def _stop_ids(self) -> frozenset[int]:
        """Tokens that end a text: EOS, and what the model's generation settings name besides."""
        settings = getattr(self.bridge.original_model, "generation_config", None)
        named = getattr(settings, "eos_token_id", None)
        return frozenset([self.eos_id, *(named if isinstance(named, list) else [] if named is None else [named])])
