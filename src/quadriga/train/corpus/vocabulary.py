"""Vocabularies for a corpus: one that exists, or a byte-level BPE trained on it.

Trained with the tokenizers library; the split pattern is GPT-4's, so numbers go in threes and a space belongs to the
word after it. All 256 bytes are in, so any text can be written. The special tokens are DBRX's, and the folder has
ChatML for a template: what is trained on the corpus can be tuned to chat without growing the vocabulary.
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
    """Train a byte-level BPE of exactly ``size`` tokens and write tokenizer.json and its configuration into ``folder``.

    Raises:
        CorpusError: the texts are too few for so many tokens.
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
            f"the text has words for {bpe.get_vocab_size()} tokens only, {size} were asked for. Give more text, or "
            "take a smaller vocabulary."
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
    """Copy the files of the vocabulary at ``path`` (a file or a folder) into ``folder``.

    Raises:
        TokenizerError: there is none at ``path``.
    """
    if path.is_dir():
        files = [path / name for name in vocabulary_files(path)]
    else:
        files = [path] if path.is_file() else []
    if not any(file.suffix in (".json", ".tiktoken", ".model") for file in files):
        raise TokenizerError(f"{path} must be, or hold, tokenizer.json, *.tiktoken or tokenizer.model; it does not")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        name = file.name if path.is_dir() or file.suffix == ".tiktoken" else f"tokenizer{file.suffix}"
        shutil.copyfile(file, folder / name)


def vocabulary_files(folder: Path) -> list[str]:
    """Names of the vocabulary's files in a corpus."""
    known = [name for name in text_tokenizer.FILES if (folder / name).is_file()]
    return known + sorted(file.name for file in folder.glob("*.tiktoken"))


def load(folder: Path) -> Tokenizer:
    """The vocabulary in a corpus's folder.

    Raises:
        TokenizerError: there is none, or it is malformed.
    """
    tokenizer = text_tokenizer.load_directory(folder)
    if tokenizer is None:
        raise TokenizerError(f"there is no tokenizer in {folder}")
    return tokenizer


def end_id(tokenizer: Tokenizer, end_token: str | None) -> int:
    """The id that ends every document.

    Raises:
        ConfigError: the vocabulary has no such token.
    """
    name = end_token or END
    if name in tokenizer.special_ids:
        return tokenizer.special_ids[name]
    if end_token is None and tokenizer.eos_ids:
        return tokenizer.eos_ids[0]
    raise ConfigError(
        f"documents must be ended by a special token; the vocabulary has no {name!r}, but "
        f"{', '.join(sorted(tokenizer.special_ids)[:8]) or 'none at all'}. Choose with tokenizer.end_token."
    )
