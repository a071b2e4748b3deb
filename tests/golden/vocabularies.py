"""Folders of small vocabularies in the layouts of published ones, and texts to encode.

Everything is written out by hand, so that the files are the same wherever they are made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quadriga.text.sentencepiece_model import BYTE, CONTROL, UNKNOWN, Model, Piece

WORDS = [
    *("▁▁", "▁▁▁▁", "in", "er", "▁t", "he", "▁the", "▁a", "re", "on", "st", "en", "▁s", "nd", "▁w", "▁c", "at", "it"),
    *("us", "ser", "user", "ass", "assist", "ant", "assistant", "▁hi", "ret", "urn", "return", "▁return", "word", "é"),
    *("Wo", "rld", "▁World", "你", "好", "ll", "lo", "llo", "▁hello"),
]
_PARTS = {"ser": "s er", "user": "u ser", "ass": "a ss", "ss": "s s"}
LETTERS = sorted(
    {c for word in WORDS for c in word} | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'▁")
)
MIDDLE = ["ss", "▁h", "▁he", "▁hel", "▁W", "▁Wo", "▁re", "▁ret", "is", "ist", "ur", "wo", "rd", "ld", "▁th", "th"]


def model() -> Model:
    """A LLaMA-like SentencePiece BPE: controls, bytes, words in order of merit, letters."""
    words = [w for w in dict.fromkeys([*MIDDLE, *WORDS]) if len(w) > 1]
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    pieces += [Piece(word, -float(i + 1)) for i, word in enumerate(words)]
    pieces += [Piece(letter, -float(len(words) + i + 1)) for i, letter in enumerate(LETTERS)]
    return Model(pieces, byte_fallback=True)


N = len(model().pieces)
"""Tokens of the model: the first id an added token may have."""


def tokenizer_json(*, legacy: bool, added: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The same vocabulary as transformers writes it: merges in order of the pieces' scores."""
    pieces = model().pieces
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    merges = [
        f"{piece.text[:cut]} {piece.text[cut:]}"
        for piece in pieces
        if piece.kind not in (UNKNOWN, CONTROL, BYTE)
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in vocab and piece.text[cut:] in vocab
    ]
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    special = [flags(text, special=True) | {"id": i} for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*special, *(added or [])],
        "normalizer": {"type": "Sequence", "normalizers": prepend} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace,
        "post_processor": around("<s>", 1),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def byte_level(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE of GPT-2's kind: all bytes, a few words, no added tokens."""
    from quadriga.text.decoders import byte_alphabet

    vocab = {character: i for i, character in enumerate(sorted(byte_alphabet()))}
    merges = ["h e", "Ġ t", "Ġt he", "l l", "i n", "r e", "Ġ h", "Ġh e", "Ġ Ġ", "ĠĠ ĠĠ", "u s", "us e", "use r"]
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": False, "fuse_unk": False},
        **changes,
    }


N_BYTES = len(byte_level()["model"]["vocab"])


def around(before: str, before_id: int, after: str | None = None, after_id: int = 0) -> dict[str, Any]:
    """A post-processor that puts one token before a text, and perhaps one after it."""
    tokens = {before: before_id} | ({after: after_id} if after else {})

    def special(text: str | None) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": text, "type_id": 0}}] if text else []

    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*special(before), text, *special(after)],
        "pair": [*special(before), text, *special(after), second],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in tokens.items()},
    }


def flags(content: str, **more: bool) -> dict[str, Any]:
    """An added token as files have it."""
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **plain, **more}


_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}
_CHATML = {
    str(N): flags("<|im_start|>", special=True),
    str(N + 1): flags("<|im_end|>", special=True),
    str(N + 2): flags("<extra>", lstrip=True, rstrip=True),
    str(N + 3): flags("return", single_word=True),
}
_BARE = {"<|im_end|>": N, "<|im_start|>": N + 1, "[PAD]": N + 2}
_GENERAL = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end|>",
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {str(N_BYTES): flags("<|end|>", special=True)},
}


def _folders() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for legacy in (True, False):
        for form in ("tokenizer.model", "tokenizer.json"):
            body = "model" if form == "tokenizer.model" else tokenizer_json(legacy=legacy)
            config = {**_LLAMA, "legacy": legacy}
            name = f"{form}, {'legacy' if legacy else 'not legacy'}"
            found[name] = {form: body, "tokenizer_config.json": config}
            turned = {**config, "add_bos_token": False, "add_eos_token": True}
            found[f"{name}, eos after, no bos"] = {form: body, "tokenizer_config.json": turned}
            ends = {**config, "added_tokens_decoder": _CHATML, "eos_token": "<|im_end|>"}
            found[f"{name}, added_tokens_decoder"] = {form: body, "tokenizer_config.json": ends}
            beside = {"eos_token": "<|im_end|>", "pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>"]}
            found[f"{name}, added_tokens.json"] = {
                form: body,
                "tokenizer_config.json": {**config, **beside},
                "added_tokens.json": _BARE,
            }
            found[f"{name}, special_tokens_map.json"] = {
                form: body,
                "tokenizer_config.json": config,
                "added_tokens.json": _BARE,
                "special_tokens_map.json": {**beside, "eos_token": flags("<|im_end|>")},
            }
    both = around("<|end|>", N_BYTES, "<|end|>", N_BYTES)
    found["byte level"] = {"tokenizer.json": byte_level(), "tokenizer_config.json": _GENERAL}
    found["byte level, post-processor"] = {
        "tokenizer.json": byte_level(
            post_processor=both, added_tokens=[flags("<|end|>", special=True) | {"id": N_BYTES}]
        ),
        "tokenizer_config.json": _GENERAL,
    }
    pad = {**_GENERAL["added_tokens_decoder"], str(N_BYTES + 1): flags("[PAD]", special=True)}  # type: ignore[dict-item]
    found["byte level, pad only in added tokens"] = {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {**_GENERAL, "added_tokens_decoder": pad, "pad_token": "[PAD]"},
    }
    plain = {**_GENERAL["added_tokens_decoder"]}  # type: ignore[dict-item]
    plain |= {str(N_BYTES + 1): flags("<extra>", rstrip=True, normalized=True), str(N_BYTES + 2): flags("    ")}
    found["byte level, ordinary added tokens"] = {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {**_GENERAL, "added_tokens_decoder": plain},
    }
    return found


FOLDERS = _folders()
"""Name -> file name -> its content: an object for JSON, "model" for the SentencePiece model."""

TEXTS = [
    "",
    "hello World",
    " hello",
    "  the  user returns word for word ",
    "    return re\n\n    return",
    "<s>[INST] hi [/INST] the</s>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a <extra> b<extra>\n  c",
    "return return, returns",
    "[PAD] x[PAD]",
    "你好 é é 🙂",
    "\x00▁▁ \t<unk>",
    "<|im_end|><|im_end|>",
    "</s> the </s>",
    "\n",
]


def write(name: str, folder: Path) -> Path:
    """Write one of the folders."""
    for file, content in FOLDERS[name].items():
        if content == "model":
            (folder / file).write_bytes(model().to_bytes())
        else:
            (folder / file).write_text(json.dumps(content))
    return folder
