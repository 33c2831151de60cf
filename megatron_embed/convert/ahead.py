"""Two things at once in one process: the next tensor is read while the last one is written or compared."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of `jobs` in their order; a thread does the next job while the caller works on the last result.

    At most three results are alive: the caller's, one that is ready and one in the making. What a job raises is raised
    here. Reading, writing, copying and hashing leave the interpreter to the other thread.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
