"""What a corpus is made of and how: frozen structs, from TOML or from a finished corpus's manifest.

    chunk = "8MB"                                   # of input text; a shard each
    [[sources]]
    paths = ["data:corpus/mix.jsonl"]               # files, folders, globs; data: is the data folder
    domain_field = "domain"
    [domains.code]
    kind = "code"                                   # which quality rules; prose is the default
    [domains.en]
    languages = ["en"]
    [decontaminate]
    paths = ["data:bench"]
    [tokenizer]
    train = 8192                                    # or path = "cl100k_base" | a file | a folder

Every value ends up in the manifest, defaults included: the manifest is a recipe.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from quadriga.errors import ConfigError

T = TypeVar("T")


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files of one form."""

    paths: list[str]
    text: str = "text"
    """The field of a row that holds the text (JSONL, Parquet). A .txt or .md file is one document."""
    domain: str | None = None
    """Name of the domain of all rows; None takes ``domain_field``, or the file's name where that is None too."""
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
    """Limits of running text; a document outside any of them is dropped and counted under that name.

    The measures are those of Rae et al. 2021 (Gopher), A1.1, with one word per character where a script writes none.
    """

    min_words: int = 50
    mean_word_length: tuple[float, float] = (2.5, 12.0)
    min_letters: float = 0.5
    """Share of the visible characters that are letters, digits or marks."""
    max_symbols: float = 0.1
    """'#', '…' and '...' for each word."""
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    max_repeated_lines: float = 0.3
    """Share of characters in lines that came before."""
    max_repeated_phrases: float = 0.3
    """Share of words inside a run of 10 words that came before."""
    max_replacement: float = 0.001
    """Share of U+FFFD: text that was decoded wrongly."""


class CodeRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of source code (the measures of Chen et al. 2021, section 3.1)."""

    min_words: int = 20
    max_line_length: int = 1000
    max_mean_line_length: float = 100.0
    min_letters: float = 0.25
    allow_generated: bool = False
    max_replacement: float = 0.001


class Domain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a document of a domain must be."""

    kind: Literal["prose", "code", "any"] = "prose"
    languages: list[str] = []
    """ISO 639-1 codes to keep; [] keeps all."""
    min_language_score: float = 0.4
    prose: ProseRules = ProseRules()
    code: CodeRules = CodeRules()


class Duplicates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exact and near duplicates; of each group the first document stays, held-out documents before all others.

    Two documents whose word 5-grams overlap by s (Jaccard) meet with probability 1 - (1 - s^rows)^bands.
    """

    exact: bool = True
    near: bool = True
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    min_similarity: float = 0.7
    """Pairs that met are joined if their signatures agree in at least this share."""
    seed: int = 1
    partitions: int = 1
    """Tasks per band; raise it until a band's keys (8 bytes a document) fit into a worker."""

    def __post_init__(self) -> None:
        for name in ("ngram", "bands", "rows", "partitions"):
            if not 1 <= getattr(self, name) <= 1024:
                raise ConfigError(f"duplicates.{name} must be from 1 to 1024, got {getattr(self, name)}")


class Decontaminate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Take out what benchmarks contain (Brown et al. 2020, appendix C)."""

    paths: list[str] = []
    """Benchmark files or folders (.jsonl, .json, .txt): every string in them is held against the text."""
    ngram: int = 13
    margin_chars: int = 200
    """Cut this much around a match; what is left on both sides goes on as separate documents."""
    max_pieces: int = 10
    """A document that falls into more pieces is dropped whole."""
    min_chars: int = 200
    """Shorter pieces are dropped."""


class TokenizerChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A vocabulary that exists (path) or is trained on the kept documents (train)."""

    path: str | None = None
    """A file, a folder, another corpus, or a catalogue name such as cl100k_base."""
    train: int | None = None
    """Size of a byte-level BPE."""
    train_bytes: int = 100_000_000
    """Text to train it on; documents are taken evenly over the corpus."""
    end_token: str | None = None
    """Ends every document; None takes <|endoftext|>, or the vocabulary's own end of text."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.train is None):
            raise ConfigError("tokenizer needs exactly one of path and train")
        if self.train is not None and not 300 <= self.train <= 2**20:
            raise ConfigError(f"tokenizer.train must be from 300 to {2**20} tokens, got {self.train}")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A corpus, from files to shards."""

    sources: list[Source]
    tokenizer: TokenizerChoice
    domains: dict[str, Domain] = {}
    """Rules by domain; a domain that is not here gets ``defaults``."""
    defaults: Domain = Domain()
    duplicates: Duplicates = Duplicates()
    decontaminate: Decontaminate = Decontaminate()
    held_out: float = 0.0
    """Share of documents, by hash, that goes to the held-out split (besides sources whose split that is)."""
    chunk: str = "8MB"
    """Input text of a chunk. Takes part in the result: chunks are shards."""
    max_chars: int = 5_000_000
    """Longer documents are dropped and counted: no known tokenizer or filter is made for them."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("a recipe needs at least one [[sources]]")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out must be from 0 to below 1, got {self.held_out}")
        for name in self.domains:
            check_domain(name)

    def rules(self, domain: str) -> Domain:
        """The rules of a domain."""
        return self.domains.get(domain, self.defaults)


def check_domain(name: str) -> str:
    """``name`` if it can be a domain: it becomes a folder.

    Raises:
        ConfigError: it cannot.
    """
    if not name or len(name) > 64 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in name):
        raise ConfigError(f"a domain is 1 to 64 letters, digits, '-' and '_'; got {name[:80]!r}")
    return name


def load_recipe(path: Path) -> Recipe:
    """A recipe from TOML, or the one inside a corpus's manifest.json.

    Raises:
        ConfigError: it cannot be read or is no recipe.
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
    """Plain values as a struct; an unknown key names its nearest neighbour.

    Raises:
        ConfigError: a key is unknown, missing, or has the wrong type.
    """
    try:
        return msgspec.convert(table, type=kind)
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
