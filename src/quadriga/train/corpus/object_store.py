"""A corpus in an object store, at any address that fsspec knows (s3://, gs://, hf://), read through a local folder.

    manifest.json, tokenizer      read when the corpus is opened
    a shard's files               copied when its first token is read, memory-mapped from there, removed for others

The folder is named by the corpus's fingerprint, so files of an earlier corpus at the same address are not mistaken for
this one's, and what a stopped run left there is used again. Reading is checked as from a disk (``corpus.format``).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

from quadriga import runtime
from quadriga.errors import ConfigError, CorpusError

_MOST_OPEN = 256
"""Each open shard uses file descriptors."""


def is_address(path: str | Path) -> bool:
    """True for what is in an object store; a Path has lost its double slash, and is none."""
    return isinstance(path, str) and "://" in path


class StoredFolder:
    """A folder of an object store.

    Args:
        address: what fsspec opens, e.g. s3://bucket/corpora/mix.

    Raises:
        ConfigError: no such kind of store, or its package is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        try:
            import fsspec
        except ImportError:
            raise ConfigError(f"reading {address} needs fsspec: {runtime.install_hint('stores')}") from None
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except ImportError as error:
            raise ConfigError(f"reading {address} needs {error}: {runtime.install_hint('stores')}") from None
        except ValueError as error:
            raise ConfigError(f"{address} is in no kind of store that fsspec knows: {error}") from None

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            CorpusError: it is not there, or the store cannot be read.
        """
        return bytes(self._asked(name, self._files.cat_file))

    def open(self, name: str) -> BinaryIO:
        """A file as a stream of bytes."""
        return cast(BinaryIO, self._asked(name, lambda path: self._files.open(path, "rb")))

    def sizes(self) -> dict[str, int]:
        """Size of every file by name, from one listing."""
        found = self._asked("", lambda path: self._files.find(path, detail=True))
        skip = len(self._root.rstrip("/")) + 1
        return {path[skip:]: int(entry["size"]) for path, entry in found.items()}

    def fetch(self, name: str, folder: Path) -> Path:
        """Copy a file to the same name in ``folder``, unless it is there; it appears whole or not at all."""
        place = folder / name
        if place.exists():
            return place
        part = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._asked(name, lambda path: self._files.get_file(path, str(part)))
            part.replace(place)
        except OSError as error:
            raise CorpusError(
                f"{self.address}/{name} cannot be copied to {folder}: {error.strerror or error}. Lower "
                "data.cache_bytes, or set QUADRIGA_CACHE to a folder on another disk"
            ) from None
        finally:
            part.unlink(missing_ok=True)
        return place

    def _asked(self, name: str, call: Callable[[str], Any]) -> Any:
        path = f"{self._root.rstrip('/')}/{name}" if name else self._root
        try:
            return call(path)
        except FileNotFoundError:
            raise CorpusError(f"{self.address}/{name} is not there") from None
        except OSError as error:
            if error.errno is not None and not isinstance(error, PermissionError):
                raise  # this machine's disk
            raise CorpusError(f"{self.address}/{name} cannot be read: {error}") from None
        except Exception as error:  # each store's package has its own
            raise CorpusError(f"{self.address}/{name} cannot be read: {type(error).__name__}: {error}") from error


S = TypeVar("S")


class Recent(Generic[S]):
    """Keeps what was used last, up to a number of bytes and of things; older ones are let go.

    Threads may use it together: one opens at a time.

    Args:
        make: opens a thing by name.
        size: its bytes.
        let_go: called with the name of one that is dropped.
        most_bytes: None: no limit but the number.
        there: names that take room from the start, though nobody opened them yet.
    """

    def __init__(
        self,
        make: Callable[[str], S],
        *,
        size: Callable[[str], int],
        let_go: Callable[[str], None] = lambda name: None,
        most_bytes: int | None = None,
        there: Collection[str] = (),
    ) -> None:
        self._make, self._size, self._let_go, self._most_bytes = make, size, let_go, most_bytes
        self._held: OrderedDict[str, S | None] = OrderedDict.fromkeys(there)
        self._lock = threading.Lock()

    def __call__(self, name: str) -> S:
        """The thing of this name, opened if it is not held."""
        with self._lock:
            found = self._held.get(name)
            if found is not None:
                self._held.move_to_end(name)
                return found
            self._held.pop(name, None)
            self._make_room(self._size(name))
            made = self._make(name)
            self._held[name] = made
            return made

    def _make_room(self, wanted: int) -> None:
        held = sum(map(self._size, self._held)) if self._most_bytes is not None else 0
        while self._held and (
            len(self._held) >= _MOST_OPEN or (self._most_bytes is not None and held + wanted > self._most_bytes)
        ):
            name, _ = self._held.popitem(last=False)
            held -= self._size(name)
            self._let_go(name)
