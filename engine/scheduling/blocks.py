"""The KV block pool: reference counts, the prefix cache, and least-recently-used eviction.

A block is found by the chained hash of (its parent's hash, its token ids, extra keys), so equal hashes
mean equal prefixes. Blocks without readers stay findable until they are needed for something else.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from backbench.errors import EngineError

ROOT = b""
"""The parent hash of a sequence's first block."""


def block_digest(parent: bytes, token_ids: Sequence[int], extra: bytes = b"") -> bytes:
    """Chained hash of one full block; `extra` separates caches that must not meet (an adapter, a salt)."""
    hasher = hashlib.blake2b(parent, digest_size=16)
    hasher.update(array("q", token_ids).tobytes())
    hasher.update(extra)
    return hasher.digest()


class BlockPool:
    """`num_blocks` physical blocks. Every block is either used (has readers) or free."""

    def __init__(
        self, num_blocks: int, block_size: int, prefix_cache: bool = True, lookahead: int = 0
    ) -> None:
        """lookahead: tokens after a block that what is kept of it depends on, too; it is found only where
        they are the same."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.lookahead = lookahead
        self._readers = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self.allocations = [0] * num_blocks
        """How often each block was given out: equal counts mean that it still holds the same."""
        self._published: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Next to be reused first."""

    @property
    def num_free(self) -> int:
        """Blocks without readers, the cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reader."""
        return self.num_blocks - len(self._free)

    def readers(self, block: int) -> int:
        """How many sequences read `block`."""
        return self._readers[block]

    def is_shared(self, block: int) -> bool:
        """True when writing to `block` could be seen by others: more readers, or found by its hash."""
        return self._readers[block] > 1 or self._digests[block] is not None

    def allocate(self) -> int:
        """A block with one reader and no past; evicts the least recently used cached block if it must."""
        if not self._free:
            raise EngineError("The KV pool is exhausted; this is a scheduler defect, please report it.")
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._readers[block] = 1
        self.allocations[block] += 1
        return block

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reader to each block, taking cached ones off the free list."""
        for block in blocks:
            if self._readers[block] == 0:
                del self._free[block]
            self._readers[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Remove a reader from each block of a sequence, given in logical order.

        Freed tail first: a prefix outlives its continuations. Unpublished blocks are reused before cached.
        """
        for block in reversed(list(blocks)):
            self._readers[block] -= 1
            if self._readers[block] == 0:
                self._free[block] = None
                if self._digests[block] is None:
                    self._free.move_to_end(block, last=False)

    def match(self, token_ids: Sequence[int], digests: list[bytes]) -> list[int]:
        """The longest run of cached full blocks that starts `token_ids`, at most len - 1 tokens long.

        The cap leaves at least one token to compute, whose logits the first sample needs. `digests` is the
        sequence's own list of block hashes and is extended as far as the search went. Takes no reader.
        """
        if not self.prefix_cache:
            return []
        blocks: list[int] = []
        size = self.block_size
        for i in range((len(token_ids) - max(1, self.lookahead)) // size):
            block = self._published.get(self.digest(token_ids, digests, i))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def digest(self, token_ids: Sequence[int], digests: list[bytes], index: int) -> bytes:
        """The hash of full block `index` of a sequence, extending its `digests` as needed."""
        size = self.block_size
        while len(digests) <= index:
            i = len(digests)
            parent = digests[-1] if digests else ROOT
            digests.append(block_digest(parent, token_ids[i * size : (i + 1) * size + self.lookahead]))
        return digests[index]

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable; the first one published under a hash stays the one found."""
        if self.prefix_cache and self._digests[block] is None and digest not in self._published:
            self._published[digest] = block
            self._digests[block] = digest

    def is_published(self, block: int) -> bool:
        """True when `block` can be found by its hash."""
        return self._digests[block] is not None

    def reset_prefix_cache(self) -> None:
        """Forget every published block; readers keep theirs."""
        self._published.clear()
        self._digests = [None] * self.num_blocks

    def check(self) -> None:
        """Raise AssertionError unless the pool's books balance. For tests and debugging."""
        assert all(count >= 0 for count in self._readers), "negative reader count"
        free = {block for block, count in enumerate(self._readers) if count == 0}
        assert free == set(self._free), "free list and reader counts disagree"
        assert self.num_free + self.num_used == self.num_blocks
        for digest, block in self._published.items():
            assert self._digests[block] == digest, "published block carries another hash"

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            self._digests[block] = None
            del self._published[digest]
