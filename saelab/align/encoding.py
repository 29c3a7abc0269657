"""From records to tokens: prompt and completion apart, with the same ids in training as in sampling.

Encoding the two together would let tokens merge across the boundary, and then the model is trained on another prompt
than it will see. Masks are made from lengths, never from ids: a pad token may be the EOS token, and EOS may stand in a
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelab.align.records import Demonstration, Fault, Labelled, Preference, Prompt, Question, Reading
from saelab.errors import ConfigError, TextError


class Encoded(NamedTuple):
    """One prompt with one completion."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Ends with EOS, unless the context cut it."""
    truncated: bool

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences padded on the right. ``n_prompt`` and ``n_total`` alone say what is what."""

    ids: Int[Tensor, "batch seq"]
    n_prompt: Int[Tensor, " batch"]
    n_total: Int[Tensor, " batch"]

    @property
    def attention_mask(self) -> Bool[Tensor, "batch seq"]:
        return self._places < self.n_total[:, None]

    @property
    def completion_mask(self) -> Bool[Tensor, "batch seq"]:
        """True at the tokens of the completion, EOS included."""
        return self.attention_mask & (self._places >= self.n_prompt[:, None])

    @property
    def n_completion(self) -> Int[Tensor, " batch"]:
        return self.n_total - self.n_prompt

    def to(self, device: str | torch.device) -> Batch:
        return Batch(ids=self.ids.to(device), n_prompt=self.n_prompt.to(device), n_total=self.n_total.to(device))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _places(self) -> Int[Tensor, " seq"]:
        return torch.arange(self.ids.shape[1], device=self.ids.device)


def collate(sequences: Sequence[Encoded], *, pad_id: int) -> Batch:
    """A batch of these sequences, as wide as the longest."""
    width = max(sequence.n_tokens for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: sequence.n_tokens] = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
    n_prompt = torch.tensor([len(sequence.prompt_ids) for sequence in sequences])
    return Batch(ids=ids, n_prompt=n_prompt, n_total=torch.tensor([sequence.n_tokens for sequence in sequences]))


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Sequences end to end in rows of limited width, so that little is padding."""

    ids: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    """Place of a token in its own sequence. It starts anew at each, which is how a model tells them apart."""
    owner: Int[Tensor, "rows width"]
    """Which sequence a token of a completion belongs to; -1 for prompts and padding."""
    n_sequences: int

    def to(self, device: str | torch.device) -> PackedBatch:
        moved = {name: getattr(self, name).to(device) for name in ("ids", "positions", "owner")}
        return PackedBatch(**moved, n_sequences=self.n_sequences)


def pack(sequences: Sequence[Encoded], *, width: int, pad_id: int) -> PackedBatch:
    """These sequences, each whole, in as few rows of at most ``width`` tokens as first fit, longest first, needs.

    Raises:
        TextError: a sequence is longer than ``width``.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -sequences[i].n_tokens):
        length = sequences[i].n_tokens
        if length > width:
            raise TextError(f"a sequence of {length} tokens does not fit into a row of {width}; raise policy.context")
        fits = next((r for r, left in enumerate(room) if left >= length), len(rows))
        if fits == len(rows):
            rows.append([])
            room.append(width)
        rows[fits].append(i)
        room[fits] -= length
    shape = (len(rows), width - min(room))
    ids, positions = torch.full(shape, pad_id, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    owner = torch.full(shape, -1, dtype=torch.int64)
    for r, members in enumerate(rows):
        start = 0
        for i in members:
            sequence, end = sequences[i], start + sequences[i].n_tokens
            ids[r, start:end] = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
            positions[r, start:end] = torch.arange(end - start)
            owner[r, start + len(sequence.prompt_ids) : end] = i
            start = end
    return PackedBatch(ids=ids, positions=positions, owner=owner, n_sequences=len(sequences))


class Codec:
    """Encodes for one tokenizer and context length. Conversations go through its chat template.

    Raises:
        ConfigError: no EOS token, or a template whose prompt is not the beginning of what it renders with the answer.
    """

    def __init__(self, tokenizer: Any, *, context: int, chat: bool = False) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.chat = chat
        """Whether a plain prompt is the turn of a user rather than text to continue."""
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS token, so no answer could end; set one")
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        if chat or tokenizer.chat_template:
            self._check_template()

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens before an answer: BOS once, where there is one, and the opening of the assistant's turn."""
        if isinstance(prompt, str) and not self.chat:
            return self._with_bos(self._ids(prompt))
        return self._with_bos(self._ids(self._rendered(prompt)))

    def completion_ids(self, completion: str) -> tuple[int, ...]:
        """The tokens of an answer and EOS, once."""
        ids = self._ids(completion)
        while ids and ids[-1] == self.eos_id:
            ids.pop()
        return (*ids, self.eos_id)

    def encode(self, prompt: Prompt, completion: str) -> Encoded:
        """A prompt and its answer; an answer that does not fit loses its end, and with it EOS.

        Raises:
            TextError: the prompt alone fills the context.
        """
        prompt_ids, completion_ids = self.prompt_ids(prompt), self.completion_ids(completion)
        room = self.context - len(prompt_ids)
        if room < 1:
            raise TextError(f"the prompt has {len(prompt_ids)} tokens, and the context is {self.context}; shorten it")
        if not prompt_ids:
            raise TextError("the prompt is empty and there is no BOS, so the first token of the answer follows nothing")
        return Encoded(prompt_ids, completion_ids[:room], truncated=len(completion_ids) > room)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without EOS."""
        return self.tokenizer.decode([i for i in ids if i != self.eos_id], skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _with_bos(self, ids: list[int]) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        wants_bos = bos is not None and bos in self.tokenizer("").input_ids
        return (bos, *ids) if wants_bos and ids[:1] != [bos] else tuple(ids)

    def _rendered(self, prompt: Prompt) -> str:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [m._asdict() for m in prompt]
        if not self.tokenizer.chat_template:
            # models without a template get the plainest form of a conversation
            return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in turns) + "Assistant:"
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _check_template(self) -> None:
        if not self.tokenizer.chat_template:
            return
        answer = "An answer."
        turns = [{"role": "user", "content": "A question?"}]
        prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer}], tokenize=False, add_generation_prompt=False
        )
        if not whole.startswith(prompt + answer):
            raise ConfigError(
                f"the chat template does not put the answer behind the prompt it samples from ({prompt!r} is not how "
                f"{whole!r} begins), so training and sampling would see different tokens; use another template"
            )
        ending = self._ids(whole.removeprefix(prompt + answer))
        if ending[:1] != [self.eos_id]:
            raise ConfigError(
                f"the chat template ends a turn with {self.tokenizer.decode(ending[:1])!r}, but the EOS token is "
                f"{self.tokenizer.eos_token!r}, so sampling would not stop there; set the EOS token to it"
            )


class EncodedPair(NamedTuple):
    chosen: Encoded
    rejected: Encoded


@dataclass(frozen=True)
class LengthReport:
    """How long what was encoded is, in tokens, and how much of it the context cut."""

    prompt: tuple[int, int, int]
    """Median, 95 % quantile and maximum."""
    completion: tuple[int, int, int]
    n_sequences: int
    n_truncated: int

    @classmethod
    def of(cls, sequences: Sequence[Encoded]) -> LengthReport:
        def spread(lengths: list[int]) -> tuple[int, int, int]:
            median, high, largest = np.quantile(lengths, [0.5, 0.95, 1.0], method="higher")
            return int(median), int(high), int(largest)

        return cls(
            spread([len(s.prompt_ids) for s in sequences]),
            spread([len(s.completion_ids) for s in sequences]),
            len(sequences),
            sum(s.truncated for s in sequences),
        )

    def __str__(self) -> str:
        def words(name: str, spread: tuple[int, int, int]) -> str:
            return f"{name} {spread[0]} tokens (95 %: {spread[1]}, longest {spread[2]})"

        cut = f", {self.n_truncated} cut by the context" if self.n_truncated else ""
        parts = [words("prompt", self.prompt)]
        if self.completion[2]:  # questions have no answer yet
            parts.append(words("answer", self.completion))
        return f"{self.n_sequences} sequences: {', '.join(parts)}{cut}"


def encode_pairs(reading: Reading[Preference], codec: Codec) -> Reading[EncodedPair]:
    """Both answers of each record; a prompt longer than the context becomes a fault of its line."""
    return _encoded(
        reading, lambda r: EncodedPair(codec.encode(r.prompt, r.chosen), codec.encode(r.prompt, r.rejected))
    )


def encode_completions(reading: Reading[Demonstration] | Reading[Labelled], codec: Codec) -> Reading[Encoded]:
    """The answer of each record, likewise."""
    return _encoded(reading, lambda r: codec.encode(r.prompt, r.completion))


def encode_questions(reading: Reading[Question], codec: Codec, *, n_new_tokens: int) -> Reading[tuple[int, ...]]:
    """The prompt of each record; one that leaves no room for ``n_new_tokens`` becomes a fault of its line."""

    def encoded(record: Question) -> tuple[int, ...]:
        ids = codec.prompt_ids(record.prompt)
        if not ids or len(ids) + n_new_tokens > codec.context:
            raise TextError(f"the prompt has {len(ids)} tokens, which leaves no room for {n_new_tokens} new ones")
        return ids

    return _encoded(reading, encoded)


def _encoded(reading: Any, encode: Any) -> Any:
    items, lines, faults = [], [], list(reading.faults)
    for line, record in zip(reading.lines, reading.records, strict=True):
        try:
            items.append(encode(record))
            lines.append(line)
        except TextError as error:
            faults.append(Fault(line, str(error)))
    return Reading(reading.source, items, lines, sorted(faults))
