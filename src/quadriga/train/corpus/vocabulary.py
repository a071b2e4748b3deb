"""The tokenizer of a corpus: an existing one, or a byte-level BPE trained on the corpus.

It is trained with the tokenizers library and GPT-4's split pattern: digits are grouped in threes, and a space belongs
to the following word. All 256 bytes are in the vocabulary, so any text can be encoded. The special tokens are DBRX's
and the chat template is ChatML, so a model trained on the corpus can be tuned to chat without growing the vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from quadriga.errors import ConfigError, CorpusError, TokenizerError
from quadriga.text import tokenizer as text_tokenizer
from quadriga.text.chat import CHATML
from quadriga.text.pretokenize import GGUF_PATTERNS
from quadriga.text.tokenizer import Tokenizer

END = "<|endoftext|>"
SPECIALS = (END, "<|pad|>", "<|im_start|>", "<|im_end|>")


def train_bpe(texts: Iterable[str], size: int, folder: Path) -> None:
    """Train a byte-level BPE of exactly ``size`` tokens; write tokenizer.json and its configuration into ``folder``.

    Raises:
        CorpusError: there is too little text for so many tokens.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = GGUF_PATTERNS["llama-bpe"].patterns[0]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != size:
        raise CorpusError(
            f"tokenizer.train must be at most {bpe.get_vocab_size()} for so little text, got {size}. Give more text, "
            "or take a smaller vocabulary."
        )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_vocabulary(path: Path, folder: Path) -> None:
    """Copy the files of the tokenizer at ``path`` (a file or a folder) into ``folder``.

    Raises:
        TokenizerError: there is no tokenizer at ``path``.
    """
    if path.is_dir():
        files = [path / name for name in vocabulary_files(path)]
    else:
        files = [path] if path.is_file() else []
    if not any(file.suffix in (".json", ".tiktoken", ".model") for file in files):
        raise TokenizerError(f"{path} must be or contain tokenizer.json, *.tiktoken, tekken.json or tokenizer.model")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        kept = path.is_dir() or file.suffix == ".tiktoken" or file.name in text_tokenizer.FILES
        name = file.name if kept else f"tokenizer{file.suffix}"
        shutil.copyfile(file, folder / name)


def vocabulary_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files in a corpus."""
    known = [name for name in text_tokenizer.FILES if (folder / name).is_file()]
    return known + sorted(file.name for file in folder.glob("*.tiktoken"))


def load(folder: Path) -> Tokenizer:
    """Load the tokenizer of a corpus from its folder.

    Raises:
        TokenizerError: there is none, or it is malformed.
    """
    tokenizer = text_tokenizer.load_directory(folder)
    if tokenizer is None:
        raise TokenizerError(f"there is no tokenizer in {folder}")
    return tokenizer


def end_id(tokenizer: Tokenizer, end_token: str | None) -> int:
    """The id of the token that ends every document.

    Raises:
        ConfigError: the tokenizer has no such special token.
    """
    name = end_token or END
    if name in tokenizer.special_ids:
        return tokenizer.special_ids[name]
    if end_token is None and tokenizer.eos_ids:
        return tokenizer.eos_ids[0]
    raise ConfigError(
        f"documents must end with a special token; the vocabulary has no {name!r}, but "
        f"{', '.join(sorted(tokenizer.special_ids)[:8]) or 'none at all'}. Choose with tokenizer.end_token."
    )
