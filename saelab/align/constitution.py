"""Constitutional AI: a model criticises and revises its own answers and judges between them, by written principles.

Bai et al. 2022, arXiv 2212.08073. First stage: answers, rounds of critique and revision, and a set for SFT. Second
stage: two answers to each prompt, a preference from the probabilities of "A" and "B" with the order swapped and
averaged, and a set of pairs for DPO or a reward model. Every step is written down with the principle it used, and the
cases in which the judge is least sure, or a rule disagrees with it, wait for a person.
"""

from __future__ import annotations

import json
import math
import random
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saelab import atomic
from saelab.align.critics import Conversation, Critic
from saelab.align.records import Message
from saelab.errors import ConfigError, TextError

Progress = Callable[[int, int, str], None]


class Principle(NamedTuple):
    name: str
    critique: str
    revision: str
    preference: str
    """Completes "the answer that ..."."""


@dataclass(frozen=True, kw_only=True)
class ConstitutionSettings:
    principles: str | None = None
    """TOML file with [[principle]] tables of name, critique, revision and preference. Off: the one that ships."""
    rounds: int = 1
    """Rounds of critique and revision, each by a principle drawn anew."""
    max_new_tokens: int = 96
    """Longest answer, critique and revision, in tokens."""
    seed: int = 0
    """Seed of the principles drawn and of what is sampled."""

    def __post_init__(self) -> None:
        for name in ("rounds", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")


class Round(NamedTuple):
    principle: str
    critique: str
    revision: str


class Revised(NamedTuple):
    """An answer and what became of it."""

    prompt: str
    answer: str
    rounds: tuple[Round, ...]

    @property
    def final(self) -> str:
        return self.rounds[-1].revision if self.rounds else self.answer


class Judged(NamedTuple):
    """Two answers and which the judge prefers."""

    prompt: str
    first: str
    second: str
    principle: str
    probability: float
    """That the first is the better one, the mean over both orders."""
    order_gap: float
    """How far the two orders disagree: the part of the judgement that was mere position."""

    @property
    def confidence(self) -> float:
        return max(self.probability, 1 - self.probability)


def read_constitution(path: str | Path | None) -> list[Principle]:
    """The principles of a TOML file, or those that ship with saelab.

    Raises:
        ConfigError: no such file, not TOML, or a principle lacks a part.
    """
    try:
        if path is None:
            text = (resources.files("saelab.align") / "constitution.toml").read_text("utf-8")
        else:
            text = Path(path).read_text("utf-8")
        tables = tomllib.loads(text).get("principle", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the constitution {path} is not readable ({error}); give a TOML file") from error
    principles = []
    for number, table in enumerate(tables, start=1):
        missing = [name for name in Principle._fields if not isinstance(table.get(name), str) or not table[name]]
        extra = sorted(set(table) - set(Principle._fields))
        if missing or extra:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(extra)}, which it does not know"
            raise ConfigError(f"principle {number} of {path or 'the constitution'} {wrong}; see the one that ships")
        principles.append(Principle(**table))
    if not principles:
        raise ConfigError(f"the constitution {path} has no [[principle]]; write at least one")
    return principles


def revise(
    critic: Critic,
    prompts: Sequence[str],
    principles: Sequence[Principle],
    settings: ConstitutionSettings,
    *,
    progress: Progress | None = None,
) -> list[Revised]:
    """Answers to ``prompts``, each criticised and revised ``rounds`` times."""
    rng = random.Random(settings.seed)
    questions = [(Message("user", prompt),) for prompt in prompts]
    n_calls, done = 1 + 2 * settings.rounds, 0

    def asked(conversations: Sequence[Conversation], what: str) -> list[str]:
        nonlocal done
        texts = critic.reply(conversations, max_new_tokens=settings.max_new_tokens, seed=settings.seed + 10_007 * done)
        done += 1
        if progress:
            progress(done, n_calls, what)
        return [text or "(nothing)" for text in texts]

    current = asked(questions, "answers")
    results = [Revised(prompt, answer, ()) for prompt, answer in zip(prompts, current, strict=True)]
    for number in range(settings.rounds):
        drawn = [rng.choice(principles) for _ in prompts]
        requests = [_critique_request(*case) for case in zip(prompts, current, drawn, strict=True)]
        critiques = asked(requests, f"critiques of round {number + 1}")
        requests = [
            (*request, Message("assistant", critique), Message("user", _revision_words(principle)))
            for request, critique, principle in zip(requests, critiques, drawn, strict=True)
        ]
        current = asked(requests, f"revisions of round {number + 1}")
        results = [
            result._replace(rounds=(*result.rounds, Round(principle.name, critique, revision)))
            for result, principle, critique, revision in zip(results, drawn, critiques, current, strict=True)
        ]
    return results


def judge(
    critic: Critic,
    cases: Sequence[tuple[str, str, str]],
    principles: Sequence[Principle],
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[Judged]:
    """Which of two answers is better, for each (prompt, first, second), by a principle drawn for each.

    p = softmax over the log-probabilities of "A" and "B"; it is asked in both orders, and the mean taken, so that a
    fondness for one letter cancels.
    """
    rng, judged = random.Random(seed), []
    for number, (prompt, first, second) in enumerate(cases):
        principle = rng.choice(principles)
        as_asked = _probability_of_a(critic, prompt, first, second, principle)
        swapped = 1 - _probability_of_a(critic, prompt, second, first, principle)
        gap = abs(as_asked - swapped)
        judged.append(Judged(prompt, first, second, principle.name, (as_asked + swapped) / 2, gap))
        if progress:
            progress(number + 1, len(cases), "pairs judged")
    return judged


#: Says what is better about two answers without a model: above 0 the first, below 0 the second, 0 cannot tell.
RuleCheck = Callable[[str, str, str], float]


class Review(NamedTuple):
    """A case for a person."""

    id: int
    """Its place among the judged pairs."""
    why: Literal["unsure", "rule disagrees", "order decides"]
    case: Judged


def review_queue(judged: Sequence[Judged], *, n: int, rule: RuleCheck | None = None) -> list[Review]:
    """The ``n`` cases that most need a person: where a rule disagrees, the order decides, or the judge is unsure."""
    reviews = []
    for number, case in enumerate(judged):
        verdict = rule(case.prompt, case.first, case.second) if rule else 0.0
        why: Literal["unsure", "rule disagrees", "order decides"] = "unsure"
        if verdict and (verdict > 0) != (case.probability > 0.5):
            why = "rule disagrees"
        elif case.order_gap > 2 * abs(case.probability - 0.5):
            why = "order decides"
        reviews.append(Review(number, why, case))
    rank = {"rule disagrees": 0, "order decides": 1, "unsure": 2}
    return sorted(reviews, key=lambda review: (rank[review.why], review.case.confidence, review.id))[:n]


def apply_corrections(judged: Sequence[Judged], corrections: dict[int, str]) -> list[Judged]:
    """The pairs with a person's decisions in place: "first", "second", or "drop" by the number of the case.

    Raises:
        TextError: a decision about no case, or none of the three.
    """
    for number, decision in corrections.items():
        if not 0 <= number < len(judged):
            raise TextError(f"there is a decision about case {number}, but cases are 0 to {len(judged) - 1}")
        if decision not in ("first", "second", "drop"):
            raise TextError(f'the decision about case {number} is {decision!r}; write "first", "second" or "drop"')
    certain = {"first": 1.0, "second": 0.0}
    return [
        case._replace(probability=certain[corrections[number]], order_gap=0.0) if number in corrections else case
        for number, case in enumerate(judged)
        if corrections.get(number) != "drop"
    ]


def preference_rows(judged: Sequence[Judged], *, min_confidence: float = 0.5) -> list[dict[str, Any]]:
    """Records for preference training, the better answer chosen; equal answers and doubtful ones left out."""
    rows = []
    for case in judged:
        if case.first == case.second or case.confidence < min_confidence or case.probability == 0.5:
            continue
        chosen, rejected = (case.first, case.second) if case.probability > 0.5 else (case.second, case.first)
        row = {"prompt": case.prompt, "chosen": chosen, "rejected": rejected}
        rows.append({**row, "probability": case.confidence, "principle": case.principle})
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSONL, whole or not at all."""
    atomic.write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _critique_request(prompt: str, answer: str, principle: Principle) -> Conversation:
    return (
        Message("user", f'Someone asked: "{prompt}"\n\nThe answer was: "{answer}"\n\n{principle.critique} Be brief.'),
    )


def _revision_words(principle: Principle) -> str:
    return f"{principle.revision} Write only the new answer."


def _probability_of_a(critic: Critic, prompt: str, a: str, b: str, principle: Principle) -> float:
    question = (
        f'Someone asked: "{prompt}"\n\nAnswer A: "{a}"\n\nAnswer B: "{b}"\n\nWhich answer {principle.preference}? '
        "Reply with the letter A or B only."
    )
    first, second = critic.log_probabilities((Message("user", question),), ("A", "B"))
    return 1 / (1 + math.exp(min(700.0, second - first)))
