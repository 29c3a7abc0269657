"""Loading without the libraries' own progress bars and repeated warnings; saelab reports its own progress."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MISSING = re.compile(r"^(\S+) +\| MISSING", re.MULTILINE)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of transformers and no retry messages of the hub within the block; errors still come through."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    retries = logging.getLogger("huggingface_hub.utils._http")
    level = retries.level
    transformers_logging.disable_progress_bar()
    retries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retries.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def missing_weights() -> Iterator[list[str]]:
    """The parameters that a model loaded within the block found no values for, and so were left random.

    transformers mentions them in a warning only, and the bridge hands no loading report on, so that warning is read
    (and not shown).
    """
    logger = logging.getLogger("transformers.modeling_utils")
    missing: list[str] = []

    def read(record: logging.LogRecord) -> bool:
        message = _ANSI.sub("", record.getMessage())
        missing.extend(_MISSING.findall(message))
        return "LOAD REPORT" not in message

    level = logger.level
    logger.addFilter(read)
    logger.setLevel(logging.WARNING)
    try:
        yield missing
    finally:
        logger.setLevel(level)
        logger.removeFilter(read)


@contextlib.contextmanager
def no_stray_bars() -> Iterator[None]:
    """Swallow stderr: the GGUF reader draws its bar with plain tqdm, which the setting above does not reach."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
