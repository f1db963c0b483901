"""The order of examples: which ones make up batch t, from a seed and t alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Batch = dict[str, Any]
# From the examples' indices and the batch's position in the queue.
MakeBatch = Callable[[np.ndarray, int], Batch]


ORDER_STREAM = 0


def seed_words(rng: Any) -> list[int]:
    """The two words of a random state (uint32 [2], or AlgoPerf's lists of ints) as plain ints."""
    return [int(word) & 0xFFFFFFFF for word in np.asarray(rng).ravel()]


def generator(rng: Any, *stream: int) -> np.random.Generator:
    """A numpy generator for one purpose: the same (rng, stream) gives the same numbers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*seed_words(rng), *stream])))


class TrainQueue:
    """Endless batches over a fresh permutation of the examples each epoch.

    The epochs' permutations are laid end to end and cut into batches, so every example is seen
    equally often and no batch is short. Batch t depends on ``rng`` and t alone: ``skip`` costs
    nothing.
    """

    def __init__(self, num_examples: int, batch_size: int, rng: Any, make_batch: MakeBatch) -> None:
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._rng = rng
        self._make_batch = make_batch
        self._next_batch = 0
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        position = self._next_batch
        self._next_batch += 1
        return self._make_batch(self.indices(position), position)

    def skip(self, n_batches: int) -> None:
        """Leaves out the next ``n_batches`` batches without making them."""
        self._next_batch += n_batches

    def indices(self, batch: int) -> np.ndarray:
        """The examples of a batch, int64 [batch_size]."""
        position, end = batch * self._batch_size, (batch + 1) * self._batch_size
        pieces = []
        while position < end:
            epoch, start = divmod(position, self._num_examples)
            piece = self._order(epoch)[start : start + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = generator(self._rng, ORDER_STREAM, epoch).permutation(self._num_examples)
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return self._orders[epoch]


def evaluation_batches(
    num_examples: int, available: int, batch_size: int, make_batch: MakeBatch
) -> Iterator[Batch]:
    """One pass over ``num_examples`` spread evenly over the available; the last may be short."""
    chosen = np.arange(num_examples) * available // num_examples
    for position, start in enumerate(range(0, num_examples, batch_size)):
        yield make_batch(chosen[start : start + batch_size], position)
