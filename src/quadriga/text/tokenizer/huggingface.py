"""tokenizer.json, the tokenizers library's file, with what the files beside it add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga.text.added_tokens import Declared
from quadriga.text.tokenizer.base import Tokenizer
from quadriga.text.tokenizer.files import Folder, read_json
from quadriga.text.tokenizer.roles import asked_for, ends_of, logged_suffix, roles_of
from quadriga.text.tokenizers_json import TokenizersVocabulary


def load_tokenizer_json(path: Path) -> Tokenizer:
    """A tokenizers-library file by itself, without the configuration that usually lies beside it."""
    return from_tokenizer_json(read_json(path), path.name, Folder({}, Declared(), None, [], None))


def from_tokenizer_json(spec: Mapping[str, Any], name: str, folder: Folder) -> Tokenizer:
    """The tokenizer of a parsed tokenizer.json; ``name`` is what errors call the file."""
    vocabulary = TokenizersVocabulary(spec, name, beside=folder.tokens, n_rows=folder.n_rows)
    roles = roles_of(folder.tokens, vocabulary.token_id, vocabulary.left_out, name)
    bos, eos = roles.get("bos_token"), roles.get("eos_token")
    prefix, suffix = vocabulary.affixes(name)
    add_bos, add_eos = asked_for(folder.config, prefix, suffix)
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
        chat_template=folder.template,
        unused_ids=vocabulary.unused_ids,
    )
