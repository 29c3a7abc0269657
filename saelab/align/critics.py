"""Who criticises, revises and judges: a local model, or any server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from saelab.align.encoding import Encoded
from saelab.align.logprob import completion_logps
from saelab.align.policy import Policy
from saelab.align.records import Message
from saelab.align.rollouts import RolloutSettings, sample
from saelab.errors import AssetError, ConfigError

Conversation = tuple[Message, ...]


@runtime_checkable
class Critic(Protocol):
    """Answers conversations, and says how probable each of some short answers is."""

    @property
    def name(self) -> str: ...

    def reply(self, conversations: Sequence[Conversation], *, max_new_tokens: int, seed: int) -> list[str]:
        """One answer to each conversation."""
        ...

    def log_probabilities(self, conversation: Conversation, options: Sequence[str]) -> list[float]:
        """Log-probability of each option as the beginning of the answer, in nats; at least one is finite."""
        ...


class LocalCritic:
    """A model in this process."""

    def __init__(self, policy: Policy, *, temperature: float = 0.7, batch_size: int = 8) -> None:
        self.policy = policy
        self.temperature = temperature
        self.batch_size = batch_size

    @property
    def name(self) -> str:
        return self.policy.name

    def reply(self, conversations: Sequence[Conversation], *, max_new_tokens: int, seed: int) -> list[str]:
        settings = RolloutSettings(max_new_tokens=max_new_tokens, temperature=self.temperature)
        room = self.policy.codec.context - max_new_tokens
        texts = []
        for start in range(0, len(conversations), self.batch_size):
            prompts = [self._within(c, room) for c in conversations[start : start + self.batch_size]]
            answers = sample(self.policy, prompts, settings, seed=seed + start)
            texts += [self.policy.codec.decode(answer.completion_ids).strip() for answer in answers]
        return texts

    def log_probabilities(self, conversation: Conversation, options: Sequence[str]) -> list[float]:
        codec = self.policy.codec
        prompt = self._within(conversation, codec.context - 8)
        encoded = []
        for option in options:
            ids = tuple(codec.tokenizer(option, add_special_tokens=False).input_ids)
            encoded.append(Encoded(prompt, ids, truncated=True))
        with torch.no_grad():
            batch = self.policy.collate(encoded)
            return completion_logps(self.policy.model, batch).sum().tolist()

    def _within(self, conversation: Conversation, room: int) -> tuple[int, ...]:
        ids = self.policy.codec.prompt_ids(conversation)
        if len(ids) > room:
            raise ConfigError(
                f"a conversation of the constitution has {len(ids)} tokens, and there is room for {room}; lower "
                "max_new_tokens or the number of rounds, or raise policy.context"
            )
        return ids


class ServerCritic:
    """A server with /chat/completions, such as vLLM or llama.cpp.

    Raises (when asked):
        AssetError: it does not answer, answers with an error, or its answer is not of the protocol.
    """

    def __init__(self, url: str, model: str, *, api_key: str | None = None, temperature: float = 0.7) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the server's address must begin with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        self.model = model
        self.api_key = api_key
        self.temperature = temperature

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def reply(self, conversations: Sequence[Conversation], *, max_new_tokens: int, seed: int) -> list[str]:
        texts = []
        for row, conversation in enumerate(conversations):
            choice = self._asked(conversation, max_tokens=max_new_tokens, temperature=self.temperature, seed=seed + row)
            texts.append(str(choice["message"]["content"]).strip())
        return texts

    def log_probabilities(self, conversation: Conversation, options: Sequence[str]) -> list[float]:
        choice = self._asked(conversation, max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=20)
        try:
            likely = {
                entry["token"].strip(): float(entry["logprob"])
                for entry in choice["logprobs"]["content"][0]["top_logprobs"]
            }
        except (KeyError, IndexError, TypeError, AttributeError):
            raise AssetError(
                f"{self.url} returns no log-probabilities; use a server that supports top_logprobs"
            ) from None
        found = [likely.get(option.strip(), -math.inf) for option in options]
        if max(found) == -math.inf:
            raise AssetError(
                f"{self.name} gives none of {', '.join(options)} among its likeliest answers; use a model that follows "
                "instructions"
            )
        return found

    def _asked(self, conversation: Conversation, **options: Any) -> dict[str, Any]:
        body = {"model": self.model, "messages": [message._asdict() for message in conversation], **options}
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["choices"][0]
        except urllib.error.HTTPError as error:
            reason = error.read(300).decode(errors="replace").strip()
            raise AssetError(f"{self.url} answers with error {error.code} ({reason}); check model and key") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise AssetError(f"{self.url} does not answer ({error}); is the server running?") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise AssetError(f"{self.url} does not speak the protocol of /chat/completions ({error})") from error
