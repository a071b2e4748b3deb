"""Keys and values of known prefixes in a directory: found again after a restart, and when memory had to let them go.

    publish ──► a copy ──► a thread of its own ──► FOLDER/NAME            one file a block, 16 positions in all layers
    a prompt's block that memory does not know ──► FOLDER/NAME ──► checked ──► memory

A block's name is a hash over who computed it (the weights, the kernels, the cache's layout) and its key, which is a
hash of all tokens up to its end and of the tenant's salt. A file begins with a hash over name and content; one that
is broken is deleted, with a line in the log, and its positions are computed as if it had never been there. What is
found is bit for bit what was computed, or nothing is found.

It belongs to the engine's thread, but for the one that writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from quadriga.errors import ConfigError

_log = logging.getLogger(__name__)

_DIGEST = 32
_STATE = b"state "
"""Before the keys of states, which are those of the blocks that end where they are."""

MAX_PENDING_BYTES = 64 << 20
"""Copies that wait to be written; what comes beyond is not written this time."""


class Blocks(Protocol):
    """The memory in which blocks lie."""

    def read_block(self, block: int) -> bytes:
        """What a block holds in all layers."""
        ...

    def write_block(self, block: int, content: bytes) -> None:
        """Put that back."""
        ...


class KeptBlocks(Blocks, Protocol):
    """Blocks of a model that can say what they depend on."""

    def identity(self) -> bytes:
        """A hash of everything that keys and values depend on beside the tokens."""
        ...


class KeptStates(Protocol):
    """A model whose recurrent layers' states can be kept."""

    def read_state(self, slot: int) -> bytes:
        """What a slot holds, of all recurrent layers."""
        ...

    def write_state(self, slot: int, content: bytes) -> None:
        """Put that back."""
        ...


class DiskCache:
    """See the module docstring.

    Args:
        folder: made where it is missing, for this user only: what people said can be guessed from it.
        max_bytes: of all files in it; those used longest ago go first.
        identity: of the model, see :class:`KeptBlocks`.
        blocks: the runner's memory.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: bytes, blocks: Blocks) -> None:
        self._folder, self._max_bytes, self._identity, self._blocks = folder, max_bytes, identity, blocks
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()  # name -> bytes, used longest ago first; under the lock
        self._n_bytes = 0
        self._sure: set[str] = set()  # files that this process has written, or read and found good
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = []
            for entry in os.scandir(folder):
                if entry.name.endswith(".tmp"):
                    Path(entry.path).unlink()
                elif entry.is_file() and len(entry.name) == 2 * _DIGEST:
                    found.append((entry.stat().st_mtime_ns, entry.name, entry.stat().st_size))
            for _, name, size in sorted(found):
                self._files[name] = size
                self._n_bytes += size
            self._fit()
        except OSError as error:
            raise ConfigError(f"the prefix cache's folder {folder} cannot be used: {error.strerror}") from None
        self._pending: set[str] = set()
        self._pending_bytes = 0
        self._queue: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="prefix-cache", daemon=True)
        self._writer.start()
        self.n_loaded = self.n_refused = 0
        """Blocks that were found, and files that were not what they should be."""

    def _name(self, key: bytes) -> str:
        return blake2b(key, digest_size=_DIGEST, key=self._identity[:64]).hexdigest()

    def has(self, key: bytes) -> bool:
        """Whether a file of this key is there; it may turn out to be broken."""
        with self._lock:
            return self._name(key) in self._files

    def store(self, key: bytes, block: int, blocks: Blocks | None = None) -> None:
        """Keep what a block holds; a copy is made now. Where one file was broken, others are written anew.

        Args:
            blocks: the memory that it is in, if not the runner's blocks.
        """
        name = self._name(key)
        with self._lock:
            if name in self._files and (not self.n_refused or name in self._sure):
                self._files.move_to_end(name)
                return
            if name in self._pending or self._pending_bytes > MAX_PENDING_BYTES:
                return
        content = (blocks or self._blocks).read_block(block)
        with self._lock:
            self._pending.add(name)
            self._pending_bytes += len(content)
        self._queue.put((name, content))

    def load(self, key: bytes, block: int, blocks: Blocks | None = None) -> bool:
        """Fill a block with what was kept; False where that is not there, or not what it was."""
        name = self._name(key)
        try:
            raw = (self._folder / name).read_bytes()
            os.utime(self._folder / name)
        except OSError as error:
            self._refuse(name, error.strerror or str(error))
            return False
        if raw[:_DIGEST] != _digest(name, raw[_DIGEST:]):
            self._refuse(name, "its content is not what was written")
            return False
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                self._sure.add(name)
        (blocks or self._blocks).write_block(block, raw[_DIGEST:])
        self.n_loaded += 1
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what still waits, as far as there is time for it."""
        self._queue.put(None)
        self._writer.join(timeout_s)

    def _refuse(self, name: str, why: str) -> None:
        self.n_refused += 1
        _log.warning("the prefix cache's file %s is ignored and deleted: %s", name, why)
        self._drop(name)

    def _drop(self, name: str) -> None:
        with self._lock:
            self._n_bytes -= self._files.pop(name, 0)
            self._sure.discard(name)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def _fit(self) -> None:
        """Forget what was used longest ago until the rest fits."""
        while self._n_bytes > self._max_bytes and self._files:
            self._drop(next(iter(self._files)))

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            name, content = item
            part = self._folder / f"{name}.tmp"
            try:
                with part.open("wb") as out:
                    out.write(_digest(name, content))
                    out.write(content)
                part.replace(self._folder / name)
                with self._lock:
                    self._n_bytes += _DIGEST + len(content) - self._files.pop(name, 0)
                    self._files[name] = _DIGEST + len(content)
                    self._sure.add(name)
                self._fit()
            except OSError as error:
                _log.warning("a block of the prefix cache could not be written: %s", error.strerror)
                with contextlib.suppress(OSError):
                    part.unlink()
            with self._lock:
                self._pending.discard(name)
                self._pending_bytes -= len(content)


class StateFiles:
    """States of recurrent layers in the same directory; see ``engine.states``.

    Args:
        disk: the directory.
        runner: whose slots they are in.
    """

    def __init__(self, disk: DiskCache, runner: KeptStates) -> None:
        self._disk, self._runner = disk, runner

    def has(self, key: bytes) -> bool:
        """See ``blocks.Backing``."""
        return self._disk.has(_STATE + key)

    def store(self, key: bytes, block: int) -> None:
        """See ``blocks.Backing``."""
        self._disk.store(_STATE + key, block, self)

    def load(self, key: bytes, block: int) -> bool:
        """See ``blocks.Backing``."""
        return self._disk.load(_STATE + key, block, self)

    def read_block(self, block: int) -> bytes:
        """What a slot holds."""
        return self._runner.read_state(block)

    def write_block(self, block: int, content: bytes) -> None:
        """Put that back."""
        self._runner.write_state(block, content)


def _digest(name: str, content: bytes) -> bytes:
    return blake2b(content, digest_size=_DIGEST, key=bytes.fromhex(name)).digest()
