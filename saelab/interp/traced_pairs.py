"""Pairs of texts with their answers, from a file: what attribution is measured on over many texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from saelab.errors import TextError
from saelab.interp.attribution import DEFAULT_STEPS, attribute
from saelab.interp.faithfulness import COUNTS, Recovery, recovery
from saelab.interp.patch_metrics import Metric, logit_difference, one_token
from saelab.models.load import Model
from saelab.sae.base import SAE

Progress = Callable[[int, int, str], None]


class TracedPair(NamedTuple):
    """Two texts of as many tokens, each with the one token that should follow it."""

    clean: str
    corrupt: str
    answer: str  # of the clean text, with its space: " Paris"
    wrong: str  # of the corrupt one

    def metric(self, model: Model) -> Metric:
        """Logit of the answer minus that of the wrong one after the last token.

        Raises:
            TextError: an answer that is not one token.
            ConfigError: both are the same token.
        """
        return logit_difference(one_token(model, self.answer), one_token(model, self.wrong))


def read_pairs(path: Path) -> list[TracedPair]:
    """The pairs of a JSONL file with the fields clean, corrupt, answer and wrong, one object a line.

    Raises:
        TextError: no such file, not JSONL, no pairs, or a line with other fields.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as text ({error}); give a JSONL file of pairs") from error
    pairs = [_pair(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise TextError(f"{path} holds no pairs; write one JSON object a line, with {', '.join(TracedPair._fields)}")
    return pairs


def recoveries(
    model: Model,
    sae: SAE,
    pairs: Sequence[TracedPair],
    *,
    counts: Sequence[int] = COUNTS,
    draws: int = 8,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Recovery]:
    """What the features of each clean text recover, the corrupt text being the baseline.

    Raises:
        TextError: texts that are no pair, or an answer that is not one token.
        ConfigError: see `recovery`.
    """
    found = []
    for number, pair in enumerate(pairs):
        metric = pair.metric(model)
        attributed = attribute(model, sae, pair.clean, metric, corrupt=pair.corrupt, steps=steps)
        found.append(recovery(model, sae, attributed, metric, counts=counts, draws=draws, seed=seed + number))
        if progress:
            progress(number + 1, len(pairs), "pairs")
    return found


def _pair(path: Path, number: int, line: str) -> TracedPair:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{path} line {number} is not JSON ({error.msg}); correct it") from error
    fields = TracedPair._fields
    if not isinstance(entry, dict) or set(entry) != set(fields) or not all(isinstance(v, str) for v in entry.values()):
        raise TextError(f"{path} line {number} must be an object of the texts {', '.join(fields)}; correct it")
    return TracedPair(**entry)
