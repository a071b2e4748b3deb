"""A form with a file in it (multipart/form-data, RFC 7578), which a browser or an SDK has written, from the disk.

The body has been written to a file as it came; here its parts are found in it and the file's own bytes are copied out,
so memory does not grow with what is uploaded.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from quadriga.server.errors import ApiError

_BOUNDARY = re.compile(r'multipart/form-data\s*;.*?\bboundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name="([^"]{0,200})"')
_FILENAME = re.compile(rb'[;\s]filename="([^"]{0,500})"')
MAX_PARTS = 32
MAX_HEAD = 4096
MAX_FIELD = 1 << 16
_PIECE = 1 << 20


@dataclass(frozen=True)
class Form:
    """What a form says."""

    fields: dict[str, str]
    filename: str
    n_bytes: int
    """Of the file."""


def boundary_of(content_type: str) -> bytes:
    """What stands between the parts.

    Raises:
        ApiError: 415, it is no form.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise ApiError(415, f"a file comes as multipart/form-data with a boundary, got {content_type[:80]!r}")
    return (found[1] or found[2]).encode("latin-1", "replace")


def take_apart(body: Path, boundary: bytes, target: Path) -> Form:
    """The fields of a form; its part ``file`` is written to ``target``.

    Raises:
        ApiError: 400, it is not well formed, or has no file.
    """
    fields: dict[str, str] = {}
    filename, n_bytes = None, 0
    with body.open("rb") as raw:
        if not body.stat().st_size:
            raise ApiError(400, "the form is empty", param="file")
        with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as view:
            for head, begin, end in _parts(view, boundary):
                name = _NAME.search(head)
                if name is None:
                    raise ApiError(400, "a part of the form has no name")
                key, given = name[1].decode(errors="replace"), _FILENAME.search(head)
                if key == "file" and filename is None:
                    filename, n_bytes = (given[1] if given else b"file").decode(errors="replace"), end - begin
                    with target.open("wb") as out:
                        for at in range(begin, end, _PIECE):
                            out.write(view[at : min(at + _PIECE, end)])
                elif end - begin > MAX_FIELD or key in fields:
                    raise ApiError(400, f"the field {key[:80]!r} is too long or comes twice", param=key[:80])
                else:
                    fields[key] = view[begin:end].decode(errors="replace")
    if filename is None:
        raise ApiError(400, "the form has no part with the name 'file'", param="file")
    return Form(fields, filename, n_bytes)


def _parts(view: mmap.mmap, boundary: bytes) -> list[tuple[bytes, int, int]]:
    """(head, where the content begins, where it ends) of every part."""
    mark = b"--" + boundary
    at = view.find(mark)
    if at != 0 and (at < 0 or view[at - 2 : at] != b"\r\n"):
        raise ApiError(400, "the form does not begin with its boundary")
    out: list[tuple[bytes, int, int]] = []
    while True:
        at += len(mark)
        if view[at : at + 2] == b"--":
            return out
        if len(out) == MAX_PARTS:
            raise ApiError(400, f"a form may have {MAX_PARTS} parts, this one has more")
        begin = view.find(b"\r\n\r\n", at, at + MAX_HEAD)
        end = view.find(b"\r\n" + mark, max(begin, at))
        if view[at : at + 2] != b"\r\n" or begin < 0 or end < 0:
            raise ApiError(400, "the form is not well formed: a part has no head, or no end")
        out.append((view[at:begin], begin + 4, max(end, begin + 4)))
        at = end + 2
