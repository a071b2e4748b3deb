"""SentencePiece model files: what is in them, how they are changed, and the vocabulary they make.

The file is a protocol buffer (sentencepiece_model.proto, google/sentencepiece); the few fields that matter are read and
written here, everything else is carried over as it is. Segmentation is the library's own.

Added tokens are found first, and what lies between them is encoded piece by piece. Whether a piece of text gets the
space that such a vocabulary writes before a first word depends on who trained with it:

    every=True    after every added token, as at the beginning (LLaMA's "legacy" tokenizers, llama.cpp)
    every=False   at the beginning of the text only
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from quadriga.errors import TokenizerError
from quadriga.text.added_tokens import AddedToken, Splitter
from quadriga.text.decoders import byte_of, say_what_cannot_be_written, sentencepiece_decoding

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, the same numbers in SentencePiece's model file and in GGUF."""
UNIGRAM, BPE = 1, 2
_SCORE = struct.Struct("<f")
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class Model:
    """A model file."""

    pieces: list[Piece]
    model_type: int = BPE
    byte_fallback: bool = False
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    """SentencePiece's compiled normalisation; empty for none."""
    rest: bytes = field(default=b"", repr=False)
    """The file without its pieces; empty where there is none yet."""
    own: bytes = field(default=b"", repr=False)
    """The pieces as the file has them; empty where they are other ones."""

    def with_pieces(self, changed: Mapping[int, Piece]) -> Model:
        """The same model with some pieces changed, or more of them."""
        if not changed:
            return self
        n = max(len(self.pieces), max(changed) + 1)
        pieces = [*self.pieces, *(Piece(f"[PAD{i}]", kind=UNUSED) for i in range(len(self.pieces), n))]
        for i, piece in changed.items():
            pieces[i] = piece
        return replace(self, pieces=pieces, own=b"")

    def to_bytes(self, *, add_space_prefix: bool | None = None) -> bytes:
        """The model file; ``add_space_prefix`` overrides the model's own."""
        pieces = self.own or b"".join(map(_written, self.pieces))
        prefix = self.add_space_prefix if add_space_prefix is None else add_space_prefix
        # Fields of one message that come again, later, replace the earlier ones.
        return pieces + (self.rest or self._head()) + _block(3, _int(3, int(prefix)))

    def _head(self) -> bytes:
        kinds = [piece.kind for piece in self.pieces]
        unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
        trainer = _int(3, self.model_type) + _int(35, int(self.byte_fallback)) + _int(40, unknown)
        name = _block(1, b"identity" if not self.charsmap else b"user_defined")
        normaliser = name + _block(2, self.charsmap) + _int(4, int(self.remove_extra_whitespaces)) + _int(5, 1)
        return _block(2, trainer) + _block(3, normaliser)


def parse(raw: bytes, name: str) -> Model:
    """Read a model file.

    Raises:
        TokenizerError: no model file, or one that asks for what is not understood.
    """
    try:
        bodies, own, top = _split(raw)
        pieces = list(map(_piece, bodies))
        trainer = _message(top, 2)
        normaliser, denormaliser = _message(top, 3), _message(top, 5)
    except (IndexError, ValueError, struct.error):
        raise TokenizerError(f"{name} is not a SentencePiece model") from None
    if not pieces:
        raise TokenizerError(f"{name} is not a SentencePiece model: it has no pieces")
    model_type = trainer.get(3, UNIGRAM)
    if trainer.get(24):
        raise TokenizerError(f"{name} writes spaces after words (treat_whitespace_as_suffix), which is not understood")
    if denormaliser.get(2):
        raise TokenizerError(f"{name} has a denormalizer, which is not understood")
    charsmap = normaliser.get(2, b"")
    return Model(
        pieces,
        model_type=model_type if isinstance(model_type, int) else UNIGRAM,
        byte_fallback=bool(trainer.get(35, 0)),
        add_space_prefix=bool(normaliser.get(3, 1)),
        remove_extra_whitespaces=bool(normaliser.get(4, 1)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        rest=b"".join(written for _, _, written in top),
        own=own,
    )


def with_tokens(model: Model, tokens: Iterable[AddedToken], name: str) -> Model:
    """The model with added tokens as pieces of their own: control tokens where only templates may write them.

    Ids between the model's last piece and an added token are filled with pieces that stand for nothing.

    Raises:
        TokenizerError: an id that is another piece's already.
    """
    changed: dict[int, Piece] = {}
    for token in tokens:
        kind = CONTROL if token.control else USER_DEFINED
        known = model.pieces[token.id] if token.id < len(model.pieces) else Piece(token.content, kind=UNUSED)
        if known.text != token.content and known.kind != UNUSED:
            raise TokenizerError(f"{name}: the id {token.id} is both {known.text!r} and {token.content!r}")
        if known.kind not in (UNKNOWN, CONTROL, BYTE, kind):
            changed[token.id] = replace(known, text=token.content, kind=kind)
    return model.with_pieces(changed)


class SentencePieceVocabulary:
    """A model and the tokens added to it.

    Args:
        model: the model, with a piece for every added token.
        name: what errors call it.
        added: looked for before anything else: control tokens in templates only, others in any text.
        every: see the module docstring.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        added: Sequence[AddedToken] = (),
        every: bool = True,
    ) -> None:
        self.model, self._every, self.n_vocab = model, every, len(model.pieces)
        # The library would find an added token anywhere, whatever its flags.
        found_here = {token.id: model.pieces[token.id] for token in added}
        self._typable = model.with_pieces(
            {i: replace(piece, kind=CONTROL) for i, piece in found_here.items() if piece.kind == USER_DEFINED}
        )
        self._first = _load(self._typable.to_bytes(), name)
        of_model = [
            AddedToken(id=i, content=piece.text, special=True)
            for i, piece in enumerate(model.pieces)
            if piece.kind in (CONTROL, UNKNOWN)
        ]
        control = {token.content: token for token in [*of_model, *(token for token in added if token.control)]}
        self.special_ids = {text: token.id for text, token in control.items()}
        plain = [token for token in added if not token.control]
        self._meant, self._typed = Splitter([*control.values(), *plain]), Splitter(plain)
        self._shown = frozenset(token.content for token in plain)
        self._decoding = sentencepiece_decoding(
            byte_fallback=True,
            add_space_prefix=model.add_space_prefix,
            remove_extra_whitespaces=model.remove_extra_whitespaces,
        )
        self.opening = self._decoding.opening
        self.unused_ids = frozenset(i for i, piece in enumerate(model.pieces) if piece.kind == UNUSED)
        self.bos, self.eos, self.pad = (
            i if i >= 0 else None for i in (self._first.bos_id(), self._first.eos_id(), self._first.pad_id())
        )
        _say_what_is_missing(model, name)

    @cached_property
    def _inner(self) -> Any:
        """The same model for text that continues a text."""
        return _load(self._typable.to_bytes(add_space_prefix=False), "the SentencePiece model")

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """See Vocabulary."""
        return self._encode_parts((self._meant if allow_special else self._typed).split(text), opens=True)

    def encode_runs(self, runs: Iterable[str | int], *, continues: bool = False) -> list[int]:
        """See Vocabulary."""
        parts = [part for run in runs for part in ([run] if isinstance(run, int) else self._typed.split(run))]
        return self._encode_parts(parts, opens=not continues)

    def _encode_parts(self, parts: Iterable[str | int], *, opens: bool) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                opens = self._every
            else:
                # What opens a text once only is not put before a space that is there already (Metaspace's "first").
                put = opens and (self._every or not part.startswith((" ", "▁")))
                model = self._first if put or not self.model.add_space_prefix else self._inner
                ids.extend(model.EncodeAsIds(part))
                opens = False
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """See Vocabulary."""
        piece = self.model.pieces[token_id]
        if piece.kind == BYTE and (byte := byte_of(piece.text)) is not None:
            return byte
        if piece.kind in (CONTROL, UNKNOWN) or piece.text in self._shown:
            return piece.text.encode()
        return piece.text.replace("▁", " ").encode()

    def first_bytes(self, token_id: int, opening: int) -> tuple[bytes, int]:
        """See Vocabulary."""
        return self._decoding.first_of(self.token_bytes(token_id), opening)


def _load(proto: bytes, name: str) -> Any:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise TokenizerError(f"{name} is not a SentencePiece model: {error}") from None
    return model


def _say_what_is_missing(model: Model, name: str) -> None:
    there = {piece.text for piece in model.pieces if piece.kind == BYTE} if model.byte_fallback else set()
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), "<unk>")
    missing = [b for b in range(256) if f"<0x{b:02X}>" not in there]
    say_what_cannot_be_written(name, missing, f"becomes {unknown} and is lost")


# The file ------------------------------------------------------------------------------------------------------------


def _varint(n: int) -> bytes:
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _block(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _written(piece: Piece) -> bytes:
    """A piece as a field of the file."""
    text = piece.text.encode()
    if len(text) < 100 and piece.kind < 0x80:  # one byte for every length, as for nearly all
        return b"\n%c\n%c%b\x15%b\x18%c" % (len(text) + 9, len(text), text, _SCORE.pack(piece.score), piece.kind)
    return _block(1, _block(1, text) + b"\x15" + _SCORE.pack(piece.score) + _int(3, piece.kind))


def _split(raw: bytes) -> tuple[list[bytes], bytes, list[tuple[int, int | bytes, bytes]]]:
    """The pieces' messages, the same as the file has them, and the other fields as (number, value, as written)."""
    bodies: list[bytes] = []
    others: list[tuple[int, int | bytes, bytes]] = []
    own: list[bytes] = []
    at, end, run = 0, len(raw), 0
    while at < end:
        if raw[at] == 0x0A and raw[at + 1] < 0x80:  # a piece of under 128 bytes, as nearly all of a file is
            start, at = at + 2, at + 2 + raw[at + 1]
            bodies.append(raw[start:at])
            continue
        start = at
        number, value, at = _field(raw, start)
        if number == 1 and isinstance(value, bytes):
            bodies.append(value)
        else:
            others.append((number, value, raw[start:at]))
            own.append(raw[run:start])
            run = at
    if at > end:
        raise ValueError("the file ends inside a piece")
    return bodies, b"".join([*own, raw[run:]]), others


def _fields(raw: bytes) -> dict[int, int | bytes]:
    """The fields of a message by number; later ones win."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(raw):
        number, value, at = _field(raw, at)
        found[number] = value
    return found


def _field(raw: bytes, at: int) -> tuple[int, int | bytes, int]:
    """(number, value, where the next begins): a varint as int, anything else as its bytes."""
    key, at = _read_varint(raw, at)
    number, wire = key >> 3, key & 7
    if wire == 0:
        value, at = _read_varint(raw, at)
        return number, value, at
    if wire not in (1, 2, 5):
        raise ValueError("no such wire type")
    n = {1: 8, 5: 4}.get(wire, 0)
    if wire == 2:
        n, at = _read_varint(raw, at)
    if at + n > len(raw) or number == 0:
        raise ValueError("the file ends inside a field")
    return number, raw[at : at + n], at + n


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def _message(top: list[tuple[int, int | bytes, bytes]], number: int) -> dict[int, int | bytes]:
    """The fields of a message, also where it comes in several parts."""
    return _fields(b"".join(body for n, body, _ in top if n == number and isinstance(body, bytes)))


def _piece(body: bytes) -> Piece:
    if body[:1] == b"\n" and len(body) > 2 and len(body) - body[1] in (7, 9) and body[2 + body[1]] == 0x15:
        n = 2 + body[1]  # as every trainer writes it: text, score, and the type where it is not the usual one
        kind = NORMAL if len(body) == n + 5 else body[n + 6]
        if len(body) == n + 5 or (body[n + 5] == 0x18 and kind < 0x80):
            return Piece(body[2:n].decode(), _SCORE.unpack_from(body, n + 1)[0], kind)
    found = _fields(body)
    text, score, of_kind = found.get(1, b""), found.get(2, b"\0\0\0\0"), found.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(of_kind, int):
        raise ValueError("a piece is of other types")
    return Piece(text.decode(), _SCORE.unpack(score)[0], of_kind)
