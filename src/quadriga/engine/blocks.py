"""Blocks of the key/value cache: who holds which, and which prefixes can be found again. Pure Python.

A block holds 16 positions of one sequence in every layer. It is in one of three states:

    free      nobody holds it, its content is forgotten
    held      one sequence or several (a shared prefix) hold it
    cached    nobody holds it, but its content is known by a key: found by lookup(), or taken when all else is gone

A full block's key is a hash of everything up to its end: the key of the block before it, its own tokens, and a salt
that separates tenants. Equal keys mean equal prefixes, so equal keys and values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def chain_key(parent: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
    """The key of a block: 16 bytes of BLAKE2b over the block before it, the salt and its 16 tokens."""
    digest = blake2b(parent, digest_size=16, key=salt[:64])
    digest.update(b"".join(token.to_bytes(4, "little") for token in tokens))
    return digest.digest()


class BlockPool:
    """``n_blocks`` blocks, reference-counted, with a cache of known prefixes."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
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

    def forget(self, key: bytes) -> None:
        """Make what is known by ``key``, if anything is, unknown; it is free at once if nobody holds it."""
        block = self._block_of.get(key)
        if block is None:
            return
        self._forget(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def knows(self, block: int) -> bool:
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
