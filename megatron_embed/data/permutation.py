"""Keyed permutations of row numbers that are computed for each position alone, so that no order is held or drawn."""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def mixed(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A hash of each value under the key: the finalizer of SplitMix64 (Steele et al. 2014), twice. Bijective."""
    keys = np.random.SeedSequence(key).generate_state(2, np.uint64)
    for number in keys:
        values = _finalized(values ^ number)
    return values


def _finalized(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A pseudo-random permutation of 0 ... size - 1: a Feistel network (Luby and Rackoff 1988) over the next power of
    four, applied again to a number that falls outside (cycle walking, Black and Rogaway 2002).

    Args:
        keys: the same numbers give the same permutation.
    """

    def __init__(self, size: int, *keys: int) -> None:
        self._size = size
        self._half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(keys).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number at each position. [positions] int64."""
        numbers = self._encrypted(positions.astype(np.uint64))
        while (outside := np.flatnonzero(numbers >= np.uint64(self._size))).size:
            numbers[outside] = self._encrypted(numbers[outside])
        return numbers.astype(np.int64)

    def _encrypted(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_finalized(right + key) & self._mask)
        return (left << self._half) | right
