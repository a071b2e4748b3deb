"""The special tokens a chat template may name: bos_token, eos_token and their kin, as transformers passes them.

    tokenizer_config.json ──► over special_tokens_map.json (older checkpoints: under it) ──► over the class's own

transformers 4.57.6 (tokenization_utils_base.py: ``_from_pretrained``, ``special_tokens_map``) gives a template what the
tokenizer has and leaves the rest undefined. It never asks generation_config.json: a model whose answers may end with
either of two tokens still has one ``eos_token``. GGUF knows the same tokens by id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Variables = dict[str, str | list[str]]

_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
OF_CLASS: dict[str, dict[str, str]] = {
    "PreTrainedTokenizer": {},
    "TokenizersBackend": {},  # what version 5 writes in its place
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2,
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "BloomTokenizer": {**_LLAMA, "pad_token": "<pad>"},
    "CohereTokenizer": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"},
}
"""Tokens a tokenizer class of transformers has where no file names any; its fast twin has the same."""

_CLASS_OF_MODEL = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "dbrx": "GPT2Tokenizer",
    "mpt": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "smollm3": "PreTrainedTokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "qwen3_next": "Qwen2Tokenizer",
    "qwen3_5": "Qwen2Tokenizer",
    "qwen3_5_text": "Qwen2Tokenizer",
    "qwen3_5_moe": "Qwen2Tokenizer",
    "qwen3_5_moe_text": "Qwen2Tokenizer",
    "lfm2": "PreTrainedTokenizer",
    "lfm2_moe": "PreTrainedTokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "granite": "GPT2Tokenizer",
    "granitemoe": "GPT2Tokenizer",
    "granitemoeshared": "GPT2Tokenizer",
    "granitemoehybrid": "GPT2Tokenizer",
    "deepseek_v2": "LlamaTokenizer",
    "deepseek_v3": "LlamaTokenizer",
    "gpt_oss": "PreTrainedTokenizer",
    "glm4_moe": "PreTrainedTokenizer",
    "ernie4_5_moe": "LlamaTokenizer",
    "olmo2": "GPTNeoXTokenizer",
    "olmo3": "GPT2Tokenizer",
    "flex_olmo": "GPT2Tokenizer",
    "phimoe": "LlamaTokenizer",
}
"""transformers' class for a model_type of config.json, where tokenizer_config.json names none."""

_GGUF_NAMES = {
    "unknown": "unk_token",
    "seperator": "sep_token",  # GGUF's own spelling
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}


def class_of(tokenizer_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """transformers' class of a tokenizer, without "Fast": as named, else that of the model type; empty if neither."""
    name = tokenizer_config.get("tokenizer_class") or model_config.get("tokenizer_class")
    return str(name or _CLASS_OF_MODEL.get(str(model_config.get("model_type")), "")).removesuffix("Fast")


def from_files(
    tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], model_config: Mapping[str, Any]
) -> tuple[Variables, bool]:
    """What the files beside a vocabulary say, each parsed, {} where it is missing.

    Returns:
        (the variables, False if neither file says which class the tokenizer has, so that there may be more).
    """
    name = class_of(tokenizer_config, model_config)
    merged: dict[str, Any] = {**OF_CLASS.get(name, {}), **tokenizer_config}
    if "added_tokens_decoder" not in tokenizer_config:  # saved by transformers before 4.33
        own = _contents(tokenizer_config.get("additional_special_tokens"))
        merged |= special_tokens_map
        merged["additional_special_tokens"] = [
            *own,
            *(text for text in _contents(special_tokens_map.get("additional_special_tokens")) if text not in own),
        ]
    extra = tokenizer_config.get("extra_special_tokens")
    merged |= extra if isinstance(extra, dict) else {}
    found: Variables = {}
    for key, value in merged.items():
        if key == "additional_special_tokens":
            if texts := _contents(value):
                found[key] = texts
        elif (text := _content(value)) and key.endswith("_token"):
            found[key] = text
    return found, name in OF_CLASS


def from_gguf(metadata: Mapping[str, Any], tokens: Sequence[str], bos_id: int | None, eos_id: int | None) -> Variables:
    """What a GGUF file's metadata says. Without a bos or eos token their variables are empty, as in llama.cpp."""
    ids = {variable: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, variable in _GGUF_NAMES.items()}
    ids |= {"bos_token": bos_id, "eos_token": eos_id}
    known = {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return {"bos_token": "", "eos_token": "", **known}


def _content(value: Any) -> str:
    """A token's text: given as such, or as the fields of an AddedToken."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _contents(value: Any) -> list[str]:
    return [text for item in value if (text := _content(item))] if isinstance(value, list) else []
