"""The demo's text, byte-level tokenizer and Hugging Face directory.

The text is Python's own help (`pydoc_data.topics`), half a megabyte that every Python installation has. A token is a
byte, and its id the byte's value; 256 ends a document. So the tokenizer needs no training, and perplexity is per byte.
Three topics are held back. They share less than 2 % of their text with the others (some topics of Python's help are
parts of others, so a random choice would not do).
"""

import pydoc_data.topics
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

END_OF_TEXT = 256
CONTEXT = 128
HELD_BACK_TOPICS = ("calls", "strings", "typesmapping")


def training_tokens() -> torch.Tensor:
    """The tokens of all topics that are not held back, int64 `[tokens]`; every topic ends with `END_OF_TEXT`."""
    return _tokens(topics(held_back=False))


def held_back_windows(count: int = 64) -> torch.Tensor:
    """`count` windows spread over the held-back topics, `[count, CONTEXT + 1]`: inputs and, shifted by one, targets."""
    tokens = _tokens(topics(held_back=True))
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    if len(windows) < count:
        raise ValueError(f"asked for {count} held-back windows; Python's help gives {len(windows)}")
    return windows[:: len(windows) // count][:count]


def write_hf_model(directory: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer of the tiny Qwen3 model; no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
        vocab_size=272,  # 257 tokens, padded
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.08,  # about hidden_size ** -0.5: a short training gets much further than with 0.02
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )
    config.save_pretrained(directory)
    GenerationConfig(eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT, do_sample=False).save_pretrained(directory)
    _byte_tokenizer().save_pretrained(directory)


def topics(*, held_back: bool) -> list[str]:
    """The texts of the three topics that are held back, or of all others."""
    return [text for name, text in sorted(pydoc_data.topics.topics.items()) if (name in HELD_BACK_TOPICS) is held_back]


def _tokens(texts: list[str]) -> torch.Tensor:
    return torch.tensor([token for text in texts for token in (*text.encode(), END_OF_TEXT)])


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with a token for each byte, whose id is the byte's value, and the end of text."""
    bytes_to_characters = _byte_level_alphabet()
    vocabulary = {character: byte for byte, character in enumerate(bytes_to_characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _byte_level_alphabet() -> list[str]:
    """The characters by which byte-level tokenizers write the bytes 0 to 255 (GPT-2's `bytes_to_unicode`).

    Visible bytes stand for themselves, the others are numbered upwards from U+0100.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    characters = [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
    assert set(characters) == set(ByteLevel.alphabet())
    return characters
