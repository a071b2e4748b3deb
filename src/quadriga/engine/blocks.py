"""Blocks of the key/value cache: who holds which, and which prefixes can be found again. Pure Python.

A block holds 16 positions of one sequence in every layer of a group of layers (``model.cache_layout``; most models
have one group). It is in one of three states:

    free      nobody holds it, its content is forgotten
    held      one sequence or several (a shared prefix) hold it
    cached    nobody holds it, but its content is known by a key: found by lookup(), or taken when all else is gone

A full block's key is a hash of everything up to its end: the key of the block before it, its own tokens, and a salt
that separates tenants. Equal keys mean equal prefixes, so equal keys and values.

A :class:`BlockTable` is one sequence's: a row for every group, column j for positions 16 j .. 16 j + 15. What no later
query of a group with a window can see is let go, and GONE stands in its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Protocol

from quadriga.model.cache_layout import first_needed
from quadriga.quant.packed import BLOCK_TOKENS


def chain_key(parent: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
    """The key of a block: 16 bytes of BLAKE2b over the block before it, the salt and its 16 tokens."""
    digest = blake2b(parent, digest_size=16, key=salt[:64])
    digest.update(b"".join(token.to_bytes(4, "little") for token in tokens))
    return digest.digest()


def group_key(key: bytes, group: int) -> bytes:
    """The key of a group's block: the first group's is the chain's own."""
    return key + bytes([group]) if group else key


GONE = -1
"""Where a table had a block that its sequence needs no more."""


class Backing(Protocol):
    """Where blocks are kept beside memory; ``engine.disk_cache.DiskCache`` is one."""

    def has(self, key: bytes) -> bool:
        """Whether there seems to be one of this key."""
        ...

    def store(self, key: bytes, block: int) -> None:
        """Keep what a block holds."""
        ...

    def load(self, key: bytes, block: int) -> bool:
        """Fill a block with what was kept; False where it cannot be had."""
        ...


class BlockPool:
    """``n_blocks`` blocks, reference-counted, with a cache of known prefixes."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.backing: Backing | None = None
        """Keeps what is published, and has what memory does not know any more."""
        self._references = [0] * n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def n_free(self) -> int:
        """Blocks that can be taken: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def n_cached(self) -> int:
        """Blocks that nobody holds but whose prefix is known."""
        return len(self._cached)

    def allocate(self) -> int | None:
        """A block of one's own, with a reference on it; the oldest cached one is forgotten if none is free."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._references[block] = 1
        return block

    def lookup(self, key: bytes) -> int | None:
        """The block known by ``key``, with a reference on it, or None."""
        block = self._block_of.get(key)
        if block is None:
            return None
        self._cached.pop(block, None)
        self._references[block] += 1
        return block

    def knows(self, key: bytes) -> bool:
        """Whether :meth:`lookup` would find a block."""
        return key in self._block_of

    def release(self, block: int) -> None:
        """Give one reference back."""
        assert self._references[block] > 0, f"block {block} is released more often than it was taken"
        self._references[block] -= 1
        if self._references[block]:
            return
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Make a held, full block findable. The first block of a key keeps it."""
        assert self._references[block] > 0, "only a held block can be published"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key
            if self.backing is not None:
                self.backing.store(key, block)

    def bring(self, keys: Iterator[bytes], n_groups: int) -> Iterator[bytes]:
        """A prefix's keys as far as its blocks are known, those of the backing now in memory too."""
        if self.backing is None:
            return keys
        chain, held = list[bytes](), list[int]()
        for key in keys:
            blocks = [self._had(group_key(key, group)) for group in range(n_groups)]
            held += [block for block in blocks if block is not None]
            if all(block is None for block in blocks):
                break
            chain.append(key)
        for block in reversed(held):  # none was taken away for a later one; the beginning is forgotten last
            self.release(block)
        return iter(chain)

    def _had(self, key: bytes) -> int | None:
        """A block of this key, with a reference on it, from memory or from the backing."""
        assert self.backing is not None
        if self.knows(key):
            return self.lookup(key)
        block = self.allocate() if self.backing.has(key) else None
        if block is None:
            return None
        if not self.backing.load(key, block):
            self.release(block)
            return None
        self._block_of[key], self._key_of[block] = block, key
        return block

    def forget(self, key: bytes) -> None:
        """Make what is known by ``key``, if anything is, unknown; it is free at once if nobody holds it."""
        block = self._block_of.get(key)
        if block is None:
            return
        self._forget(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def is_known(self, block: int) -> bool:
        """True if a block can be found by a key, so that its content may not change."""
        return block in self._key_of

    def forget_all(self) -> None:
        """Forget all prefixes; held blocks stay held."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._key_of.clear()
        self._block_of.clear()

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]

    def check(self, held: dict[int, int] | None = None) -> None:
        """Assert every invariant; ``held`` (block -> holders) is what the references must be, where given."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is free and cached"
        for block, references in enumerate(self._references):
            assert references >= 0
            assert (references == 0) == (block in free or block in cached), f"block {block} is lost or in two states"
            if held is not None:
                assert references == held.get(block, 0), f"block {block} has {references} references"
        assert all(self._block_of[key] == block for block, key in self._key_of.items())
        assert len(self._block_of) == len(self._key_of)
        assert not free & self._key_of.keys(), "a free block has a key"
        assert cached <= self._key_of.keys(), "a cached block has no key"


class BlockTable:
    """The blocks of one sequence; see the module docstring.

    Args:
        windows: of every group, how many positions a query sees; None: all.
    """

    def __init__(self, pool: BlockPool, windows: Sequence[int | None]) -> None:
        self._pool, self.windows = pool, tuple(windows)
        self.rows: list[list[int]] = [[] for _ in windows]
        """Per group, the block of every column, or GONE."""
        self._kept = [0] * len(self.rows)  # the first column that a group has not let go

    def __len__(self) -> int:
        """Columns, of blocks that are held or gone."""
        return len(self.rows[0])

    def __iter__(self) -> Iterator[int]:
        """The blocks that are held."""
        return (block for row, first in zip(self.rows, self._kept, strict=True) for block in row[first:])

    @property
    def n_held(self) -> int:
        """How many blocks it holds."""
        return sum(len(row) - first for row, first in zip(self.rows, self._kept, strict=True))

    def extend(self) -> bool:
        """Take a column of blocks; False, and nothing is taken, where the pool has not enough."""
        if self._pool.n_free < len(self.rows):
            return False
        for row in self.rows:
            block = self._pool.allocate()
            assert block is not None, "so many were free"
            row.append(block)
        return True

    def cut(self, n_columns: int) -> None:
        """Give the columns from ``n_columns`` on back, the last one first: it is of the least use to others."""
        if n_columns >= len(self):
            return
        for column in range(len(self) - 1, n_columns - 1, -1):
            for row, first in zip(self.rows, self._kept, strict=True):
                block = row.pop()
                if column >= first:
                    self._pool.release(block)
        self._kept = [min(first, n_columns) for first in self._kept]

    def let_go(self, position: int) -> None:
        """Give back what a query at ``position`` or later cannot see."""
        for group, window in enumerate(self.windows):
            row, first = self.rows[group], min(first_needed(window, position), len(self))
            for column in range(self._kept[group], first):
                self._pool.release(row[column])
                row[column] = GONE
            self._kept[group] = max(self._kept[group], first)

    def find(self, keys: Iterator[bytes]) -> list[bytes]:
        """Take the known blocks of the longest prefix whose positions all groups still need are known.

        Args:
            keys: of the prefix's blocks, made as they are asked for.

        Returns:
            the keys of the columns that it now has.
        """
        assert not len(self), "a table is filled from its beginning"
        keys = self._pool.bring(keys, len(self.rows))
        full = [group for group, window in enumerate(self.windows) if window is None]
        chain: list[bytes] = []
        for key in keys:
            if not all(self._pool.knows(group_key(key, group)) for group in full):
                break
            chain.append(key)
        n = len(chain)
        while (column := self._missing(chain, n)) is not None:
            n = column  # no longer prefix does without it, for the window of each has it
        for group, window in enumerate(self.windows):
            self._kept[group] = first_needed(window, n * BLOCK_TOKENS)
            for column in range(n):
                wanted = column >= self._kept[group]
                block = self._pool.lookup(group_key(chain[column], group)) if wanted else GONE
                assert block is not None, "it was known a moment ago"
                self.rows[group].append(block)
        return chain[:n]

    def _missing(self, chain: Sequence[bytes], n: int) -> int | None:
        """The last column that a prefix of ``n`` columns needs and that is not known in some group."""
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            for column in range(n - 1, first_needed(window, n * BLOCK_TOKENS) - 1, -1):
                if not self._pool.knows(group_key(chain[column], group)):
                    return column
        return None

    def publish(self, column: int, key: bytes) -> None:
        """Make a full column's blocks findable."""
        for group, row in enumerate(self.rows):
            if column >= self._kept[group]:
                self._pool.publish(row[column], group_key(key, group))
