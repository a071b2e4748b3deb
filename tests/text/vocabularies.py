"""Small vocabularies made on the spot, one of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. 12345 + 67 = 12412!\n\n\tindented  text",
    "Wie schön: naïve café, 你好,世界 🙂é — и ещё немного",
    "def f(x):\n    return x**2  # <|im_end|> is not special here\n",
] * 3

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bpe(specials: list[str] = SPECIALS) -> dict[str, Any]:
    """A trained byte-level BPE as tokenizer.json's content; special tokens come first."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def write_bpe(folder: Path, **config: Any) -> Path:
    """A directory with tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(json.dumps(bpe()))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gguf_bpe() -> dict[str, Any]:
    """The same vocabulary as GGUF metadata."""
    spec = bpe()
    vocab = spec["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIALS else 1 for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def sentencepiece_model(folder: Path) -> Path:
    """A trained SentencePiece BPE with byte fallback."""
    import sentencepiece

    (folder / "corpus.txt").write_text("\n".join(" ".join(TEXTS).split("\n")) * 4)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"
