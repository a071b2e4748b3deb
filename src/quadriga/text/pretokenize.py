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
_QWEN35 = (  # Qwen/Qwen3.5's tokenizer.json: marks stay with their letters
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = _CONTRACTIONS_ANY_CASE + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_BAILING = (  # inclusionAI/Ling-lite's tokenizer.json
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SINGLE_DIGITS = r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (  # openai/tiktoken: a cut inside a word where a capital follows a small letter
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (  # mistralai/Mistral-Nemo: as above without contractions, every digit alone
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# DeepSeek-LLM's and -V2's tokenizer.json: letters that have capitals, by their code points; the copies of this class in
# circulation have three ends of ranges that a normalisation moved.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_CASED_CLASS = "".join("-".join(chr(int(end, 16)) for end in ends.split("-")) for ends in _CASED.split())
_DEEPSEEK_V2 = (
    r"[\r\n]",
    rf"\s?[{_CASED_CLASS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_DEEPSEEK_V3 = (  # deepseek-ai/DeepSeek-V3's tokenizer.json
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)

_DEEPSEEK_CODER = (  # deepseek-ai/deepseek-coder-6.7b's tokenizer.json
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_MINICPM5 = (  # openbmb/MiniCPM5-1B
    r"\p{N}{1,3}",
    _CONTRACTIONS_ANY_CASE + r"\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_NOT_HAN = r"&&[^\p{Han}]"
_KIMI_UPPER, _KIMI_LOWER = _UPPER[:-1] + _NOT_HAN + "]", _LOWER[:-1] + _NOT_HAN + "]"
_KIMI_K2 = (  # moonshotai/Kimi-K2's tokenization_kimi.py: as o200k, Chinese characters by themselves
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}*{_KIMI_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}+{_KIMI_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    "deepseek-llm": Split(_DEEPSEEK_V2),
    "deepseek-v3": Split(_DEEPSEEK_V3),
    "deepseek-coder": Split(_DEEPSEEK_CODER),
    "minicpm5": Split(_MINICPM5, whole_words=True),
    "kimi-k2": Split((_KIMI_K2,)),
    "qwen35": Split((_QWEN35,), normalizer="NFC"),
    "tekken": Split((_TEKKEN,), whole_words=True, add_bos=True),
    "seed-coder": Split((_SEED_CODER,)),
    "bailingmoe": Split((_BAILING,)),
}
_SAME_RULE = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "glm4": ("smaug-bpe",),
    "hunyuan": ("deepseek-r1-qwen", "megrez", "stablelm2", "solar-open", "grok-2", "kormo", "f2llmv2"),
    "gpt-2": ("phi-2", "jina-es", "jina-de", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion"),
    "starcoder": ("command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "minimax-m2": ("llama4", "kanana2"),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
}
"""Other names that llama.cpp gives a rule."""
GGUF_PATTERNS |= {other: GGUF_PATTERNS[name] for name, others in _SAME_RULE.items() for other in others}
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
