"""Feature absorption on first letters: a feature "begins with S" that stays silent on some words with S, because a
feature of that word does its work.

A logistic probe p finds the direction of each letter. For a word of the letter, feature i contributes

    c_i = feature_acts_i * (W_dec_i . p) / |p|        of the word's projection        P = (acts - b_dec) . p / |p|

and with M the sum of c over the letter's main features and A the sum of the three largest positive c of other features
whose cosine with p is at least 0.1:

    full        no main feature is active, the largest c has cosine >= 0.025, and it is >= 0.4 P
    fraction    0 if M >= P or A < 0.4 P;  1 if M <= 0;  else a / (a + M) with a = min(A, P - M)

over the words that the probe recognises. Main features are the letter's split set: of the features whose mean differs
most between the letter's words and the others, as many as raise the F1 of a sparse probe by 0.03 each. Sources: Chanin
et al. 2024, arXiv 2409.14507; the fraction and the thresholds are those of SAEBench (Karvonen et al. 2025, arXiv
2503.09532, section 4.3). Here P is measured from b_dec, which all words share, so that it does not depend on where the
activations are centred.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saelab.errors import ConfigError
from saelab.evals.piece import Piece, Score
from saelab.evals.probing import dense_probe, f1, outcomes
from saelab.interp.linear_fits import largest_differences, logistic_fit
from saelab.models.load import Model
from saelab.models.tokens import right_padded
from saelab.sae.base import SAE
from saelab.stats import Interval, bootstrap_mean, ratio

Progress = Callable[[int, int, str], None]

_WORD = re.compile(r" [a-z]{3,}")


@dataclass(frozen=True, kw_only=True)
class AbsorptionConfig:
    """First-letter absorption."""

    words: int = 4000
    """Words of one token, at most; two thirds of them train the probes, the others are scored."""
    examples: int = 2
    """Spelled words before the one in question."""
    min_words: int = 10
    """Letters with fewer words to train on are left out; at least 4, for the cross-validation."""
    min_f1: float = 0.6
    """Letters whose probe is worse than this on the test words are left out."""
    min_letters: int = 5
    """With fewer letters left there is no score. SAEBench asks for 20, and for models that can spell."""
    f1_jump: float = 0.03
    """A feature joins the split set if it raises the F1 of the sparse probe by so much."""
    max_split: int = 10
    """Features in a split set, at most."""

    def __post_init__(self) -> None:
        for name in ("words", "min_words", "min_letters", "max_split"):
            if getattr(self, name) < 1:
                raise ConfigError(f"absorption.{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.min_words < 4:
            raise ConfigError(f"absorption.min_words must be at least 4, got {self.min_words}; 10 is usual")
        if self.examples < 0:
            raise ConfigError(f"absorption.examples must not be negative, got {self.examples}; 3 is usual")


class Absorption(NamedTuple):
    """By word."""

    full: Bool[np.ndarray, " words"]
    fraction: Float[np.ndarray, " words"]


def absorption(
    acts: Float[np.ndarray, "words d"],
    feature_acts: Float[np.ndarray, "words d_sae"],
    W_dec: Float[np.ndarray, "d_sae d"],
    b_dec: Float[np.ndarray, " d"],
    probe: Float[np.ndarray, " d"],
    main: Int[np.ndarray, " n"],
    *,
    full_cosine: float = 0.025,
    fraction_cosine: float = 0.1,
    min_share: float = 0.4,
    n_absorbers: int = 3,
) -> Absorption:
    """How much of each word's letter is absorbed; the formulas stand at the head of the file."""
    along = W_dec @ (probe / np.linalg.norm(probe))
    cosine = along / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    projection = (acts - b_dec) @ probe / np.linalg.norm(probe)
    parts = feature_acts * along
    of_main = parts[:, main].sum(1)

    largest = parts.argmax(1)
    rows = np.arange(len(acts))
    silent = (feature_acts[:, main] == 0).all(1)
    full = silent & (cosine[largest] >= full_cosine) & (parts[rows, largest] >= min_share * projection)
    full &= projection > 0

    others = np.where(cosine >= fraction_cosine, np.maximum(parts, 0), 0)
    others[:, main] = 0
    top = min(n_absorbers, others.shape[1])
    absorbed = -np.partition(-others, top - 1, axis=1)[:, :top].sum(1)
    part = np.minimum(absorbed, projection - of_main)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(of_main <= 0, 1.0, part / (part + of_main))
    none = (projection <= 0) | (of_main >= projection) | (absorbed < min_share * projection)
    return Absorption(full, np.where(none, 0.0, fraction))


class Split(NamedTuple):
    """The features that stand for a letter, and how well a sparse probe reads the letter off 1, 2, ... of them."""

    features: Int[np.ndarray, " n"]
    f1_of_k: list[float]


def split_set(
    train: Float[np.ndarray, "words d_sae"],
    is_letter: Bool[np.ndarray, " words"],
    test: Float[np.ndarray, "others d_sae"],
    test_is_letter: Bool[np.ndarray, " others"],
    *,
    f1_jump: float,
    max_split: int,
) -> Split:
    """The smallest set such that one more feature would raise the F1 by less than ``f1_jump``."""
    ranked = largest_differences(train, is_letter, max_split)
    f1_of_k: list[float] = []
    for k in range(1, len(ranked) + 1):
        probe = logistic_fit(train[:, ranked[:k]], is_letter)
        says = probe.says(test[:, ranked[:k]])
        f1_of_k.append(float(f1(outcomes(says, test_is_letter).sum(0, keepdims=True))[0]))
        if k > 1 and f1_of_k[-1] - f1_of_k[-2] < f1_jump:
            return Split(ranked[: k - 1], f1_of_k)
    return Split(ranked, f1_of_k)


def first_letters(
    sae: SAE, model: Model, config: AbsorptionConfig, *, draws: int, seed: int, progress: Progress | None = None
) -> Piece:
    """Absorption and splitting over all letters that the model's activations tell apart.

    Means over words, then over letters; the intervals resample each letter's words.
    """
    words = single_token_words(model)
    rng = np.random.default_rng(seed)
    chosen = [words[i] for i in rng.permutation(len(words))[: config.words]]
    if len(chosen) < 4:
        return Piece(name="absorption", skipped=f"{model.name} has {len(chosen)} words of one token, too few to probe")
    acts, feature_acts = _on_words(sae, model, chosen, words, config, rng, progress)
    letters = np.array([word.text[1] for word in chosen])
    is_train = np.arange(len(chosen)) < len(chosen) * 2 // 3
    W_dec, b_dec = sae.W_dec.detach().float().cpu().numpy(), sae.b_dec.detach().float().cpu().numpy()

    words_of, splits, full, fraction = [], [], [], []
    left_out: list[str] = []
    for letter in sorted(set(letters)):
        of_letter = letters == letter
        if of_letter[is_train].sum() < config.min_words or not of_letter[~is_train].any():
            left_out.append(letter)
            continue
        probe = dense_probe(acts[is_train], of_letter[is_train])
        says = probe.says(acts[~is_train])
        quality = f1(outcomes(says, of_letter[~is_train]).sum(0, keepdims=True))[0]
        recognised = np.flatnonzero(~is_train)[says & of_letter[~is_train]]
        if quality < config.min_f1 or not len(recognised):
            left_out.append(letter)
            continue
        split = split_set(
            feature_acts[is_train],
            of_letter[is_train],
            feature_acts[~is_train],
            of_letter[~is_train],
            f1_jump=config.f1_jump,
            max_split=config.max_split,
        )
        found = absorption(acts[recognised], feature_acts[recognised], W_dec, b_dec, probe.direction, split.features)
        words_of.append(len(recognised))
        splits.append(split)
        full.append(found.full)
        fraction.append(found.fraction)
    if len(splits) < config.min_letters:
        return Piece(
            name="absorption",
            skipped=f"the first letter of a word can be read off the activations for {len(splits)} letters only "
            f"(probe F1 of at least {config.min_f1}), and absorption.min_letters is {config.min_letters}",
        )

    def over_letters(values: Sequence[np.ndarray]) -> Interval:
        return bootstrap_mean(ratio, [_counted(v) for v in values], draws=draws, seed=seed)

    n_words = sum(words_of)
    sizes, first = np.array([len(s.features) for s in splits]), np.array([s.f1_of_k[0] for s in splits])
    scores = (
        Score("absorption_full", "", over_letters(full), n_words, "words"),
        Score("absorption_fraction", "", over_letters(fraction), n_words, "words"),
        Score(
            "split_features",
            "",
            bootstrap_mean(ratio, [_counted(sizes)], draws=draws, seed=seed),
            len(sizes),
            "letters",
        ),
        Score(
            "probe_f1",
            "first letter, k = 1",
            bootstrap_mean(ratio, [_counted(first)], draws=draws, seed=seed),
            len(first),
            "letters",
        ),
    )
    notes = [
        f"{len(splits)} letters; left out, for too few words or a probe worse than {config.min_f1}: "
        f"{', '.join(left_out) or 'none'}."
    ]
    if (size := sum(p.numel() for p in model.bridge.parameters())) < 1e9 or sae.d_sae < 16_000:
        notes.append(
            f"Absorption is established for models of a billion parameters and 16,000 features and more; this is "
            f"{size / 1e6:.0f} million and {sae.d_sae:,}, and an SAE trained too little scores falsely low."
        )
    return Piece(name="absorption", scores=scores, notes=tuple(notes))


class Word(NamedTuple):
    token: int
    text: str  # with its leading space


def single_token_words(model: Model) -> list[Word]:
    """Words of three or more plain letters that are one token, a space before them."""
    texts = model.str_tokens(list(range(model.d_vocab)))
    return [Word(token, text) for token, text in enumerate(texts) if _WORD.fullmatch(text)]


@torch.inference_mode()
def _on_words(
    sae: SAE,
    model: Model,
    words: Sequence[Word],
    pool: Sequence[Word],
    config: AbsorptionConfig,
    rng: np.random.Generator,
    progress: Progress | None,
    batch_words: int = 32,
) -> tuple[Float[np.ndarray, "words d_in"], Float[np.ndarray, "words d_sae"]]:
    """Activations and feature activations at each word, which stands behind a few words that are spelled."""
    hook_name = sae.metadata.hook_name
    acts, feature_acts = [], []
    for start in range(0, len(words), batch_words):
        rows = []
        for word in words[start : start + batch_words]:
            others = [pool[i] for i in rng.choice(len(pool), config.examples + 1, replace=False)]
            examples = [other for other in others if other != word][: config.examples]
            spelled = "".join(f"{w.text} has the first letter: {w.text[1].upper()}\n" for w in examples)
            rows.append([model.bos_id, *model.encode(spelled), word.token])
        ids, mask = right_padded(rows, pad_id=model.pad_id)
        last = mask.sum(1) - 1
        seen = model.capture(ids, [hook_name], mask)[hook_name].float()
        at_word = seen[torch.arange(len(rows)), last.to(seen.device)]
        acts.append(at_word.cpu())
        feature_acts.append(sae.encode(at_word).float().cpu())
        if progress:
            progress(min(start + batch_words, len(words)), len(words), "words")
    return torch.cat(acts).numpy(), torch.cat(feature_acts).numpy()


def _counted(values: np.ndarray) -> Float[np.ndarray, "clusters 2"]:
    return np.column_stack([values, np.ones(len(values))]).astype(float)
