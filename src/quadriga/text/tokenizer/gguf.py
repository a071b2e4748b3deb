"""The vocabulary inside a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text import gguf_spec, template_variables
from quadriga.text.pretokenize import GGUF_PATTERNS
from quadriga.text.sentencepiece_model import UNUSED, SentencePieceVocabulary
from quadriga.text.tokenizer.base import Tokenizer
from quadriga.text.tokenizer.roles import logged_suffix
from quadriga.text.tokenizers_json import TokenizersVocabulary

TOOL_TEMPLATE = "tokenizer.chat_template.tool_use"
"""The template for conversations with tools, where a file has one (llama.cpp's ``llama_model_chat_template``)."""


def load_gguf(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The vocabulary inside a GGUF file's metadata, or None if it carries none.

    Raises:
        TokenizerError: an unknown model or pre-tokeniser, or lists of different lengths.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind in gguf_spec.NO_VOCABULARY:
        return None
    if kind not in ("gpt2", "gemma4", *gguf_spec.SENTENCEPIECE):
        raise TokenizerError(f"tokenizer.ggml.model must be 'gpt2', 'llama', 't5' or 'gemma4', got {kind!r}")
    template, tool_template = (metadata.get(name) for name in ("tokenizer.chat_template", TOOL_TEMPLATE))
    if not all(text is None or isinstance(text, str) for text in (template, tool_template)):
        raise TokenizerError(f"tokenizer.chat_template and {TOOL_TEMPLATE} must be strings")
    tokens, name = gguf_spec.tokens_of(metadata), "the GGUF vocabulary"
    bos, ends = tokens.roles.get("bos"), tokens.ends
    vocabulary: TokenizersVocabulary | SentencePieceVocabulary
    if kind == "gpt2":
        pre = gguf_spec.pre_of(tokens, metadata)
        vocabulary = TokenizersVocabulary(gguf_spec.bpe_spec(tokens, metadata, pre), name)
        add_bos = GGUF_PATTERNS[pre].add_bos and bos is not None
    elif kind == "gemma4":
        vocabulary = TokenizersVocabulary(gguf_spec.gemma4_spec(tokens, metadata), name)
        add_bos = bos is not None
    else:
        model = gguf_spec.sentencepiece(tokens, metadata)
        vocabulary = SentencePieceVocabulary(model, name, added=tokens.added)
        bos = vocabulary.bos if bos is None else bos
        ends = ends or [i for i in (vocabulary.eos,) if i is not None]
        add_bos = kind == "llama" and bos is not None
    add_eos = gguf_spec.flag(metadata, "add_eos_token", otherwise=kind == "t5")
    return Tokenizer(
        vocabulary,
        special_ids=vocabulary.special_ids,
        added=tokens.added,
        bos_id=bos,
        eos_ids=ends,
        pad_id=tokens.roles.get("padding"),
        add_bos=gguf_spec.flag(metadata, "add_bos_token", otherwise=add_bos),
        suffix_ids=logged_suffix(ends[:1] if add_eos else [], name),
        chat_template=template,
        tool_template=tool_template,
        # Converters fill holes with entries of this kind, named [PAD100256] and so on.
        unused_ids=[i for i, token_kind in enumerate(tokens.kinds) if token_kind == UNUSED],
        template_variables=template_variables.from_gguf(metadata, tokens.texts, bos, next(iter(ends), None)),
    )
