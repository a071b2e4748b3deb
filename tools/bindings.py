"""Writes Python's side of the CPU kernels' C interface from the one place where it is stated, ``csrc/quadriga.h``.

    python tools/bindings.py           write kernels/cpu/bindings.py and csrc/fields.inl  (make bindings)
    python tools/bindings.py --check   exit with 1 if they are not what would be written  (make check)

The header is the part of C that its first comment lists. What is not of it is an error that names the line, so that
nothing is bound wrongly or left out: a struct by a pointer's mistake, a function without a status, an enum with a hole.
"""

from __future__ import annotations

import hashlib
import keyword
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CPU = Path(__file__).resolve().parent.parent / "src/quadriga/kernels/cpu"

SCALARS = {"int32_t": "c_int32", "int64_t": "c_int64", "uint8_t": "c_uint8", "float": "c_float", "double": "c_double"}
"""C type -> ctypes's."""


class HeaderError(Exception):
    """Something the generator does not read, and where."""


@dataclass(frozen=True)
class Declared:
    """A field or a parameter: ``const TYPE** name[length]``."""

    name: str
    type: str
    stars: int
    length: int
    """0: no array."""


@dataclass
class Interface:
    """What a header states, in its order."""

    sha256: str
    constants: dict[str, int] = field(default_factory=dict)
    enums: dict[str, list[str]] = field(default_factory=dict)
    """C name -> enumerators without their prefix; their numbers count up from 0."""
    opaque: list[str] = field(default_factory=list)
    structs: dict[str, list[Declared]] = field(default_factory=dict)
    functions: dict[str, list[Declared]] = field(default_factory=dict)
    """That return a status."""
    constant_data: dict[str, str] = field(default_factory=dict)
    """Functions without parameters that return a pointer to data: name -> ctypes expression."""


# Reading -------------------------------------------------------------------------------------------------------------

_STATEMENTS = {
    "enum": re.compile(r"enum\s+(qd_\w+)\s*\{([^{}]*)\}\s*;"),
    "opaque": re.compile(r"typedef\s+struct\s+(qd_\w+)\s+(qd_\w+)\s*;"),
    "struct": re.compile(r"typedef\s+struct\s*\{([^{}]*)\}\s*(qd_\w+)\s*;"),
    "function": re.compile(r"int32_t\s+(qd_\w+)\s*\(([^()]*)\)\s*;"),
    "data": re.compile(r"const\s+(char|qd_\w+)\s*\*\s*(qd_\w+)\s*\(\s*void\s*\)\s*;"),
}
_DECLARED = re.compile(r"(?:const\s+)?(\w+)(?:\s+|\s*(\*+)\s*)(\w+)\s*(?:\[(\d+)\])?")
_PREPROCESSOR = re.compile(r"#(ifndef QUADRIGA_H|define QUADRIGA_H|include <stdint\.h>|endif)")


def read(text: str) -> Interface:
    """The interface that a header states.

    Raises:
        HeaderError: a line that is no part of the C this reads.
    """
    interface = Interface(hashlib.sha256(text.encode()).hexdigest())
    bare = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    bare = re.sub(r'#ifdef __cplusplus\n(extern "C" \{|\})\n#endif', "\n\n", bare)
    body = "\n".join(_preprocessed(interface, bare.split("\n")))
    at = 0
    while True:
        at += len(body[at:]) - len(body[at:].lstrip())
        if at == len(body):
            return interface
        try:
            at = _statement(interface, body, at)
        except HeaderError as error:
            raise HeaderError(f"line {body.count(chr(10), 0, at) + 1}: {error}") from None


def _preprocessed(interface: Interface, lines: list[str]) -> Iterator[str]:
    """The lines without the preprocessor's, which are checked; constants are taken from them."""
    for number, line in enumerate(lines, 1):
        constant = re.fullmatch(r"#define QD_(\w+) (\d+)\s*", line)
        if constant is not None:
            interface.constants[constant[1]] = int(constant[2])
        elif line.startswith("#") and not _PREPROCESSOR.fullmatch(line.rstrip()):
            raise HeaderError(f"line {number}: {line!r} is no preprocessor line that is read here")
        yield "" if line.startswith("#") else line


def _statement(interface: Interface, body: str, at: int) -> int:
    """Take the statement that begins at ``at``; where it ends."""
    for kind, pattern in _STATEMENTS.items():
        match = pattern.match(body, at)
        if match is not None:
            _take(interface, kind, *match.groups())
            return match.end()
    raise HeaderError(f"{body[at:].splitlines()[0]!r} is no statement that is read here")


def _take(interface: Interface, kind: str, first: str, second: str) -> None:
    name = first if kind in ("enum", "opaque", "function") else second
    taken = (interface.enums, interface.opaque, interface.structs, interface.functions, interface.constant_data)
    if any(name in names for names in taken):
        raise HeaderError(f"{name} is stated twice")
    match kind:
        case "enum":
            interface.enums[name] = _enumerators(name, second)
        case "opaque":
            if first != second:
                raise HeaderError(f"typedef struct {first} {second}: an opaque struct has one name")
            interface.opaque.append(name)
        case "struct":
            *declarations, rest = first.split(";")
            if rest.strip() or not declarations:
                raise HeaderError(f"the fields of {name} end with {rest.strip()!r}")
            interface.structs[name] = [one for text in declarations for one in _declared(interface, text)]
        case "function":
            parameters = [one for text in second.split(",") for one in _declared(interface, text)]
            if parameters[-1] != Declared("why", "qd_message", 1, 0):
                raise HeaderError(f"{name} returns a status, so its last parameter is `qd_message* why`")
            interface.functions[name] = parameters
        case "data":
            interface.constant_data[name] = _ctypes_of(interface, Declared(name, first, 1, 0))


def _enumerators(name: str, text: str) -> list[str]:
    prefix, names = name.upper() + "_", []
    for number, one in enumerate(text.split(",")):
        match = re.fullmatch(rf"\s*{prefix}(\w+)\s*=\s*{number}\s*", one)
        if match is None:
            raise HeaderError(f"enum {name}: number {number} must be {prefix}... = {number}, got {one.strip()!r}")
        names.append(match[1])
    return names


def _declared(interface: Interface, text: str) -> Iterator[Declared]:
    """``int64_t rows, cols`` or one pointer, array or struct."""
    first, *others = text.split(",")
    match = _DECLARED.fullmatch(first.strip())
    if match is None:
        raise HeaderError(f"{text.strip()!r} is no declaration that is read here")
    type_, stars, name, length = match.groups()
    if others and (stars or length):
        raise HeaderError(f"{text.strip()!r}: pointers and arrays are declared one at a time")
    for one in (name, *(other.strip() for other in others)):
        if not one.isidentifier():
            raise HeaderError(f"{text.strip()!r} is no declaration that is read here")
        declared = Declared(one, type_, len(stars or ""), int(length or 0))
        _ctypes_of(interface, declared)  # raises
        yield declared


def _ctypes_of(interface: Interface, one: Declared) -> str:
    """The ctypes expression for a declaration."""
    match one:
        case Declared(type="char", stars=0, length=n) if n:
            return f"c.c_char * {n}"
        case Declared(type="char", stars=1, length=0):
            return "c.c_char_p"
        case Declared(type=scalar, stars=0, length=0) if scalar in SCALARS:
            return f"c.{SCALARS[scalar]}"
        case Declared(type=scalar, stars=1, length=0) if scalar in SCALARS or scalar == "void":
            return "c.c_void_p"
        case Declared(type=struct, stars=0, length=0) if struct in interface.structs:
            return _python_name(struct)
        case Declared(type=struct, stars=1, length=0) if struct in interface.structs:
            return f"c.POINTER({_python_name(struct)})"
        case Declared(type=struct, stars=2, length=0) if struct in interface.structs:
            return "c.c_void_p"  # addresses of several
        case Declared(type=handle, stars=1, length=0) if handle in interface.opaque:
            return "c.c_void_p"
        case Declared(type=handle, stars=2, length=0) if handle in interface.opaque:
            return "c.POINTER(c.c_void_p)"
        case _:
            raise HeaderError(f"{one.type}{'*' * one.stars} {one.name}: no such type, or none that Python can be given")


def _python_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.removeprefix("qd_").split("_"))


# Writing -------------------------------------------------------------------------------------------------------------


def bindings(interface: Interface) -> str:
    """kernels/cpu/bindings.py: every line such that ``ruff format`` leaves it alone."""
    out = [
        '"""The CPU kernels\' structs, enums and functions. Written by tools/bindings.py from csrc/quadriga.h.',
        "",
        'Do not edit: change the header and run ``make bindings``; ``kernels/cpu/library.py`` uses what is here."""',
        "",
        "from __future__ import annotations",
        "",
        "import ctypes as c",
        "from enum import IntEnum",
        "from typing import Any",
        "",
        f'HEADER_SHA256 = "{interface.sha256}"',
        *(f"{name} = {value}" for name, value in interface.constants.items()),
    ]
    for name, members in interface.enums.items():
        out += ["", "", f"class {_python_name(name)}(IntEnum):", f'    """enum {name}"""', ""]
        out += [f"    {member} = {number}" for number, member in enumerate(members)]
    for name, fields in interface.structs.items():
        out += ["", "", f"class {_python_name(name)}(c.Structure):", f'    """struct {name}"""', ""]
        out += ["    _fields_ = ["]
        out += [f'        ("{one.name}", {_ctypes_of(interface, one)}),' for one in fields]
        out += ["    ]"]
    out += ["", "", "STRUCTS: dict[str, type[c.Structure]] = {"]
    out += [f'    "{name}": {_python_name(name)},' for name in interface.structs]
    out += ["}", "", "PARAMETERS: dict[str, list[Any]] = {"]
    for name, parameters in interface.functions.items():
        out += [f'    "{name}": [']
        out += [f"        {_ctypes_of(interface, one)},  # {one.name}" for one in parameters]
        out += ["    ],"]
    out += ["}", '"""Of the functions that return a Status."""', "", "CONSTANT_DATA: dict[str, Any] = {"]
    out += [f'    "{name}": {result},' for name, result in interface.constant_data.items()]
    out += ["}", '"""Functions without parameters -> what they return."""', ""]
    return "\n".join(out)


def fields(interface: Interface) -> str:
    """csrc/fields.inl: rows of a qd_field table."""
    out = ["// Where every field of quadriga.h lies. Written by tools/bindings.py (`make bindings`)."]
    for struct, members in interface.structs.items():
        out.append(f'{{"{struct}", 0, sizeof({struct})}},')
        for one in members:
            if keyword.iskeyword(one.name):
                raise HeaderError(f"{struct}.{one.name}: a word of Python cannot be a field")
            out.append(f'{{"{struct}.{one.name}", offsetof({struct}, {one.name}), sizeof({struct}::{one.name})}},')
    return "\n".join([*out, ""])


def generated() -> dict[Path, str]:
    """File -> what it must hold."""
    interface = read((CPU / "csrc/quadriga.h").read_text())
    return {CPU / "bindings.py": bindings(interface), CPU / "csrc/fields.inl": fields(interface)}


def main(arguments: list[str]) -> int:
    """Write or check; the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python tools/bindings.py [--check]", file=sys.stderr)
        return 2
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if not arguments:
        for path in stale:
            path.write_text(generated()[path])
        return 0
    for path in stale:
        print(f"{path.name} is not what quadriga.h says: run `make bindings`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
