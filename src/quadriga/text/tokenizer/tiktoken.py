"""GPT-4's vocabulary, cl100k_base, from its published rank file: DBRX's tokenizer."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

from quadriga.errors import TokenizerError
from quadriga.text.pretokenize import CL100K_PATTERN
from quadriga.text.tokenizer.base import Tokenizer
from quadriga.text.tokenizer.files import read_bytes

CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""Of the published cl100k_base.tiktoken, 1,681,126 bytes."""

CL100K_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
DBRX_SPECIALS = {**CL100K_SPECIALS, "<|pad|>": 100277, "<|im_start|>": 100278, "<|im_end|>": 100279}
"""DBRX adds three to GPT-4's; ids 100280..100351 only pad the embedding table."""


def load_tiktoken(
    path: Path, *, special_ids: Mapping[str, int] = DBRX_SPECIALS, chat_template: str | None = None
) -> Tokenizer:
    """GPT-4's cl100k_base from a local rank file, with DBRX's special tokens unless told otherwise.

    Raises:
        TokenizerError: the file is not the published one (its sha256 differs).
    """
    raw = read_bytes(path)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != CL100K_SHA256:
        raise TokenizerError(
            f"{path.name} must be the published cl100k_base ranks with sha256 {CL100K_SHA256[:12]}..., got "
            f"{digest[:12]}... ({len(raw)} bytes). Get it again: `quadriga pull cl100k_base`."
        )
    ends = [special_ids[name] for name in ("<|endoftext|>", "<|im_end|>") if name in special_ids]
    ranks = _parse_ranks(raw)
    vocabulary = TiktokenVocabulary(ranks, special_ids)
    return Tokenizer(
        vocabulary,
        special_ids=special_ids,
        bos_id=special_ids["<|endoftext|>"],
        eos_ids=ends,
        pad_id=special_ids.get("<|pad|>"),
        chat_template=chat_template,
        unused_ids=set(range(vocabulary.n_vocab)) - set(ranks.values()) - set(special_ids.values()),
    )


class TiktokenVocabulary:
    """A ``Vocabulary`` of tiktoken: ranks of byte pairs, which are their ids, and special tokens.

    Args:
        ranks: token -> id; of two that could be merged next the lower goes first.
        special_ids: text -> id.
        pattern: how text is cut before anything is merged.

    Raises:
        ValueError: the pattern cannot be compiled.
    """

    is_of_ranks = True

    def __init__(self, ranks: dict[bytes, int], special_ids: Mapping[str, int], pattern: str = CL100K_PATTERN) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "ranks", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(special_ids)
        )
        self.n_vocab = max(*special_ids.values(), *ranks.values()) + 1

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """See ``Vocabulary``."""
        if allow_special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode(text, disallowed_special=())

    def token_bytes(self, token_id: int) -> bytes:
        """See ``Vocabulary``."""
        try:
            return bytes(self._encoding.decode_single_token_bytes(token_id))
        except KeyError:
            raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids") from None


def _parse_ranks(raw: bytes) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in raw.splitlines() if line)}
