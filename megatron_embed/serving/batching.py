"""Continuous batching: one thread computes the waiting requests of all models, a token budget at a time.

A batch takes texts of every waiting request in turn, so that a short request does not wait for the end of a long one.
"""

import contextlib
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megatron_embed.serving.errors import RequestError, stopping

logger = logging.getLogger(__name__)

BATCH_SECONDS = 0.5
"""A model's token budget is such that a batch takes about this time: a new request waits no longer for its turn."""
FIRST_TOKENS = 1024
"""Token budget of a model's first batch."""
LEAST_TOKENS = 256
"""Smallest token budget."""


class Tokens(NamedTuple):
    """A text or pair, ready to be computed."""

    ids: list[int]
    types: list[int] | None
    """As long as the ids; None: the tokenizer has none."""


class Engine(ABC):
    """Computes rows of texts or pairs. Called by one thread."""

    @abstractmethod
    def rows(self, items: Sequence[Any]) -> np.ndarray:
        """[items, dim] float32, in order."""


@dataclass(eq=False)
class _Request:
    """A request's items and the rows computed so far."""

    engine: Engine
    items: Sequence[Any]
    costs: Sequence[int]
    """Tokens of each item."""
    future: "Future[np.ndarray]" = field(default_factory=Future)
    waiting: list[int] = field(init=False)
    """Positions of the items that are not computed yet; the longest is last, and next."""
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.waiting = sorted(range(len(self.items)), key=self.costs.__getitem__)

    def fill(self, positions: Sequence[int], rows: np.ndarray) -> None:
        """Keep computed rows; with the last ones the future gets its result."""
        if self.rows is None:
            self.rows = np.empty((len(self.items), rows.shape[1]), dtype=np.float32)
        self.rows[list(positions)] = rows
        if not self.waiting:
            with contextlib.suppress(InvalidStateError):  # nobody waits any more, or it has failed
                self.future.set_result(self.rows)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


Batch = list[tuple[_Request, list[int]]]
"""Requests with the positions of their items in this batch."""


class Batcher:
    """The waiting requests and the thread that computes them."""

    def __init__(self, batch_tokens: int) -> None:
        """`batch_tokens`: largest token budget of a batch; a longer text is a batch of its own."""
        self.batch_tokens = batch_tokens
        self.on_batch: Callable[[int], object] | None = None
        """Called with the tokens of every batch."""
        self._budgets: dict[Engine, int] = {}
        self._requests: deque[_Request] = deque()
        self._running: Batch = []
        self._changed = threading.Condition()
        self._closed: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, engine: Engine, items: Sequence[Any], costs: Sequence[int]) -> "Future[np.ndarray]":
        """[items, dim] float32 when they are computed. A future that is cancelled takes its items out of the queue."""
        request = _Request(engine, items, costs)
        with self._changed:
            if self._closed is not None:
                raise self._closed
            self._requests.append(request)
            self._changed.notify()
        return request.future

    @property
    def alive(self) -> bool:
        """Whether the thread computes."""
        return self._thread.is_alive()

    def close(self, timeout_seconds: float) -> bool:
        """Answer every request that is left with `stopping()`. Returns whether the thread has ended in that time."""
        with self._changed:
            self._closed = stopping()
            left = [*self._requests, *(request for request, _ in self._running if request not in self._requests)]
            self._requests.clear()
            self._changed.notify()
        for request in left:
            request.fail(stopping())
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = []
                while not self._requests and self._closed is None:
                    self._changed.wait()
                if self._closed is not None:
                    return
                self._running = self._next_batch()
            if self._running:
                self._compute(self._running)

    def _next_batch(self) -> Batch:
        """Items of the first request's model within the budget; requests that are left wait behind the others."""
        while self._requests and self._requests[0].future.cancelled():
            self._requests.popleft()
        if not self._requests:
            return []
        engine = self._requests[0].engine
        of_engine = [request for request in itertools.islice(self._requests, self.batch_tokens)
                  if request.engine is engine and not request.future.cancelled()]
        if not of_engine:  # the client of the only one has just left
            return []
        budget = self._budget(engine)
        taken: dict[_Request, list[int]] = {}
        for share in (max(1, budget // len(of_engine)), budget):  # in equal parts, then what is left of the budget
            for request in of_engine:
                cost = request.costs[request.waiting[-1]] if request.waiting else 0
                used = 0
                while request.waiting and (not taken or (cost <= budget and (used < share))):
                    taken.setdefault(request, []).append(request.waiting.pop())
                    used, budget = used + cost, budget - cost
                    cost = request.costs[request.waiting[-1]] if request.waiting else 0
                if budget <= 0:
                    break
        for request in taken:
            self._requests.remove(request)
        self._requests.extend(request for request in taken if request.waiting)
        return list(taken.items())

    def _budget(self, engine: Engine) -> int:
        return min(self._budgets.get(engine, FIRST_TOKENS), self.batch_tokens)

    def _compute(self, batch: Batch) -> None:
        engine = batch[0][0].engine
        start = time.perf_counter()
        try:
            rows = engine.rows([request.items[position] for request, positions in batch for position in positions])
        except Exception as error:  # whatever it is, the request is answered, and the others get their rows
            if len(batch) > 1:
                for part in batch:
                    self._compute([part])
                return
            logger.exception("a request failed")
            self._drop(batch[0][0], RequestError(500, f"the model failed: {type(error).__name__}", code="model_failed"))
            return
        tokens = sum(request.costs[position] for request, positions in batch for position in positions)
        self._note_batch(engine, tokens, time.perf_counter() - start)
        first = 0
        for request, positions in batch:
            request.fill(positions, rows[first : first + len(positions)])
            first += len(positions)

    def _note_batch(self, engine: Engine, tokens: int, seconds: float) -> None:
        """Lower the model's budget after a batch that took too long; double it after a full one that was fast."""
        if self.on_batch is not None:
            self.on_batch(tokens)
        budget = self._budget(engine)
        if seconds > BATCH_SECONDS:
            self._budgets[engine] = max(LEAST_TOKENS, int(min(tokens, budget) * BATCH_SECONDS / seconds))
        elif seconds < BATCH_SECONDS / 2 and tokens > budget / 2:
            self._budgets[engine] = min(2 * budget, self.batch_tokens)

    def _drop(self, request: _Request, error: Exception) -> None:
        with self._changed:
            if request in self._requests:
                self._requests.remove(request)
        request.fail(error)
