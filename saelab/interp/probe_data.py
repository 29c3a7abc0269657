"""What a probe is trained and tested on: texts of two classes, in groups that are never split between the two.

Texts that share a template, a scenario or an entity are not independent: a probe that has seen one of them is tested on
something that it knows. So both halves, and the folds within the first, take whole groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saelab.errors import ConfigError, TextError, nearest
from saelab.interp.labelled_files import LabelledFile, read_rows
from saelab.interp.linear_fits import Fold

#: Fewer texts of a class, or groups, in either half, and an interval would say nothing.
MIN_TEXTS, MIN_GROUPS = 10, 4

#: Folds of the training half on which penalties and layers are chosen.
N_FOLDS = 4

_COPIES = (
    "nothing named a group, so a text's group is the text itself without case, punctuation and spaces: copies stay "
    "together, texts of one template do not"
)


@dataclass(frozen=True, kw_only=True)
class ProbeSource:
    """Where a probe's texts come from, and which of them belong together."""

    file: LabelledFile
    """The file, and its fields of text and label."""
    where: dict[str, str] = field(default_factory=dict)
    """Only entries whose fields have these values."""
    group: str | None = None
    """The field that says which texts belong together (a template, a scenario)."""
    group_pattern: str | None = None
    """Instead: a regular expression whose match, or first bracket, says so."""
    positive: str | None = None
    """The label to tell from all others; of two labels by default the second in alphabetical order."""
    texts: int = 1000
    """Texts to take, at most, in whole groups chosen by the seed."""

    def __post_init__(self) -> None:
        if self.texts < 1:
            raise ConfigError(f"texts must be at least 1, got {self.texts}; 1000 is usual")
        if self.group is not None and self.group_pattern is not None:
            raise ConfigError("group and group_pattern both say which texts belong together; leave one of them out")
        if self.group_pattern is not None:
            try:
                re.compile(self.group_pattern)
            except re.error as error:
                raise ConfigError(
                    f"group_pattern {self.group_pattern!r} is no regular expression ({error}); correct it"
                ) from error


@dataclass(frozen=True, eq=False)
class ProbeTexts:
    """Texts of two classes, in groups."""

    name: str
    texts: list[str]
    positive: Bool[np.ndarray, " texts"]
    groups: Int[np.ndarray, " texts"]
    classes: tuple[str, str]
    """The labels of the other and of the positive texts."""
    grouped_by: str
    """A sentence for reports: what put texts into one group."""

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        labels: Sequence[object],
        *,
        groups: Sequence[object] | None = None,
        positive: object | None = None,
        name: str = "texts",
    ) -> ProbeTexts:
        """Texts from a list; ``groups`` names what each belongs to (without it only copies of a text stay together).

        Raises:
            TextError: lists of different lengths, no two labels, or more than two and none of them named as positive.
        """
        keys = list(map(normalised, texts)) if groups is None else list(map(str, groups))
        if not len(texts) == len(labels) == len(keys):
            raise TextError(
                f"{len(texts)} texts have {len(labels)} labels and {len(keys)} groups; give one of each for each text"
            )
        spelled = list(map(str, labels))
        classes = _classes(spelled, None if positive is None else str(positive), name)
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return cls(
            name,
            list(texts),
            np.array([label == classes[1] for label in spelled], dtype=bool),
            np.array([numbers[key] for key in keys], dtype=np.int64),
            classes,
            _COPIES if groups is None else "groups as given",
        )

    @property
    def n_groups(self) -> int:
        return len(np.unique(self.groups))

    def some(self, n_texts: int, *, seed: int) -> ProbeTexts:
        """Whole groups, drawn by ``seed``, of not more than ``n_texts`` texts together."""
        if len(self.texts) <= n_texts:
            return self
        members = Counter(self.groups.tolist())
        chosen: set[int] = set()
        room = n_texts
        for group in np.random.default_rng(seed).permutation(sorted(members)):
            if members[int(group)] <= room:
                chosen.add(int(group))
                room -= members[int(group)]
        keep = np.flatnonzero(np.isin(self.groups, sorted(chosen)))
        texts = [self.texts[i] for i in keep]
        return replace(self, texts=texts, positive=self.positive[keep], groups=self.groups[keep])


def read_probe_texts(source: ProbeSource, *, seed: int = 0) -> ProbeTexts:
    """The texts of a file.

    Raises:
        TextError: see `labelled_files.read_rows`; or no entry fits ``where``, a text has no group, or there are not two
            labels.
    """
    named = [*source.where, *([source.group] if source.group else [])]
    rows = read_rows(source.file, fields=named)
    keep = [i for i in range(len(rows.texts)) if all(rows.fields[f][i] == v for f, v in source.where.items())]
    if not keep:
        for name, value in source.where.items():
            if value not in rows.fields[name]:
                known = set(rows.fields[name])
                raise TextError(f"{source.file.path} has no entry whose {name!r} is {value!r}; {nearest(value, known)}")
        raise TextError(f"{source.file.path} has no entry with {source.where} all at once; ask for less")
    texts = [rows.texts[i] for i in keep]
    groups: list[str] | None = None
    grouped_by = _COPIES
    if source.group is not None:
        groups = [rows.fields[source.group][i] for i in keep]
        grouped_by = f"a text's group is its field {source.group!r}"
    elif source.group_pattern is not None:
        groups = [_found(source.group_pattern, text) for text in texts]
        grouped_by = f"a text's group is what {source.group_pattern!r} finds in it"
    name = "/".join([source.file.name, *source.where.values()])
    data = ProbeTexts.of(texts, [rows.labels[i] for i in keep], groups=groups, positive=source.positive, name=name)
    return replace(data, grouped_by=grouped_by).some(source.texts, seed=seed)


def normalised(text: str) -> str:
    """A text's letters and digits in lower case: equal for copies that differ in case, punctuation and spaces."""
    return "".join(re.findall(r"\w", text.casefold()))


class Halves(NamedTuple):
    """Which texts train and which test, and the folds of the first; no group is in two of these."""

    train: Int[np.ndarray, " n"]
    test: Int[np.ndarray, " m"]
    folds: list[Fold]  # positions within ``train``


def halves(data: ProbeTexts, *, seed: int) -> Halves:
    """Half of the groups to train and half to test, each with about the same share of positive texts.

    Raises:
        TextError: too few texts of a class, or too few groups, in one of them.
    """
    _check_enough(data.positive, data.groups, data.name, "in all", factor=2)
    train, test = _group_folds(data.positive, data.groups, 2, seed=seed)[0]
    for part, what in ((train, "to train"), (test, "to test")):
        _check_enough(data.positive[part], data.groups[part], data.name, what, factor=1)
    positive, groups = data.positive[train], data.groups[train]
    folds = _group_folds(positive, groups, N_FOLDS, seed=seed)
    for fitted, held in folds:
        if not both_classes(positive[fitted]) or not both_classes(positive[held]):
            raise TextError(
                f"the classes of {data.name} lie in too few groups ({data.grouped_by}): a fold of the training texts "
                "has only one class; give more groups of each class"
            )
    return Halves(train, test, folds)


def both_classes(positive: Bool[np.ndarray, " rows"]) -> bool:
    return bool(positive.any() and not positive.all())


def _group_folds(
    positive: Bool[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"], n: int, *, seed: int
) -> list[Fold]:
    from sklearn.model_selection import StratifiedGroupKFold

    return list(StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(positive, positive, groups))


def _check_enough(
    positive: Bool[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"], name: str, what: str, *, factor: int
) -> None:
    fewest, n_groups = int(min(positive.sum(), (~positive).sum())), len(np.unique(groups))
    if fewest < factor * MIN_TEXTS or n_groups < factor * MIN_GROUPS:
        raise TextError(
            f"{name} has {fewest} texts of its rarer class in {n_groups} groups {what}, but needs "
            f"{factor * MIN_TEXTS} and {factor * MIN_GROUPS}; give more texts, or another field for the groups"
        )


def _classes(labels: Sequence[str], positive: str | None, name: str) -> tuple[str, str]:
    known = sorted(set(labels))
    if positive is not None:
        if positive not in known:
            raise TextError(f"{name} has no label {positive!r}; {nearest(positive, known)}")
        others = [label for label in known if label != positive]
        if not others:
            raise TextError(f"all texts of {name} have the label {positive!r}; there is nothing to tell it from")
        return (others[0] if len(others) == 1 else f"not {positive}", positive)
    if len(known) != 2:
        shown = ", ".join(known[:6])
        raise TextError(
            f"{name} has {len(known)} labels ({shown}), but a probe tells two apart; name the positive one of several"
        )
    return known[0], known[1]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise TextError(f"the group pattern {pattern!r} finds nothing in {text!r}; widen it, or drop that text")
    return match[1] if match.re.groups and match[1] is not None else match[0]
