"""A tokenizers-library vocabulary (tokenizer.json), with the tokens that other files add to it.

The library does the work. What is ours: ids stay those of the files, also where the library would number anew; typed
control text never becomes a control id; every token has its exact bytes (``text.decoders``).

The same file is held in up to three forms:

    full     as it is: what a template writes
    plain    without control tokens, and with no piece a user could spell one with: what a user writes
    inner    plain, but nothing is put before the text: what continues a text
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text.added_tokens import AddedToken, Declared, added_token, check_gap, within_rows
from quadriga.text.decoders import ByteLevel, byte_alphabet, decoding_of, say_what_cannot_be_written, steps_of

logger = logging.getLogger(__name__)


class TokenizersVocabulary:
    """A tokenizer.json.

    Args:
        spec: its content.
        name: what errors call it.
        beside: what the files beside it say about single tokens.
        n_rows: tokens the model has; added tokens beyond are left out, with a logged line. None: all are kept.

    Raises:
        TokenizerError: the library cannot read it, an id has two texts, or a step is not understood.
    """

    def __init__(
        self, spec: Mapping[str, Any], name: str, *, beside: Declared | None = None, n_rows: int | None = None
    ) -> None:
        _check(spec, name)
        own = [added_token(entry, entry.get("id"), name) for entry in spec.get("added_tokens") or []]
        model = spec["model"]
        merged = (beside or Declared()).merged(own, _ids_of(model).get, lambda text: _is_word(model, text), name)
        self.added, self.left_out = within_rows(merged, n_rows, name)
        self._full_spec, self._name = _with_ids({**spec, "truncation": None, "padding": None}, self.added, name), name
        control = [token for token in self.added if token.control]
        self._plain_spec = _without(self._full_spec, control)
        self._plain = _load(self._plain_spec, name)
        self.special_ids = {token.content: token.id for token in control}
        self._control = {token.id: token.content for token in control}
        ids = set(self._plain.get_vocab(with_added_tokens=True).values()) - _fillers(self._full_spec)
        if not ids:
            raise TokenizerError(f"{name} has an empty vocabulary")
        self.n_vocab = max(ids) + 1
        self.unused_ids = frozenset(range(self.n_vocab)) - ids
        self._decoding = decoding_of(_written(self._plain.decoder), name)
        self.opening = self._decoding.opening
        self._every = not _opens_once(_written(self._plain.pre_tokenizer))
        # The library would read an added token's letters as bytes too; a token for "éé" is "éé".
        words = _ids_of(spec["model"]) if isinstance(self._decoding, ByteLevel) else {}
        self._added = {t.id: t.content for t in self.added if t.control or (words and t.content not in words)}
        _say_what_is_missing(self._full_spec, name)

    @cached_property
    def _full(self) -> Any:
        """The library's tokenizer with the control tokens: a chat does without, and building one takes long."""
        return _load(self._full_spec, self._name)

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """See Vocabulary."""
        return _ids(self._full if allow_special else self._plain, text)

    def encode_runs(self, runs: Iterable[str | int], *, continues: bool = False) -> list[int]:
        """See Vocabulary."""
        ids: list[int] = []
        opens = not continues
        for run in runs:
            if isinstance(run, int):
                ids.append(run)
                opens = self._every
            else:
                ids.extend(_ids(self._plain if opens else self._inner, run))
                opens = False
        return ids

    @cached_property
    def _inner(self) -> Any:
        spec = _without_prefix(self._plain_spec)
        return self._plain if spec == self._plain_spec else _load(spec, "tokenizer.json")

    def affixes(self, name: str) -> tuple[list[int], list[int]]:
        """Ids the file's own post-processor puts before and after a text.

        Raises:
            TokenizerError: it does something else to a text.
        """
        # A vocabulary of few words may have no token for one of these; then what is there stands before a text.
        for probe in ("a", "0", ".", ""):
            bare = self._full.encode(probe, add_special_tokens=False).ids
            dressed = self._full.encode(probe, add_special_tokens=True).ids
            for n in range(len(dressed) - len(bare) + 1) if bare else ():
                if dressed[n : n + len(bare)] == bare:
                    return list(dressed[:n]), list(dressed[n + len(bare) :])
            if not bare and not probe:
                return list(dressed), []
            if bare:
                break
        raise TokenizerError(f"{name}: its post-processor changes the tokens of a text, which is not understood")

    def token_id(self, text: str) -> int | None:
        """The id of a token by its text."""
        token_id = self.special_ids.get(text)
        token_id = self._plain.token_to_id(text) if token_id is None else token_id
        return None if token_id is None or token_id in self.unused_ids else int(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """See Vocabulary."""
        if token_id in self._added:
            return self._added[token_id].encode()
        return self._decoding.bytes_of(self._token(token_id))

    def first_bytes(self, token_id: int, opening: int) -> tuple[bytes, int]:
        """See Vocabulary."""
        return self._decoding.first(self._token(token_id), opening)

    def _token(self, token_id: int) -> str:
        if token_id in self._control:
            return self._control[token_id]
        token = None if token_id in self.unused_ids else self._plain.id_to_token(token_id)
        if token is None:
            raise TokenizerError(f"token id {token_id} is one of the vocabulary's unused ids")
        return str(token)


def _written(part: Any) -> dict[str, Any] | None:
    """A step of the library's tokenizer as a tokenizer.json has it, defaults written out."""
    if part is None:
        return None
    spec: dict[str, Any] = json.loads(part.__getstate__())
    return spec


def _ids(tokenizer: Any, text: str) -> list[int]:
    # The batch call leaves out offsets, which nobody here asks for: 1.4 times as fast.
    try:
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except Exception as error:  # the library's bare one: a Unigram model without an unknown token
        raise TokenizerError(f"the vocabulary cannot write {text!r:.80}: {error}") from None
    return ids


def _load(spec: Mapping[str, Any], name: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:
        # The library raises bare Exception with its parser's words; where it panics, what comes is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{name} is not a tokenizer the tokenizers library can read: {error}") from None


def _check(spec: Mapping[str, Any], name: str) -> None:
    if not isinstance(spec.get("model"), dict):
        raise TokenizerError(f"{name} must be an object with a 'model'; it is not a tokenizers file")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if not isinstance(spec.get(part), (dict, type(None))):
            raise TokenizerError(f"{name}: {part} must be an object or null, got {spec[part]!r:.80}")
    _check_model(spec["model"], name)
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise TokenizerError(f"{name}: every added token needs a text and an id below 2^24")


def _check_model(model: Mapping[str, Any], name: str) -> None:
    """Hold the lists to what is made of them here; the rest is for the library to refuse."""
    if not isinstance(model.get("unk_token"), (str, type(None))):
        raise TokenizerError(f"{name}: unk_token must be a text or null, got {model['unk_token']!r:.80}")
    vocab, merges = model.get("vocab"), model.get("merges", [])
    if isinstance(vocab, list) and not all(isinstance(row, list) and row and type(row[0]) is str for row in vocab):
        raise TokenizerError(f"{name}: a vocab that is a list must be of pairs, a text and its score")
    if isinstance(vocab, dict) and not all(type(token_id) is int for token_id in vocab.values()):
        raise TokenizerError(f"{name}: a vocab that is an object must map texts to ids")
    if not isinstance(merges, list) or not all(_is_pair(merge) for merge in merges):
        raise TokenizerError(f"{name}: merges must be a list of pairs of texts")


def _is_pair(merge: object) -> bool:
    if isinstance(merge, str):
        return " " in merge
    return isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str)


# Ids -----------------------------------------------------------------------------------------------------------------

_FILLER = "\ufdd0"
"""A character no text has (Unicode reserves it for programs): pieces named with it can be reached by nobody."""


def _ids_of(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        return {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    return vocab if isinstance(vocab, dict) else {}


def _with_ids(spec: dict[str, Any], tokens: Sequence[AddedToken], name: str) -> dict[str, Any]:
    """The spec with these added tokens under their own ids: the library numbers a text it has not by itself."""
    model = dict(spec["model"])
    vocab = model.get("vocab")
    texts = {i: text for text, i in _ids_of(model).items()}
    check_gap(max(texts, default=0), tokens, name)
    for token in tokens:
        if texts.get(token.id, token.content) != token.content:
            raise TokenizerError(f"{name}: the id {token.id} is both {texts[token.id]!r} and {token.content!r}")
    if _numbered_so(vocab, tokens):
        pass
    elif isinstance(vocab, dict):
        model["vocab"] = {**vocab, **{token.content: token.id for token in tokens}}
    elif isinstance(vocab, list):  # Unigram: a piece's id is its place
        by_id = {token.id: token.content for token in tokens}
        places = range(len(vocab), max(by_id, default=-1) + 1)
        score = vocab[0][1] if vocab else 0.0
        model["vocab"] = [*vocab, *([by_id.get(i, f"{_FILLER}{i}"), score] for i in places)]
    # What only a template may write is looked for as it stands, before a normaliser makes other text equal to it.
    added = [{**token.as_json(), "normalized": token.normalized and not token.control} for token in tokens]
    return {**spec, "model": model, "added_tokens": added}


def _is_word(model: Mapping[str, Any], text: str) -> bool:
    """True if ordinary text can become this entry of a vocabulary."""
    if text not in _ids_of(model):
        return False
    merges = model.get("merges")
    return not isinstance(merges, list) or len(text) == 1 or any(_touches(merge, {text: ""}) for merge in merges)


def _numbered_so(vocab: Any, tokens: Sequence[AddedToken]) -> bool:
    """True if the library numbers these tokens as their files do: on from the last id of the vocabulary."""
    if not isinstance(vocab, (dict, list)):
        return True  # no vocabulary: the library's own error says more
    known = vocab if isinstance(vocab, dict) else {entry[0] for entry in vocab}
    new = [token.id for token in tokens if token.content not in known]
    return new == list(range(len(vocab), len(vocab) + len(new)))


def _fillers(spec: Mapping[str, Any]) -> set[int]:
    vocab = spec["model"].get("vocab")
    return {i for i, (text, _) in enumerate(vocab) if text.startswith(_FILLER)} if isinstance(vocab, list) else set()


def _without(spec: Mapping[str, Any], control: Sequence[AddedToken]) -> dict[str, Any]:
    """The spec without its control tokens, and with their pieces, where the model has some, out of reach."""
    names = {token.content: f"{_FILLER}{secrets.token_hex(8)}" for token in control}
    model = dict(spec["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): i for text, i in vocab.items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model and _may_touch(model["merges"], names):
            model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    # Each leaves a token that nobody can write in its place: the library numbers added tokens by their order.
    flags = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    added = [
        {"id": entry["id"], "content": names[entry["content"]], **flags} if entry["content"] in names else entry
        for entry in spec["added_tokens"]
    ]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}


def _may_touch(merges: Sequence[str | Sequence[str]], names: Iterable[str]) -> bool:
    """False if no merge reads or makes one of these texts: a quick look that is nearly always enough."""
    halves = "\n".join(merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in merges)
    return any(name in halves for name in names)


def _touches(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


# Beginnings ----------------------------------------------------------------------------------------------------------


def _opens_once(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """True if a space is put before the first word of a text only, not after every added token as well."""
    steps = steps_of(pre_tokenizer, "pretokenizers")
    return any(step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps)


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with everything taken out that is put before a text."""

    def changed(step: Any, parts: str) -> Any:
        if not isinstance(step, dict):
            return step
        match step.get("type"):
            case "Sequence":
                inner = [changed(part, parts) for part in step.get(parts) or []]
                return {**step, parts: [part for part in inner if part is not None]}
            case "Prepend":
                return None
            case "Metaspace":
                rest = {key: value for key, value in step.items() if key != "add_prefix_space"}
                return {**rest, "prepend_scheme": "never"}
            case "ByteLevel":
                return {**step, "add_prefix_space": False}
        return step

    return {
        **spec,
        "normalizer": changed(spec.get("normalizer"), "normalizers"),
        "pre_tokenizer": changed(spec.get("pre_tokenizer"), "pretokenizers"),
    }


def _say_what_is_missing(spec: Mapping[str, Any], name: str) -> None:
    model = spec["model"]
    vocab = _ids_of(model)
    steps = [str(step.get("type")) for step in steps_of(spec.get("pre_tokenizer"), "pretokenizers")]
    steps += [str(step.get("type")) for step in steps_of(spec.get("normalizer"), "normalizers")]
    if "ByteLevel" in steps:
        missing = [byte for character, byte in byte_alphabet().items() if character not in vocab]
    else:
        missing = [b for b in range(256) if not model.get("byte_fallback") or f"<0x{b:02X}>" not in vocab]
    unknown = model.get("unk_token") if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    say_what_cannot_be_written(name, missing, f"becomes {unknown} and is lost" if unknown else "is left out")
