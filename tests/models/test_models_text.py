"""Tokens and text: nothing lost, BOS once, chat as the template writes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.errors import ConfigError, TextError
from saelab.models.tiny import tiny_tokenizer
from saelab.models.token_text import byte_alphabet, text_pieces, token_bytes, visible

TOKENIZER = tiny_tokenizer()
TABLE = token_bytes(TOKENIZER, len(TOKENIZER))


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert b"".join(TABLE[i] for i in ids) == text.encode()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(3, len(TOKENIZER) - 1)))
def test_streamed_pieces_join_to_what_the_tokenizer_decodes(ids):
    pieces = list(text_pieces(TABLE[i] for i in ids))
    assert "".join(pieces) == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def test_an_unfinished_character_is_held_back():
    euro = "€".encode()
    assert list(text_pieces([b"a", euro[:1], euro[1:2], euro[2:], b"b"])) == ["a", "€", "b"]
    assert list(text_pieces([b"a", euro[:2]])) == ["a", "\ufffd"]
    assert list(text_pieces([])) == []


def test_the_byte_alphabet_is_one_printable_character_a_byte():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert all(letter.isprintable() and not letter.isspace() for letter in alphabet)


def test_sentencepiece_tokens_keep_their_space_and_their_bytes():
    class SentencePiece:
        def __init__(self):
            self.added_tokens_decoder = {}
            self.pieces = ["\u2581the", "re", "<0xE2>", "<0x0A>"]

        def __len__(self):
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[i] for i in ids]

    assert token_bytes(SentencePiece(), 6) == [b" the", b"re", b"\xe2", b"\n", b"", b""]


def test_token_strings_show_partial_bytes(tiny_model):
    tokens = tiny_model.to_tokens("the river é")
    assert tiny_model.str_tokens(tokens.ids[0]) == ["<bos>", "t", "h", "e", " river", " ", "\\xc3", "\\xa9"]
    assert visible(b" \xe2\x82\xac") == " €"


def test_rows_begin_with_bos_and_are_padded_on_the_right(tiny_model):
    ids, mask = tiny_model.to_tokens([" the river", ""])
    assert ids.tolist() == [[1, *tiny_model.encode(" the river")], [1, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert ids.dtype == torch.int64


def test_bos_is_not_doubled(tiny_model):
    assert tiny_model.to_tokens("<bos>the").ids.tolist() == tiny_model.to_tokens("the").ids.tolist()
    assert tiny_model.to_tokens("the", bos=False).ids[0].tolist() == tiny_model.encode("the")


@pytest.mark.parametrize(("text", "bos"), [("", False), ([], True), (["the", ""], False)])
def test_no_text_is_refused(tiny_model, text, bos):
    with pytest.raises(TextError, match="no text"):
        tiny_model.to_tokens(text, bos=bos)


def test_chat_is_what_the_template_writes(tiny_model):
    text = tiny_model.chat([{"role": "user", "content": "Hi"}])
    assert text == "<bos>user\nHi<eos>\n<bos>assistant\n"
    assert tiny_model.to_tokens(text).ids[0, :2].tolist() == [1, tiny_model.encode("u")[0]]


def test_a_model_without_a_chat_template_says_so(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        tiny_model.chat([{"role": "user", "content": "Hi"}])


def test_messages_that_the_template_refuses_are_reported(tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match="role and content"):
        tiny_model.chat([{"content": "Hi"}])
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="roles must alternate"):
        tiny_model.chat([{"role": "user", "content": "Hi"}])
