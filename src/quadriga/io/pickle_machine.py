"""A machine that walks a pickle without being able to run anything: the base of the readers of foreign pickles.

Python's unpickler imports and calls whatever a file names. This one knows the few opcodes that arrays in dictionaries
consist of; names are looked up in the reader's own table of inert markers, and what a marker may be called with is the
reader's decision. Every other opcode, name or call ends in an error. No torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from os import SEEK_CUR
from typing import Any, BinaryIO, NamedTuple

from quadriga.errors import CheckpointError

_MAX_STRING_BYTES = 1 << 16

# Opcodes that write a value out, and the struct format of the number, or of the length, that follows them.
_INTEGERS = {b"K": "B", b"M": "H", b"J": "i"}
_TEXTS = {b"\x8c": "B", b"X": "I", b"\x8d": "Q"}
_BYTES = {b"C": "B", b"B": "I", b"\x8e": "Q", b"\x96": "Q"}
_LITERALS = frozenset((b"N", b"\x88", b"\x89", b")", b"}", b"\x8a", *_INTEGERS, *_TEXTS, *_BYTES))


@dataclass
class Bytes:
    """Data left in the file."""

    offset: int
    length: int


class Name(NamedTuple):
    """A global the file mentions; nothing is imported."""

    meaning: str


class PickleMachine:
    """Walks one pickle. Values are None, numbers, strings, tuples, lists, dicts and the reader's inert classes.

    Args:
        file: the pickle, positioned at its start.
        name: of the file, for messages.
        size: where the file ends.
        max_opcodes: how long it may be.
    """

    names: Mapping[tuple[str, str], Name] = {}
    """(module, attribute) -> what it stands for."""
    wanted = "a tensor file"
    """What the file must be, for messages."""

    def __init__(self, file: BinaryIO, name: str, size: int, max_opcodes: int) -> None:
        self.file, self.name, self.size, self.max_opcodes = file, name, size, max_opcodes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def fail(self, message: str) -> CheckpointError:
        """The error that says what has no place in the file."""
        return CheckpointError(
            f"{self.name} is not {self.wanted}: {message}. Only pickled arrays are read, nothing else."
        )

    def call(self, callee: object, arguments: object) -> Any:
        """What calling a marker gives."""
        raise self.fail("it calls something that builds no array")

    def build(self, target: object, state: object) -> Any:
        """What an object becomes when its state is set."""
        raise self.fail("it sets the state of something that is no array")

    def new(self, callee: object, arguments: object) -> Any:
        """What making an object of a marked class gives."""
        raise self.fail("it makes an object that is no array")

    def persistent(self, identity: object) -> Any:
        """What a reference to data outside the pickle stands for."""
        raise self.fail("it refers to data that is not in it")

    def take(self, n: int) -> bytes:
        """The next bytes of the pickle itself."""
        if n > _MAX_STRING_BYTES:
            raise self.fail(f"a string of {n} bytes")
        raw = self.file.read(n)
        if len(raw) < n:
            raise self.fail("it is cut short")
        return raw

    def number(self, code: str) -> int:
        """The next number, little-endian."""
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def line(self) -> str:
        """The rest of the line."""
        raw = self.file.readline(256)
        if not raw.endswith(b"\n"):
            raise self.fail("a name without an end")
        return raw[:-1].decode("ascii", errors="replace")

    def skip(self, length: int) -> Bytes:
        """Leave data where it is."""
        offset = self.file.tell()
        if length > self.size - offset:
            raise self.fail("it is cut short")
        self.file.seek(length, SEEK_CUR)
        return Bytes(offset, length)

    def pop(self) -> Any:
        """The top of the stack."""
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise self.fail("its opcodes do not fit together")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark."""
        if not self.marks:
            raise self.fail("its opcodes do not fit together")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def run(self) -> Any:
        """Walk to the end; returns what the pickle stands for."""
        for _ in range(self.max_opcodes):
            code = self.take(1)
            if code == b".":
                return self.pop()
            self.step(code)
        raise self.fail(f"more than {self.max_opcodes} opcodes")

    def step(self, code: bytes) -> None:
        """Carry out one opcode."""
        if code in _LITERALS:
            self.stack.append(self.literal(code))
            return
        push = self.stack.append
        match code:
            case b"\x80":  # protocol
                if self.number("B") > 5:
                    raise self.fail("an unknown pickle protocol")
            case b"\x95":  # frame
                self.number("Q")
            case b"c":
                push(self.named(self.line(), self.line()))
            case b"\x93":
                attribute, module = self.pop(), self.pop()
                push(self.named(module, attribute))
            case b"(":
                self.marks.append(len(self.stack))
            case b"t":
                push(tuple(self.pop_mark()))
            case b"\x85" | b"\x86" | b"\x87":
                items = [self.pop() for _ in range(code[0] - 0x84)]
                push(tuple(reversed(items)))
            case b"Q":
                push(self.persistent(self.pop()))
            case b"s":
                value, key = self.pop(), self.pop()
                self.assign([key, value])
            case b"u":
                self.assign(self.pop_mark())
            case b"q" | b"r" | b"\x94":
                key = len(self.memo) if code == b"\x94" else self.number("B" if code == b"q" else "I")
                self.memo[key] = self.stack[-1] if self.stack else None
            case b"h" | b"j":
                push(self.memo.get(self.number("B" if code == b"h" else "I")))
            case b"R":
                arguments, callee = self.pop(), self.pop()
                push(self.call(callee, arguments))
            case b"\x81":  # cls.__new__(*args)
                arguments, callee = self.pop(), self.pop()
                push(self.new(callee, arguments))
            case b"b":
                state, target = self.pop(), self.pop()
                push(self.build(target, state))
            case _:
                raise self.fail(f"the opcode {code!r} has no place in an array")

    def literal(self, code: bytes) -> Any:
        """The value an opcode of ``_LITERALS`` writes out."""
        match code:
            case b"N":
                return None
            case b"\x88" | b"\x89":
                return code == b"\x88"
            case b")":
                return ()
            case b"}":
                return {}
            case b"\x8a":  # a long integer, of at most eight bytes here
                return int.from_bytes(self.take(min(self.number("B"), 8)), "little", signed=True)
        if code in _INTEGERS:
            return self.number(_INTEGERS[code])
        if code in _TEXTS:
            return self.take(self.number(_TEXTS[code])).decode("utf-8", "replace")
        return self.skip(self.number(_BYTES[code]))

    def named(self, module: object, attribute: object) -> Name:
        """The marker of a global."""
        # Only text is shown: a tuple that holds itself many times over would be written out for ever.
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise self.fail("a name that is no text")
        name = self.names.get((module, attribute))
        if name is None:
            raise self.fail(f"it names {module[:60]}.{attribute[:60]}")
        return name

    def sizes(self, value: object) -> tuple[int, ...]:
        """A tuple of at most four sizes, or the error."""
        if not isinstance(value, tuple) or len(value) > 4:
            raise self.fail("an array without sizes, or of more than four axes")
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in value):
            raise self.fail("an array whose sizes are no whole numbers below 2^31")
        return value

    def assign(self, items: list[Any]) -> None:
        """Put keys and values into the dict on top of the stack."""
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(k, str) for k in items[::2]):
            raise self.fail("its opcodes do not fit together")
        target.update(zip(items[::2], items[1::2], strict=True))
