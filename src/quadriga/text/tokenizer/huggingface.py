"""tokenizer.json, the tokenizers library's file, with what the files beside it add."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text.added_tokens import Declared
from quadriga.text.tokenizer.base import Tokenizer
from quadriga.text.tokenizer.files import Folder, Templates, read_json
from quadriga.text.tokenizer.roles import asked_for, ends_of, logged_suffix, roles_of
from quadriga.text.tokenizers_json import TokenizersVocabulary

logger = logging.getLogger(__name__)

_AS_STORED = ("LlamaTokenizer", "CodeLlamaTokenizer", "TokenizersBackend")
"""Classes of transformers that run a tokenizer.json as it is; the last is version 5's general one."""


def load_tokenizer_json(path: Path) -> Tokenizer:
    """A tokenizers-library file by itself, without the configuration that usually lies beside it."""
    return from_tokenizer_json(read_json(path), path.name, Folder({}, Declared(), "", Templates(), [], None))


def as_configured(spec: dict[str, Any], config: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """The spec as transformers runs it beside this tokenizer_config.json, with a logged line where that differs.

    ``add_prefix_space`` there, false unless given, is what a byte-level vocabulary goes by (PreTrainedTokenizerFast's
    ``__init__``; LLaMA's classes, and version 5's general one, hand it on to nothing of the kind). A tokenizer.json by
    itself is the library's.
    ``dropout`` of a BPE leaves merges out at random: it is for training, and a text has one list of ids here.
    """
    step, model = spec.get("pre_tokenizer") or {}, spec.get("model")
    given = config.get("add_prefix_space")
    wanted = False if given is None else given
    if not isinstance(wanted, bool):
        raise TokenizerError(f"add_prefix_space in tokenizer_config.json must be true or false, got {wanted!r}")
    goes_by_it = bool(config) and kind not in _AS_STORED
    byte_level = isinstance(step, Mapping) and step.get("type") == "ByteLevel"
    by_file = step.get("add_prefix_space", True) if byte_level else wanted
    if goes_by_it and by_file != wanted:
        message = "%s: add_prefix_space is %s, as transformers has it by tokenizer_config.json; the file says %s"
        logger.warning(message, name, wanted, by_file)
        spec = {**spec, "pre_tokenizer": {**step, "add_prefix_space": wanted}}
    if isinstance(model, Mapping) and model.get("dropout"):
        logger.warning("%s: the dropout of %s is left out: it splits texts at random", name, model["dropout"])
        spec = {**spec, "model": {**model, "dropout": None}}
    return spec


def from_tokenizer_json(spec: Mapping[str, Any], name: str, folder: Folder) -> Tokenizer:
    """The tokenizer of a parsed tokenizer.json; ``name`` is what errors call the file."""
    vocabulary = TokenizersVocabulary(spec, name, beside=folder.tokens, n_rows=folder.n_rows)
    roles = roles_of(folder.tokens, vocabulary.token_id, vocabulary.left_out, name)
    bos, eos = roles.get("bos_token"), roles.get("eos_token")
    prefix, suffix = vocabulary.affixes(name)
    add_bos, add_eos = asked_for(folder, bos is not None, prefix, suffix)
    if bos is None and prefix:
        bos = prefix[0]
    end = [] if eos is None else [eos]
    return Tokenizer(
        vocabulary,
        special_ids=vocabulary.special_ids,
        added=vocabulary.added,
        bos_id=bos,
        eos_ids=ends_of(folder, eos, vocabulary.special_ids),
        pad_id=roles.get("pad_token"),
        add_bos=add_bos,
        prefix_ids=prefix if add_bos else (),
        suffix_ids=logged_suffix((suffix or end) if add_eos else [], name),
        chat_template=folder.templates.chat,
        tool_template=folder.templates.tools,
        unused_ids=vocabulary.unused_ids,
    )
