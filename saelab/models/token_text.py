"""What each token adds to the text, as bytes: a character may be spread over several tokens."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Any, n_tokens: int) -> list[bytes]:
    """The bytes of tokens 0 to ``n_tokens - 1``; ids that the tokenizer does not use give ``b""``.

    Byte-level BPE writes each byte as one printable character (see `byte_alphabet`); SentencePiece writes a space as
    a lower block, and bytes that it has no piece for as ``<0xE2>``. Special tokens are their own text.
    """
    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(n_tokens, len(tokenizer)))))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of_piece = _byte_level if "ByteLevel" in repr(getattr(backend, "decoder", "")) else _sentencepiece
    table = [added[i] if i in added else of_piece(piece or "") for i, piece in enumerate(pieces)]
    return table + [b""] * (n_tokens - len(table))


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE vocabularies.

    Bytes that print as Latin-1 characters stand for themselves, the others are moved up to U+0100 and above in their
    order. Source: GPT-2 (Radford et al. 2019), whose vocabulary file began the custom.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


def visible(data: bytes) -> str:
    """Text of one token; bytes that are no whole character are written as ``\\xe2``."""
    return data.decode(errors="backslashreplace")


def text_pieces(parts: Iterable[bytes]) -> Iterator[str]:
    """The bytes of tokens as text, as they come: an unfinished character is held back until it is whole.

    Bytes that cannot become a character, in the middle or at the end, are U+FFFD, as in ``bytes.decode("replace")``.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for part in parts:
        if text := decoder.decode(part):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


_BYTE_OF = byte_alphabet()


def _byte_level(piece: str) -> bytes:
    # a character outside the alphabet belongs to a token added by hand, which is plain text
    return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else piece.encode()


def _sentencepiece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()
