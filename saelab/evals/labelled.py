"""Labelled texts as tasks for sparse probes: as many of each class, half to train and half to test."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from saelab.errors import TextError
from saelab.interp.labelled_files import LabelledFile, read_rows


class Labelled(NamedTuple):
    """A part of a data set with as many texts of each class as of any other."""

    name: str
    texts: list[str]
    labels: list[str]


class Task(NamedTuple):
    """One class against the others: as many texts of it as of all others together, cut into two halves to train and to
    test."""

    name: str
    train: Int[np.ndarray, " n"]  # numbers of texts
    test: Int[np.ndarray, " m"]
    positive: frozenset[int]


def read(file: LabelledFile, *, max_texts: int, max_classes: int, seed: int) -> Labelled:
    """At most ``max_texts`` texts of the ``max_classes`` most frequent classes, as many of each, chosen by ``seed``.

    Raises:
        TextError: no such file, not readable, no such field, an entry without text or label, or fewer than two classes
            with at least 4 texts.
    """
    texts, labels, _ = read_rows(file)
    frequent = [label for label, count in Counter(labels).most_common(max_classes) if count >= 4]
    if len(frequent) < 2:
        raise TextError(
            f"{file.path} has fewer than two values of {file.label!r} with at least 4 texts, so there is nothing to "
            f"tell apart; name the field of the class with :label=FIELD"
        )
    counts = Counter(labels)
    n_each = min(max_texts // len(frequent), *(counts[label] for label in frequent))
    if n_each < 4:
        raise TextError(
            f"{max_texts} texts are fewer than 4 of each of {len(frequent)} classes of {file.path}; raise probing.texts"
        )
    rng = np.random.default_rng(seed)
    of_class = {label: np.array([i for i, found in enumerate(labels) if found == label]) for label in sorted(frequent)}
    chosen = np.concatenate([rng.permutation(numbers)[:n_each] for numbers in of_class.values()])
    return Labelled(file.name, [texts[i] for i in chosen], [labels[i] for i in chosen])


def tasks(data: Labelled, *, seed: int) -> list[Task]:
    """Each class against the others; of two classes one task, for the second of them in alphabetical order."""
    classes = sorted(set(data.labels))
    rng = np.random.default_rng(seed)
    made = []
    for positive_class in classes if len(classes) > 2 else classes[1:]:
        is_positive = np.array([label == positive_class for label in data.labels])
        positive, others = (rng.permutation(np.flatnonzero(side)) for side in (is_positive, ~is_positive))
        n = min(len(positive), len(others))
        half = n // 2
        name = data.name if len(classes) == 2 else f"{data.name}: {positive_class}"
        made.append(
            Task(
                name,
                np.concatenate([positive[:half], others[:half]]),
                np.concatenate([positive[half:n], others[half:n]]),
                frozenset(positive.tolist()),
            )
        )
    return made
