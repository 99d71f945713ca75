"""The block pool's books balance under any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backbench.engine.scheduling.blocks import BlockPool, block_digest
from backbench.errors import EngineError


def published_pool(prompt: list[int], size: int = 4) -> tuple[BlockPool, list[int]]:
    """A pool in which every full block of `prompt` was computed and published."""
    pool = BlockPool(16, size)
    blocks = [pool.allocate() for _ in range(-(-len(prompt) // size))]
    digests: list[bytes] = []
    for i in range(len(prompt) // size):
        pool.publish(blocks[i], pool.digest(prompt, digests, i))
    return pool, blocks


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    prompt = list(range(8))
    pool, blocks = published_pool(prompt)
    assert pool.match(prompt, []) == blocks[:1]
    assert pool.match([*prompt, 8], []) == blocks[:2]


def test_a_hit_needs_the_same_prefix_not_only_the_same_block() -> None:
    pool, _ = published_pool([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.match([9, 9, 9, 9, 5, 6, 7, 8, 9], []) == []


def test_a_block_is_not_found_behind_another_prefix_that_is_cached_too() -> None:
    pool, _ = published_pool([1, 2, 3, 4, 5, 6, 7, 8, 9])
    other = [9, 9, 9, 9]
    block = pool.allocate()
    pool.publish(block, pool.digest(other, [], 0))
    assert pool.match([*other, 5, 6, 7, 8, 9], []) == [block]


def test_a_block_that_can_be_found_is_shared_though_one_sequence_reads_it() -> None:
    """Writing to it would change what a later hit reads."""
    pool, blocks = published_pool(list(range(6)))
    assert [pool.readers(block) for block in blocks] == [1, 1]
    assert [pool.is_shared(block) for block in blocks] == [True, False]
    pool.acquire(blocks[1:])
    assert pool.is_shared(blocks[1])


def test_digest_depends_on_parent_tokens_and_extra() -> None:
    base = block_digest(b"", [1, 2])
    assert (
        len({base, block_digest(base, [1, 2]), block_digest(b"", [2, 1]), block_digest(b"", [1, 2], b"x")})
        == 4
    )


def test_cached_blocks_survive_release_until_evicted_tail_first() -> None:
    prompt = list(range(13))
    pool, blocks = published_pool(prompt)
    pool.release(blocks)
    assert pool.num_used == 0
    assert pool.match(prompt, []) == blocks[:3]
    for _ in range(14):
        pool.allocate()
    assert pool.match(prompt, []) == blocks[:2]


def test_an_acquired_cached_block_is_not_evicted() -> None:
    prompt = list(range(5))
    pool, blocks = published_pool(prompt)
    pool.release(blocks)
    hits = pool.match(prompt, [])
    pool.acquire(hits)
    taken = {pool.allocate() for _ in range(pool.num_free)}
    assert hits[0] not in taken
    with pytest.raises(EngineError):
        pool.allocate()


def test_first_published_block_stays_the_one_found() -> None:
    pool = BlockPool(4, 2)
    first, second = pool.allocate(), pool.allocate()
    digest = block_digest(b"", [1, 2])
    pool.publish(first, digest)
    pool.publish(second, digest)
    assert pool.match([1, 2, 3], []) == [first]
    assert not pool.is_published(second)


def test_with_a_lookahead_a_block_is_found_only_before_the_same_tokens() -> None:
    pool = BlockPool(16, 4, lookahead=1)
    prompt, digests = [1, 2, 3, 4, 5, 6, 7, 8, 9], list[bytes]()
    blocks = [pool.allocate() for _ in range(2)]
    for i in range(2):
        pool.publish(blocks[i], pool.digest(prompt, digests, i))
    assert pool.match(prompt, []) == blocks
    assert pool.match(prompt[:8], []) == blocks[:1]
    assert pool.match([*prompt[:8], 0], []) == blocks[:1]
    assert pool.match([*prompt[:4], 0], []) == []


def test_without_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    pool.publish(pool.allocate(), block_digest(b"", [1, 2]))
    assert pool.match([1, 2, 3], []) == []


class PoolMachine(RuleBasedStateMachine):
    """Sequences that allocate, share, publish and release at random."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 2)
        self.held: list[list[int]] = []
        self.fresh = 0

    @precondition(lambda self: self.pool.num_free)
    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        self.held.append([self.pool.allocate() for _ in range(min(count, self.pool.num_free))])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.acquire(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), token=st.integers(0, 3))
    def publish(self, data: st.DataObject, token: int) -> None:
        block = data.draw(st.sampled_from(self.held))[0]
        self.pool.publish(block, block_digest(b"", [token, token]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index))

    @rule(token=st.integers(0, 3))
    def hit(self, token: int) -> None:
        blocks = self.pool.match([token, token, 9], [])
        self.pool.acquire(blocks)
        if blocks:
            self.held.append(blocks)

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        for block in range(self.pool.num_blocks):
            assert self.pool.readers(block) == sum(blocks.count(block) for blocks in self.held)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
