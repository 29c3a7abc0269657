"""Model and SAE, loaded in the background and shared by all sessions; two texts written at the same time.

Model hooks are shared too: what one session steers would steer the others. Everything that edits therefore holds the
model's lock, and only for one token at a time, so that nobody waits for another's whole text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import streamlit as st

import saelab as sl
from saelab import rundir
from saelab.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


class Live(NamedTuple):
    model: sl.Model
    sae: sl.SAE


def load(sae_path: Path) -> Live:
    """The SAE at ``sae_path`` and the model that it was trained on.

    Raises:
        ArtifactError: the SAE does not say which model it belongs to, or the weights are others than it was trained on.
        AssetError: the model cannot be found.
    """
    sae = sl.load_sae(sae_path)
    if not sae.metadata.model_name:
        raise ArtifactError(
            f"{sae_path} does not name the model it was trained on; add model_name to the metadata in its cfg.json"
        )
    model = sl.load_model(sae.metadata.model_name)
    trained_on = sae.metadata.model_sha256
    if trained_on and trained_on != model.weights_sha256:
        raise ArtifactError(
            f"{sae_path} was trained on other weights than those of {model.name}; put the model it was trained on back"
        )
    return Live(model, sae.to(model.device).eval())


def started(sae_path: Path) -> Future[Live]:
    """The loading of model and SAE, begun by the first page that needs them, while its reader is still typing."""
    return _started(str(sae_path), rundir.fingerprint(sae_path))


@st.cache_resource(show_spinner=False, max_entries=2)
def _started(path: str, fingerprint: str) -> Future[Live]:
    future: Future[Live] = Future()

    def work() -> None:
        try:
            future.set_result(load(Path(path)))
        except BaseException as error:  # it belongs to whoever waits for the result
            future.set_exception(error)

    Thread(target=work, daemon=True, name="load model").start()
    return future


def ready(sae_path: Path) -> Live:
    """Model and SAE, waiting for them in sight; a failed loading is forgotten, so that the next visit tries again."""
    future, slot, start = started(sae_path), st.empty(), time.monotonic()
    while not wait([future], timeout=0.15).done:
        # drawing something lets Streamlit stop this run when the reader goes to another page meanwhile
        slot.info(f"Loading the model… {time.monotonic() - start:.0f} s", icon=":material/hourglass_top:")
    slot.empty()
    try:
        return future.result()
    except Exception:
        _started.clear()
        raise


class Piece(NamedTuple):
    """A bit of one of several texts, and how far that text is."""

    side: int
    text: str
    """Of the piece alone."""
    n_pieces: int
    seconds: float
    """Spent on this text so far."""
    finished: bool


def in_turn(streams: Sequence[Iterator[str]]) -> Iterator[Piece]:
    """Draw one piece of each stream in turn until all are exhausted, so that the reader sees all of them grow."""
    n_pieces, seconds = [0] * len(streams), [0.0] * len(streams)
    open_sides = list(range(len(streams)))
    while open_sides:
        for side in list(open_sides):
            start = time.perf_counter()
            text = next(streams[side], None)
            seconds[side] += time.perf_counter() - start
            if text is None:
                open_sides.remove(side)
            else:
                n_pieces[side] += 1
            yield Piece(side, text or "", n_pieces[side], seconds[side], text is None)


def only_within(edit: Callable[[], AbstractContextManager[Any]], stream: Iterator[str]) -> Iterator[str]:
    """``stream`` with ``edit`` active while a piece is made, and not between pieces, when others use the model."""
    while True:
        with edit():
            piece = next(stream, None)
        if piece is None:
            return
        yield piece


def both_texts(live: Live, feature: int, strength: float, prompt: str, **options: Any) -> Iterator[Piece]:
    """The continuation of ``prompt`` without (side 0) and with (side 1) the feature, growing together."""
    target = live.sae.feature(feature)
    plain = live.model.stream(prompt, **options)
    steered = only_within(lambda: sl.steer(live.model, target, strength=strength), live.model.stream(prompt, **options))
    return in_turn([plain, steered])


def next_token_change(live: Live, feature: int, strength: float, prompt: str, *, n: int = 5) -> NextToken:
    """How steering changes what comes right after ``prompt``."""
    ids = live.model.to_tokens(prompt).ids
    clean = _next_logps(live, ids)
    with ExitStack() as stack:
        stack.enter_context(sl.steer(live.model, live.sae.feature(feature), strength=strength))
        steered = _next_logps(live, ids)
    kl = float((clean.exp() * (clean - steered)).sum())
    change = steered.exp() - clean.exp()
    risen = change.topk(n).indices.tolist()
    tokens = live.model.str_tokens(risen)
    return NextToken(
        kl,
        tuple((token, float(clean[i].exp()), float(steered[i].exp())) for token, i in zip(tokens, risen, strict=True)),
    )


class NextToken(NamedTuple):
    kl: float
    """KL(clean || steered) of the next-token distributions, in nats."""
    risen: tuple[tuple[str, float, float], ...]
    """Tokens whose probability rises most: (token, probability without, probability with)."""


def _next_logps(live: Live, ids: Tensor) -> Tensor:
    return live.model.logits(ids)[0, -1].log_softmax(-1)
