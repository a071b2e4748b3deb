r"""The splitting patterns of published byte-level vocabularies, as data.

A byte-level BPE never merges across these splits, so the wrong pattern gives the wrong ids without any error. Each
pattern is the one published with its tokenizer (named beside it); a vocabulary whose pattern is not here is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""GPT-4's cl100k_base (openai/tiktoken)."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # openai/gpt-2
_CONTRACTIONS_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_CL100K_GREEDY = _CONTRACTIONS_ANY_CASE + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3
_QWEN2 = _CONTRACTIONS_ANY_CASE + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS = r"\p{N}"


@dataclass(frozen=True)
class Split:
    """How a vocabulary cuts text before merging."""

    patterns: tuple[str, ...]
    """Applied one after the other; each isolates its matches."""
    whole_words: bool = False
    """A cut that is itself a token is taken whole, without merging (tiktoken's rule)."""


GGUF_PATTERNS: dict[str, Split] = {
    "default": Split((_GPT2,)),
    "gpt-2": Split((_GPT2,)),
    "mpt": Split((_GPT2,)),
    "olmo": Split((_GPT2,)),
    "smollm": Split((_SINGLE_DIGITS, _GPT2)),
    "starcoder": Split((_SINGLE_DIGITS, _GPT2)),
    "llama-bpe": Split((_CL100K_GREEDY,), whole_words=True),
    "dbrx": Split((_CL100K_GREEDY,), whole_words=True),
    "qwen2": Split((_QWEN2,)),
}
"""Values of GGUF's ``tokenizer.ggml.pre`` that are known."""
