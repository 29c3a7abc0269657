"""A run of Constitutional AI on the disk: transcripts, sets to train on, and a queue for a person.

revisions.jsonl   every answer with its critiques, revisions and their principles
sft.jsonl         prompt and last revision, for ``saelab align sft``
judged.jsonl      answer against revision, with principle, probability and how far the two orders disagree
pairs.jsonl       prompt, chosen, rejected, for ``saelab align dpo`` or ``reward``
review.jsonl      the cases for a person, each with an empty decision to fill in
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saelab import atomic
from saelab.align.constitution import (
    ConstitutionSettings,
    Judged,
    Principle,
    Progress,
    Revised,
    Round,
    RuleCheck,
    apply_corrections,
    judge,
    preference_rows,
    review_queue,
    revise,
    write_rows,
)
from saelab.align.critics import Critic
from saelab.errors import ArtifactError, TextError
from saelab.rundir import StageWriter


class ConstitutionSummary(NamedTuple):
    n_prompts: int
    n_changed: int
    """Prompts whose last revision is another text than the answer."""
    n_pairs: int
    """Pairs with an answer that is preferred."""
    n_revision_preferred: int
    """Pairs in which the revision is preferred to the answer."""
    n_review: int


def run_constitution(
    critic: Critic,
    prompts: Sequence[str],
    principles: Sequence[Principle],
    run: StageWriter,
    *,
    settings: ConstitutionSettings,
    n_review: int = 20,
    rule: RuleCheck | None = None,
    progress: Progress | None = None,
) -> ConstitutionSummary:
    """Revise and judge; a stage that an earlier, interrupted run has written whole is read instead of done again."""
    revised = _read_revisions(run.path / "revisions.jsonl")
    if revised is None:
        revised = revise(critic, prompts, principles, settings, progress=progress)
        write_rows(run.path / "revisions.jsonl", (_revision_row(item) for item in revised))
    write_rows(run.path / "sft.jsonl", ({"prompt": item.prompt, "completion": item.final} for item in revised))
    judged = _read_judged(run.path / "judged.jsonl")
    if judged is None:
        cases = [(item.prompt, item.answer, item.final) for item in revised if item.answer != item.final]
        judged = judge(critic, cases, principles, seed=settings.seed, progress=progress)
        write_rows(run.path / "judged.jsonl", (case._asdict() for case in judged))
    reviews = review_queue(judged, n=n_review, rule=rule)
    write_rows(
        run.path / "review.jsonl",
        ({"id": r.id, "decision": "", "why": r.why, **r.case._asdict()} for r in reviews),
    )
    pairs = preference_rows(judged)
    write_rows(run.path / "pairs.jsonl", pairs)
    summary = ConstitutionSummary(
        n_prompts=len(revised),
        n_changed=len(judged),
        n_pairs=len(pairs),
        n_revision_preferred=sum(case.probability < 0.5 for case in judged),
        n_review=len(reviews),
    )
    atomic.write_json(run.path / "constitution.json", {"critic": critic.name, **summary._asdict()})
    run.finish()
    return summary


def apply_review(path: Path) -> int:
    """Put the decisions of review.jsonl into pairs.jsonl; returns how many there were.

    Raises:
        ArtifactError: ``path`` holds no such run.
        TextError: a decision is none of first, second and drop.
    """
    judged = _read_judged(path / "judged.jsonl")
    if judged is None:
        raise ArtifactError(f"{path} holds no judged pairs; give the directory that saelab align cai wrote")
    rows = _rows(path / "review.jsonl") or []
    try:
        corrections = {int(row["id"]): str(row["decision"]) for row in rows if row.get("decision")}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise TextError(f"{path / 'review.jsonl'} has a line without id or decision ({error}); correct it") from error
    write_rows(path / "pairs.jsonl", preference_rows(apply_corrections(judged, corrections)))
    return len(corrections)


def _revision_row(item: Revised) -> dict[str, Any]:
    return {"prompt": item.prompt, "answer": item.answer, "rounds": [r._asdict() for r in item.rounds]}


def _read_revisions(path: Path) -> list[Revised] | None:
    rows = _rows(path)
    if rows is None:
        return None
    return [Revised(row["prompt"], row["answer"], tuple(Round(**r) for r in row["rounds"])) for row in rows]


def _read_judged(path: Path) -> list[Judged] | None:
    rows = _rows(path)
    return None if rows is None else [Judged(**row) for row in rows]


def _rows(path: Path) -> list[dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise TextError(f"{path} has a line that is not JSON ({error}); correct it") from error
