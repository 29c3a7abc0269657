"""Small tokenizers made on the spot: one of words, and one of byte pairs whose tokens merge across boundaries."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *string.ascii_lowercase]


def words(*, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each letter of the alphabet; ids 0 to 3 are pad, BOS, EOS and unknown."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def byte_pairs(*, chat_template: str | None = CHAT, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from a few lines, with special tokens for turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["the weather in the north is the same as the weather there", "hello there, how are you this evening?"] * 5
    special = ["<|end|>", "<|start|>", "<|other|>"]
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos)
    fast.chat_template = chat_template
    return fast
