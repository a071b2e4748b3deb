"""The corpus recipe: frozen structs, read from TOML or from the manifest of a finished corpus.

    chunk = "8MB"                                   # of input text per shard
    [[sources]]
    paths = ["data:corpus/mix.jsonl"]               # files, folders, globs; data: is the data folder
    domain_field = "domain"
    [domains.code]
    kind = "code"                                   # selects the quality rules; prose is the default
    [domains.en]
    languages = ["en"]
    [decontaminate]
    paths = ["data:bench"]
    [tokenizer]
    train = 8192                                    # or path = "cl100k_base" | a file | a folder

All values, including defaults, are written to the manifest, so a manifest is also a recipe.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from quadriga.errors import ConfigError
from quadriga.train.finite import refuse_not_finite

T = TypeVar("T")


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Input files with a common row format."""

    paths: list[str]
    text: str = "text"
    """The field with the text (JSONL, Parquet). A .txt or .md file is one document."""
    domain: str | None = None
    """Domain of all rows; None: the value of ``domain_field``, or the file's name if that is None too."""
    domain_field: str | None = None
    split: Literal["train", "held_out"] = "train"
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What to do with a row that cannot be read or has no text field; dropped ones are counted."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("sources.paths must name at least one file, folder or glob")
        if self.domain is not None and self.domain_field is not None:
            raise ConfigError("sources takes domain or domain_field, not both")
        if self.domain is not None:
            check_domain(self.domain)


class ProseRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits for running text; a document outside any limit is dropped and counted under the limit's name.

    The measures are those of Rae et al. 2021 (Gopher), A1.1; in scripts without spaces each character is a word.
    """

    min_words: int = 50
    mean_word_length: tuple[float, float] = (2.5, 12.0)
    min_letters: float = 0.5
    """Fraction of the visible characters that are letters, digits or marks."""
    max_symbols: float = 0.1
    """Number of '#', '…' and '...' per word."""
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    max_repeated_lines: float = 0.3
    """Fraction of characters in repeated lines."""
    max_repeated_phrases: float = 0.3
    """Fraction of words in repeated sequences of 10 words."""
    max_replacement: float = 0.001
    """Fraction of U+FFFD characters, a sign of wrongly decoded text."""


class CodeRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits for source code (measures of Chen et al. 2021, section 3.1)."""

    min_words: int = 20
    max_line_length: int = 1000
    max_mean_line_length: float = 100.0
    min_letters: float = 0.25
    allow_generated: bool = False
    max_replacement: float = 0.001


class Domain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The quality rules of a domain."""

    kind: Literal["prose", "code", "any"] = "prose"
    languages: list[str] = []
    """ISO 639-1 codes of the languages to keep; []: keep all."""
    min_language_score: float = 0.4
    prose: ProseRules = ProseRules()
    code: CodeRules = CodeRules()

    def __post_init__(self) -> None:
        wrong = [name for name in self.languages if not re.fullmatch("[a-z]{2,3}", name)]
        if wrong:
            raise ConfigError(f"domains.languages must be codes such as en, zh or yue, got {', '.join(wrong)[:80]!r}")
        if not 0 <= self.min_language_score <= 1:
            raise ConfigError(f"domains.min_language_score must be from 0 to 1, got {self.min_language_score}")
        low, high = self.prose.mean_word_length
        if low > high:
            raise ConfigError(f"prose.mean_word_length must be (least, most), got {low:g}, {high:g}")


class Duplicates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Removal of exact and near duplicates; the first document of each group is kept, held-out ones before others.

    Two documents whose word 5-grams have Jaccard similarity s become a candidate pair with probability
    1 - (1 - s^rows)^bands.
    """

    exact: bool = True
    near: bool = True
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    min_similarity: float = 0.7
    """A candidate pair counts as duplicates if at least this fraction of the signature values agree."""
    seed: int = 1
    partitions: int = 1
    """Tasks per band; increase it until a task's share of the keys (8 bytes per document) fits into memory."""

    def __post_init__(self) -> None:
        for name in ("ngram", "bands", "rows", "partitions"):
            if not 1 <= getattr(self, name) <= 1024:
                raise ConfigError(f"duplicates.{name} must be from 1 to 1024, got {getattr(self, name)}")
        if not 0 < self.min_similarity <= 1:
            raise ConfigError(f"duplicates.min_similarity must be above 0, at most 1, got {self.min_similarity}")


class Decontaminate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Removal of benchmark questions (Brown et al. 2020, appendix C)."""

    paths: list[str] = []
    """Benchmark files or folders (.jsonl, .json, .txt); the text is searched for every string in them."""
    ngram: int = 13
    margin_chars: int = 200
    """Characters removed on each side of a match; the remaining pieces become separate documents."""
    max_pieces: int = 10
    """A document that would fall into more pieces is dropped."""
    min_chars: int = 200
    """Shorter pieces are dropped."""

    def __post_init__(self) -> None:
        for name, least in (("ngram", 1), ("margin_chars", 0), ("max_pieces", 1), ("min_chars", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"decontaminate.{name} must be at least {least}, got {getattr(self, name)}")


class TokenizerChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer: an existing one (path), or one trained on the kept documents (train)."""

    path: str | None = None
    """A file, a folder, another corpus, or a catalogue name such as cl100k_base."""
    train: int | None = None
    """Vocabulary size of a byte-level BPE to train."""
    train_bytes: int = 100_000_000
    """Bytes of text to train it on; documents are sampled evenly over the corpus."""
    end_token: str | None = None
    """Token that ends every document; None: <|endoftext|>, or the tokenizer's own end-of-text token."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.train is None):
            raise ConfigError("tokenizer must have exactly one of path and train")
        if self.train is not None and not 300 <= self.train <= 2**20:
            raise ConfigError(f"tokenizer.train must be from 300 to {2**20} tokens, got {self.train}")
        if self.train_bytes < 1:
            raise ConfigError(f"tokenizer.train_bytes must be at least 1, got {self.train_bytes}")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that determines a corpus."""

    sources: list[Source]
    tokenizer: TokenizerChoice
    domains: dict[str, Domain] = {}
    """Rules by domain; other domains use ``defaults``."""
    defaults: Domain = Domain()
    duplicates: Duplicates = Duplicates()
    decontaminate: Decontaminate = Decontaminate()
    held_out: float = 0.0
    """Fraction of documents, chosen by hash, that goes to the held-out split (besides sources with that split)."""
    chunk: str = "8MB"
    """Input text per chunk. It affects the result, because each chunk becomes a shard."""
    max_chars: int = 5_000_000
    """Longer documents are dropped and counted."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("a recipe must have at least one [[sources]]")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out must be from 0 to below 1, got {self.held_out}")
        if self.max_chars < 1:
            raise ConfigError(f"max_chars must be at least 1, got {self.max_chars}")
        for name in self.domains:
            check_domain(name)

    def rules(self, domain: str) -> Domain:
        """The rules of a domain, or ``defaults``."""
        return self.domains.get(domain, self.defaults)


def check_domain(name: str) -> str:
    """Check a domain's name, which becomes a folder name, and return it.

    Raises:
        ConfigError: not a valid name.
    """
    if not name or len(name) > 64 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in name):
        raise ConfigError(f"a domain must have 1 to 64 letters, digits, '-' and '_'; got {name[:80]!r}")
    return name


def load_recipe(path: Path) -> Recipe:
    """Load a recipe from TOML, or from a corpus's manifest.json.

    Raises:
        ConfigError: the file cannot be read or is not a recipe.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".json":
            return from_table(msgspec.json.decode(raw)["recipe"], Recipe, path.name)
        return from_table(tomllib.loads(raw.decode()), Recipe, path.name)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a recipe (TOML, or the manifest.json of a corpus): {error}") from None


def from_table(table: Any, kind: type[T], where: str) -> T:
    """Convert plain values to a struct of type ``kind``; ``where`` is used in error messages.

    Raises:
        ConfigError: a key is unknown, missing, or has the wrong type.
    """
    try:
        found = msgspec.convert(table, type=kind)
        refuse_not_finite(msgspec.to_builtins(found))
        return found
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except msgspec.ValidationError as error:
        message = str(error)
        if isinstance(error.__cause__, ConfigError):
            message = str(error.__cause__)
        if "unknown field" in message:
            key = message.split("`")[1]
            names = sorted(_field_names(kind, set()))
            near = difflib.get_close_matches(key, names, n=1)
            message += f". Did you mean {near[0]!r}?" if near else f". Keys: {', '.join(names)}"
        raise ConfigError(f"{where}: {message}") from None


def _field_names(kind: Any, seen: set[Any]) -> set[str]:
    if kind in seen:
        return set()
    seen.add(kind)
    names: set[str] = set()
    for field in msgspec.structs.fields(kind):
        names.add(field.name)
        for part in (field.type, *getattr(field.type, "__args__", ())):
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                names |= _field_names(part, seen)
    return names
