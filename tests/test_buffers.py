"""Memory of rows that wait: made ahead, cut from slabs, used again."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

import pytest

from trajstore.engine.buffers import BLOCK_BYTES, Buffers


class Later(Executor):
    """Runs nothing until it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def submit(self, function: Any, /, *args: Any, **named: Any) -> Future[Any]:
        self.waiting.append(function)
        return Future()

    def run(self) -> None:
        waiting, self.waiting = self.waiting, []
        for function in waiting:
            function()


@pytest.mark.parametrize("nbytes", [0, 1, 1000, BLOCK_BYTES // 2, BLOCK_BYTES // 2 + 1, BLOCK_BYTES, 5 * BLOCK_BYTES])
def test_a_buffer_is_large_enough_and_is_used_again(nbytes: int) -> None:
    buffers = Buffers(Later())
    first, second = buffers.take(nbytes), buffers.take(nbytes)
    assert first.nbytes >= nbytes and second.nbytes >= nbytes
    first[:], second[:] = 1, 2
    assert (first == 1).all()
    buffers.give(first)
    assert buffers.take(nbytes) is first


def test_blocks_are_made_ahead_by_another_thread() -> None:
    later = Later()
    buffers = Buffers(later)
    buffers.take(BLOCK_BYTES)
    assert len(later.waiting) == 1
    taken = [buffers.take(BLOCK_BYTES) for _ in range(3)]  # what is left of the first slab
    assert len(later.waiting) == 1  # one at a time
    later.run()
    taken += [buffers.take(BLOCK_BYTES) for _ in range(4)]
    later.run()
    for number, block in enumerate(taken):
        block[:] = number
    assert all((block == number).all() for number, block in enumerate(taken))  # no two share memory


def test_small_buffers_cost_no_slab() -> None:
    later = Later()
    buffers = Buffers(later)
    assert buffers.take(1000).nbytes == 1000
    assert not later.waiting
