"""Which data set each step takes its rows from, so that each has its share of the steps all along."""

import heapq
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence

import numpy as np

_WHOLE = 1 << 40
"""Shares are whole multiples of 1 / _WHOLE, so that every machine compares the same numbers."""


class Turns(ABC):
    """The data set of every step, and how often it has been taken before; computed up to the step that is asked for."""

    def __init__(self) -> None:
        self._sets, self._turns = array("H"), array("q")

    @abstractmethod
    def _next(self) -> tuple[int, int]:
        """The set of the next step, and the number of its turns before."""

    def of_step(self, step: int) -> tuple[int, int]:
        """Index of the set that step `step` >= 0 takes its rows from, and the number of its turns before."""
        while len(self._sets) <= step:
            data_set, turn = self._next()
            self._sets.append(data_set)
            self._turns.append(turn)
        return self._sets[step], self._turns[step]


class FurthestBehind(Turns):
    """A step takes the set that is furthest behind its share: runs that began with ORDER_VERSION 1 or 2."""

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__()
        self._shares, self._taken = np.array(shares), np.zeros(len(shares))

    def _next(self) -> tuple[int, int]:
        behind = self._shares * (len(self._sets) + 1) - self._taken
        data_set = int(np.argmax(np.round(behind, 9)))
        turn = int(self._taken[data_set])
        self._taken[data_set] += 1
        return data_set, turn


class EarliestDeadline(Turns):
    """Turns that are never a whole one ahead of or behind their share (Tijdeman 1980, The chairman assignment problem).

    Of k sets, turn j (from 0) of a set with share s may not come before step (j + e) / s and has to come by step
    (j + 1 - e) / s, steps counted from 1 and e = 1 / (2 k - 2). Of those that may come, the turn that has to come first
    is taken. Then after any number n of steps each set has had n s turns to within 1 - e, and of any w consecutive
    steps w s to within 2 - 2 e.

    Args:
        shares: of the steps; they sum to 1.
        most_turns: turns after which a set is not taken any more and its share goes to the others, in proportion;
            None: no such number. The bounds hold again from there on.
    """

    def __init__(self, shares: Sequence[float], most_turns: Sequence[int | None] | None = None) -> None:
        super().__init__()
        self._shares = list(shares)
        self._left = [None] * len(shares) if most_turns is None else list(most_turns)
        self._turns_of = [0] * len(shares)
        self._begin()

    @property
    def num_steps(self) -> int | None:
        """Steps until no set is left; None: there is always one."""
        counts = [turns if left is None else turns + left
                  for turns, left in zip(self._turns_of, self._left, strict=True)]
        return None if None in self._left else sum(counts)

    def _begin(self) -> None:
        """Begin again with the sets that are left."""
        self._active = [index for index, left in enumerate(self._left) if left is None or left > 0]
        total = sum(self._shares[index] for index in self._active)
        weights = [max(1, round(self._shares[index] / total * _WHOLE)) for index in self._active]
        if weights:
            weights[weights.index(max(weights))] += _WHOLE - sum(weights)
        self._weights = weights
        self._pieces = max(1, 2 * len(weights) - 2)  # of a turn; e is one of them
        self._taken, self._step = [0] * len(weights), 0
        self._ready: list[tuple[float, int]] = []
        self._waiting = [(self._release(place), place) for place in range(len(weights))]
        heapq.heapify(self._waiting)

    def _release(self, place: int) -> int:
        """The first step, from 1, that the place's next turn may come at."""
        if len(self._weights) == 1:
            return 0
        return -(-(self._taken[place] * self._pieces + 1) * _WHOLE // (self._weights[place] * self._pieces))

    def _deadline(self, place: int) -> float:
        return ((self._taken[place] + 1) * self._pieces - 1) * _WHOLE / (self._weights[place] * self._pieces)

    def _next(self) -> tuple[int, int]:
        self._step += 1
        while self._waiting and self._waiting[0][0] <= self._step:
            _, place = heapq.heappop(self._waiting)
            heapq.heappush(self._ready, (self._deadline(place), place))
        _, place = heapq.heappop(self._ready)
        data_set = self._active[place]
        self._taken[place] += 1
        heapq.heappush(self._waiting, (self._release(place), place))
        turn = self._turns_of[data_set]
        self._turns_of[data_set] += 1
        left = self._left[data_set]
        if left is not None:
            self._left[data_set] = left - 1
            if left == 1:
                self._begin()
        return data_set, turn
