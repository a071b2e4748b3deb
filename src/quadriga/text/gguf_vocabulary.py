"""Vocabularies across the border between GGUF files and directories, in both directions.

    to_files          GGUF metadata -> tokenizer.json or tokenizer.model, and tokenizer_config.json
    from_directory    those files -> GGUF metadata, as llama.cpp reads it

What GGUF has no name for (a splitting pattern, a normaliser) is refused, not approximated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text import gguf_spec, sentencepiece_model
from quadriga.text import tokenizer as loading
from quadriga.text.added_tokens import AddedToken
from quadriga.text.decoders import byte_of, steps_of
from quadriga.text.pretokenize import CL100K_PATTERN, GGUF_PATTERNS
from quadriga.text.sentencepiece_model import CONTROL, NORMAL, UNIGRAM, UNUSED, USER_DEFINED, Model, Piece
from quadriga.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Entry = tuple[str, Any]
"""(GGUF type, value)."""

_SENTENCEPIECE_NAMES = {number: name for name, number in gguf_spec.SENTENCEPIECE.items()}


def to_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer files other programs expect, from a GGUF file's metadata; empty if it has no vocabulary."""
    if (kind := metadata.get("tokenizer.ggml.model")) == "gpt2":
        metadata = {**metadata, "tokenizer.ggml.pre": gguf_spec.pre_of(gguf_spec.tokens_of(metadata), metadata)}
    tokenizer = loading.load_gguf(metadata)
    if tokenizer is None:
        return {}
    tokens = gguf_spec.tokens_of(metadata)
    classes = {"llama": "LlamaTokenizer", "t5": "T5Tokenizer"}
    added = {str(token.id): {k: v for k, v in token.as_json().items() if k != "id"} for token in tokens.added}
    config: dict[str, Any] = {
        "tokenizer_class": classes.get(str(kind), "PreTrainedTokenizerFast"),
        "add_bos_token": bool(tokenizer.prefix_ids),
        "add_eos_token": bool(tokenizer.suffix_ids),
        **{name: text or None for name, text in tokenizer.template_variables.items()},
        "added_tokens_decoder": added,
        "chat_template": _templates(tokenizer),
        "clean_up_tokenization_spaces": False,
    }
    files: dict[str, bytes] = {}
    if kind in ("gpt2", "gemma4"):
        if kind == "gpt2":
            spec = gguf_spec.bpe_spec(tokens, metadata, str(metadata["tokenizer.ggml.pre"]))
        else:
            spec = gguf_spec.gemma4_spec(tokens, metadata)
        affixes = _affixes(tokenizer, tokens.texts)
        files["tokenizer.json"] = _json({**spec, "post_processor": affixes})
    else:
        model = gguf_spec.sentencepiece(tokens, metadata)
        files["tokenizer.model"] = model.to_bytes()
        config["legacy"] = True
    if len(tokenizer.eos_ids) > 1:  # tokenizer_config.json can name one only
        ends = {"eos_token_id": list(tokenizer.eos_ids)}
        ids = {"bos_token_id": tokenizer.bos_id, **ends, "pad_token_id": tokenizer.pad_id}
        files["generation_config.json"] = _json({k: v for k, v in ids.items() if v is not None})
    config = {k: v for k, v in config.items() if v is not None}
    return {**files, "tokenizer_config.json": _json(config)}


def _templates(tokenizer: Tokenizer) -> str | list[dict[str, str]] | None:
    """The templates as tokenizer_config.json holds them: one, or a list with names."""
    if tokenizer.chat_template is None or tokenizer.tool_template is None:
        return tokenizer.chat_template
    named = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_template}
    return [{"name": name, "template": template} for name, template in named.items()]


def _affixes(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any] | None:
    """The post-processor that puts bos and eos around a text; other programs go by it alone."""
    if not tokenizer.prefix_ids and not tokenizer.suffix_ids:
        return None

    def special(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": texts[i], "type_id": 0}} for i in ids]

    before, after = special(tokenizer.prefix_ids), special(tokenizer.suffix_ids)
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    around = {*tokenizer.prefix_ids, *tokenizer.suffix_ids}
    return {
        "type": "TemplateProcessing",
        "single": [*before, text, *after],
        "pair": [*before, text, *after, *before, second, *after],
        "special_tokens": {texts[i]: {"id": texts[i], "ids": [i], "tokens": [texts[i]]} for i in sorted(around)},
    }


def from_directory(path: Path, n_rows: int | None = None) -> dict[str, Entry] | None:
    """GGUF metadata for the tokenizer that lies in ``path``, or None if there is none.

    Args:
        path: the checkpoint's folder.
        n_rows: rows of the model's embedding; the list of tokens is filled up to them, as llama.cpp demands.

    Raises:
        TokenizerError: GGUF cannot express it.
    """
    tokenizer = loading.load_directory(path, n_rows=n_rows)
    if tokenizer is None:
        return None
    if (path / "tokenizer.json").exists():
        table = _from_tokenizer_json(path, loading.tokenizer_json(path), tokenizer)
    elif tokenizer.is_of_ranks:
        raise TokenizerError(
            "a GGUF file needs merges, which a file of ranks lacks. Put the model's tokenizer.json beside it."
        )
    else:
        table = _from_sentencepiece(_model_of(path), tokenizer.added)
    _fill(table, n_rows)
    if tokenizer.prefix_ids not in ([], [tokenizer.bos_id]):
        raise TokenizerError(f"GGUF can put one bos token before a text, this tokenizer puts {tokenizer.prefix_ids}")
    ends = [*tokenizer.eos_ids, None, None]
    ids = {"bos": tokenizer.bos_id, "eos": ends[0], "eot": ends[1], "padding": tokenizer.pad_id}
    for name, token_id in ids.items():
        if token_id is not None:
            table[f"tokenizer.ggml.{name}_token_id"] = ("uint32", token_id)
    table["tokenizer.ggml.add_bos_token"] = ("bool", bool(tokenizer.prefix_ids))
    table["tokenizer.ggml.add_eos_token"] = ("bool", bool(tokenizer.suffix_ids))
    if tokenizer.chat_template is not None:
        table["tokenizer.chat_template"] = ("string", tokenizer.chat_template)
    if tokenizer.tool_template is not None:
        table["tokenizer.chat_templates"] = ("string", ["tool_use"])
        table[loading.GGUF_TOOL_TEMPLATE] = ("string", tokenizer.tool_template)
    return table


def _fill(table: dict[str, Entry], n_rows: int | None) -> None:
    tokens, kinds = table["tokenizer.ggml.tokens"][1], table["tokenizer.ggml.token_type"][1]
    missing = range(len(tokens), n_rows or 0)
    tokens += [f"[PAD{i}]" for i in missing]
    kinds += [UNUSED for _ in missing]
    if "tokenizer.ggml.scores" in table:
        table["tokenizer.ggml.scores"][1].extend(-1000.0 for _ in missing)


def _kind(token: AddedToken) -> int:
    return CONTROL if token.control else USER_DEFINED


def _say_what_is_lost(added: Sequence[AddedToken]) -> None:
    lost = [token.content for token in added if token.lstrip or token.rstrip or token.single_word]
    if lost:
        message = "GGUF cannot say that these tokens take white space along or stand alone; its readers will not: %s"
        logger.warning(message, ", ".join(map(repr, lost[:8])))


def _from_tokenizer_json(path: Path, spec: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Entry]:
    model = spec.get("model", {})
    pieces = _marks_spaces(spec)
    if pieces or model.get("type") == "Unigram":
        return _from_pieces(path, spec, tokenizer)
    if model.get("type") != "BPE":
        raise TokenizerError(f"GGUF holds byte-level BPE and SentencePiece vocabularies, not {model.get('type')!r}")
    pre = _pre_name(spec.get("pre_tokenizer"), spec.get("normalizer"))
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if odd:
        raise TokenizerError(f"GGUF cannot express the model's {odd[0]}")
    by_id: dict[int, tuple[str, int]] = {i: (text, NORMAL) for text, i in model["vocab"].items()}
    by_id |= {token.id: (token.content, _kind(token)) for token in tokenizer.added}
    _say_what_is_lost(tokenizer.added)
    rows = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(max(by_id) + 1)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", pre),
        "tokenizer.ggml.tokens": ("string", [text for text, _ in rows]),
        "tokenizer.ggml.token_type": ("int32", [kind for _, kind in rows]),
        "tokenizer.ggml.merges": ("string", merges),
    }


def _marks_spaces(spec: Mapping[str, Any]) -> bool:
    """True if a tokenizer.json writes spaces as SentencePiece does."""
    before = [*steps_of(spec.get("normalizer"), "normalizers"), *steps_of(spec.get("pre_tokenizer"), "pretokenizers")]
    return any(step.get("type") in ("Prepend", "Metaspace") or step.get("content") == "▁" for step in before)


def _pre_name(pre_tokenizer: dict[str, Any] | None, normalizer: dict[str, Any] | None) -> str:
    """GGUF's name for a splitting rule, found by comparing the patterns themselves."""
    patterns: list[str] = []
    for step in steps_of(pre_tokenizer, "pretokenizers"):
        match step.get("type"):
            case "Split":
                patterns.append(str(step.get("pattern", {}).get("Regex")))
            case "Digits" if step.get("individual_digits"):
                patterns.append(r"\p{N}")
            case "ByteLevel" if not step.get("add_prefix_space"):
                if step.get("use_regex", True):
                    patterns.extend(GGUF_PATTERNS["gpt-2"].patterns)
            case other:
                raise TokenizerError(f"GGUF has no name for the pre-tokeniser {other!r}: {step!s:.120}")
    forms = [str(step.get("type")) for step in steps_of(normalizer, "normalizers")]
    if patterns == [CL100K_PATTERN] and not forms:
        return "dbrx"
    same = [name for name, split in GGUF_PATTERNS.items() if list(split.patterns) == patterns and name != "default"]
    if not same:
        raise TokenizerError(f"GGUF has no name for this vocabulary's splitting pattern: {str(patterns)[:200]}")
    for name in same:
        form = GGUF_PATTERNS[name].normalizer
        if forms == ([] if form is None else [form]):
            return name
    # llama.cpp normalises nothing; the name stands for a published vocabulary, and so for its normaliser.
    raise TokenizerError(
        f"GGUF has no name for a vocabulary split like {same[0]!r} and normalised by {forms or 'nothing'}"
    )


# SentencePiece -------------------------------------------------------------------------------------------------------


def _model_of(path: Path) -> Model:
    return sentencepiece_model.parse(loading.read_bytes(path / "tokenizer.model"), "tokenizer.model")


def _from_pieces(path: Path, spec: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Entry]:
    """A tokenizer.json made of a SentencePiece model: the scores are in the model, or follow from the merges."""
    vocab = spec["model"]["vocab"]
    ids = {entry[0]: i for i, entry in enumerate(vocab)} if isinstance(vocab, list) else vocab
    prefix = any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for parts, key in (("normalizers", "normalizer"), ("pretokenizers", "pre_tokenizer"))
        for step in steps_of(spec.get(key), parts)
    )
    if (path / "tokenizer.model").exists():
        model = _model_of(path)
        wrong = [piece.text for i, piece in enumerate(model.pieces) if ids.get(piece.text, i) != i]
        if wrong:
            raise TokenizerError(f"tokenizer.json and tokenizer.model have different ids, of {wrong[0]!r} for one")
        if prefix != model.add_space_prefix:
            raise TokenizerError("tokenizer.json and tokenizer.model disagree about a space before the first word")
    else:
        model = _model_of_merges(spec, prefix)
    if any(step.get("prepend_scheme") == "first" for step in steps_of(spec.get("pre_tokenizer"), "pretokenizers")):
        logger.warning(
            "readers of GGUF put a space after every special token; this tokenizer puts one before the first word only"
        )
    return _from_sentencepiece(model, tokenizer.added)


def _model_of_merges(spec: Mapping[str, Any], add_space_prefix: bool) -> Model:
    """The SentencePiece model that merges as a tokenizer.json does.

    SentencePiece joins any two neighbours that make a piece, the piece of the best score first. The list of merges is
    the same thing if it holds every such pair, and all pairs of one piece stand together.

    Raises:
        TokenizerError: it is not, so no scores would do the same.
    """
    model = spec["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise TokenizerError("a GGUF file needs the scores of a SentencePiece model. Put tokenizer.model beside it.")
    vocab: dict[str, int] = model["vocab"]
    pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    places: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(pairs):
        places.setdefault(left + right, []).append(rank)
    together = all(ranks[-1] - ranks[0] + 1 == len(ranks) for ranks in places.values())
    special = {entry["content"] for entry in spec.get("added_tokens") or []}
    whole = sum(
        text[:cut] in vocab and text[cut:] in vocab
        for text in vocab
        if text not in special and byte_of(text) is None
        for cut in range(1, len(text))
    )
    if not together or whole != len(pairs):
        raise TokenizerError(
            "the merges of tokenizer.json are no SentencePiece model's, and GGUF cannot express them. If there is a "
            "tokenizer.model, put it beside it."
        )
    order = {text: -float(i + 1) for i, text in enumerate(places)}
    unknown = model.get("unk_token")
    pieces = [Piece(f"[PAD{i}]", kind=UNUSED) for i in range(max(vocab.values()) + 1)]
    for text, i in vocab.items():
        is_byte = byte_of(text) is not None
        kind = sentencepiece_model.BYTE if is_byte else sentencepiece_model.UNKNOWN if text == unknown else NORMAL
        pieces[i] = Piece(text, order.get(text, -float(len(places) + 1)) if kind == NORMAL else 0.0, kind)
    return Model(pieces, byte_fallback=True, add_space_prefix=add_space_prefix)


def _from_sentencepiece(model: Model, added: Sequence[AddedToken]) -> dict[str, Entry]:
    if model.model_type not in _SENTENCEPIECE_NAMES:
        kind = sentencepiece_model.MODEL_TYPES.get(model.model_type, model.model_type)
        raise TokenizerError(f"GGUF holds SentencePiece models of the types bpe and unigram, not {kind!r}")
    _say_what_is_lost(added)
    model = sentencepiece_model.with_tokens(model, added, "tokenizer.model")
    table: dict[str, Entry] = {
        "tokenizer.ggml.model": ("string", _SENTENCEPIECE_NAMES[model.model_type]),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("string", [piece.text for piece in model.pieces]),
        "tokenizer.ggml.scores": ("float32", [piece.score for piece in model.pieces]),
        "tokenizer.ggml.token_type": ("int32", [piece.kind for piece in model.pieces]),
        "tokenizer.ggml.add_space_prefix": ("bool", model.add_space_prefix),
    }
    if model.remove_extra_whitespaces:
        table["tokenizer.ggml.remove_extra_whitespaces"] = ("bool", True)
    if model.charsmap:
        table["tokenizer.ggml.precompiled_charsmap"] = ("uint8", list(model.charsmap))
    if model.model_type != UNIGRAM and (model.remove_extra_whitespaces or model.charsmap):
        logger.warning("the vocabulary normalises text; llama.cpp does not do it for 'llama' vocabularies, this does")
    return table


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
