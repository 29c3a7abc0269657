"""A seeded model small enough for tests: a Llama with random weights and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab import atomic
from saelab.errors import ArtifactError
from saelab.models.quiet import quiet_loading
from saelab.models.token_text import byte_alphabet

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

#: Words that are single tokens; everything else is spelled in shorter ones or in bytes.
WORDS = (
    "the of and to in is was for on as with by that it at from his her an are were which this be or had not have but "
    "one also their has its first she they who two new been when other time year after more would city world people "
    "tower river king music light water house small great long old river's sea war north south island language book"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}" + BOS + "{{ message['role'] }}\n{{ message['content'] }}" + EOS + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + BOS + "assistant\n{% endif %}"
)


def write_tiny_model(
    path: Path, *, seed: int = 0, n_layers: int = 3, d_model: int = 32, n_heads: int = 2, context: int = 256
) -> Path:
    """Write a random Llama in the Hugging Face layout to ``path``; the same seed gives the same bytes.

    Its weights are larger than a fresh model's, so that texts and edits make a difference that tests can see.

    Raises:
        ArtifactError: ``path`` already holds something.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if path.exists() and any(path.iterdir()):
        raise ArtifactError(f"{path} already holds something; choose an empty directory")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=max(1, n_heads // 2),
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they begin at 1, which would hide a forgotten gain
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with quiet_loading(), atomic.replacing_directory(path) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return path


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 256 bytes, the words of `WORDS` and three special tokens: any text, losslessly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    vocab = {token: i for i, token in enumerate((PAD, BOS, EOS))}
    for byte in range(256):
        vocab[letters[byte]] = len(vocab)
    merges = []
    for word in WORDS.split():
        spelled = [letters[byte] for byte in f" {word}".encode()]
        for end in range(1, len(spelled)):
            pair = ("".join(spelled[:end]), spelled[end])
            if "".join(pair) not in vocab:  # a prefix that an earlier word shares
                vocab["".join(pair)] = len(vocab)
                merges.append(pair)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )
