r"""The splitting patterns of published byte-level vocabularies, as data.

A byte-level BPE never merges across these splits, so the wrong pattern gives the wrong ids without any error. Each
pattern is the one published with its tokenizer (named beside it); a vocabulary whose pattern is not here is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quadriga.text.decoders import byte_alphabet

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
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (  # openai/tiktoken: a cut inside a word where a capital follows a small letter
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# llama.cpp's rule for files that do not name theirs (src/llama-vocab.cpp); no published vocabulary was trained with it.
_LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Split:
    """How a vocabulary cuts text before merging."""

    patterns: tuple[str, ...]
    """Applied one after the other; each isolates its matches."""
    whole_words: bool = False
    """A cut that is itself a token is taken whole, without merging (tiktoken's rule)."""
    normalizer: str | None = None
    """Unicode form that the published vocabulary of this name brings text into first."""
    add_bos: bool = False
    """A bos token stands before every text unless the file says otherwise."""


GGUF_PATTERNS: dict[str, Split] = {
    "default": Split(_LLAMA_CPP_DEFAULT),
    "gpt-2": Split((_GPT2,)),
    "mpt": Split((_GPT2,), normalizer="NFC"),  # EleutherAI/gpt-neox-20b's tokenizer.json
    "olmo": Split((_GPT2,), normalizer="NFC"),  # allenai/gpt-neox-olmo-dolma-v1_5
    "smollm": Split((_SINGLE_DIGITS, _GPT2)),
    "starcoder": Split((_SINGLE_DIGITS, _GPT2)),
    "refact": Split((_SINGLE_DIGITS, _GPT2)),  # Granite 3
    "llama-bpe": Split((_CL100K_GREEDY,), whole_words=True, add_bos=True),
    "dbrx": Split((_CL100K_GREEDY,), whole_words=True),
    "glm4": Split((_CL100K_GREEDY,)),  # GLM-4.5
    "chatglm-bpe": Split((_CL100K_GREEDY,)),
    "hunyuan": Split((_QWEN2,)),
    "qwen2": Split((_QWEN2,), normalizer="NFC"),  # Qwen/Qwen2-7B's tokenizer.json
    "gpt-4o": Split((_O200K,), whole_words=True),  # gpt-oss: o200k_harmony
    "minimax-m2": Split((_O200K,)),
}
"""Values of GGUF's ``tokenizer.ggml.pre`` that are known."""

_FAMILIES = ("gpt-2", "smollm", "llama-bpe", "qwen2")
"""One name of each rule a vocabulary may have been trained with."""
_ENOUGH_WORDS = 5_000
_ENOUGH_TO_LOOK_AT = 20_000  # a second; all of a vocabulary of 100,000 take four
_STRAY = 0.002
"""Share of tokens that may break their own rule: published vocabularies have a handful put in by hand."""


def pattern_of_vocabulary(words: Sequence[str]) -> str | None:
    """The rule that a byte-level vocabulary was trained with, found by its tokens, or None if they leave it open.

    Training never merges across a cut, so no rule of its own cuts a token. Of two rules that fit, one of which cuts
    finer, a large vocabulary comes from the finer: the other would have made tokens of what that one cuts.

    Args:
        words: the ordinary tokens in GPT-2's alphabet of bytes.
    """
    if len(words) < _ENOUGH_WORDS:
        return None
    some = words[:: max(1, len(words) // _ENOUGH_TO_LOOK_AT)]
    texts = [text for text in map(_text_of, some) if text is not None]
    fitting = [name for name in _FAMILIES if _fits(GGUF_PATTERNS[name], texts)]
    finer = {"gpt-2": {"smollm"}, "llama-bpe": {"qwen2"}}
    best = [name for name in fitting if not finer.get(name, set()) & set(fitting)]
    return best[0] if len(best) == 1 else None


def _fits(split: Split, texts: Sequence[str]) -> bool:
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), behavior="isolated") for p in split.patterns])
    strays = 0
    for text in texts:
        strays += len(cut.pre_tokenize_str(text)) != 1
        if strays > _STRAY * len(texts):
            return False
    return True


def _text_of(word: str) -> str | None:
    alphabet = byte_alphabet()
    try:
        return bytes(alphabet[c] for c in word).decode() if word else None
    except (KeyError, UnicodeDecodeError):
        return None
