"""Megatron's checkpoint writer in threads instead of processes.

As released (dist_checkpointing/strategies/filesystem_async.py) a save starts a manager process, which imports
everything again (306 MB on a CPU rank, seconds), and 0.16 forks the rank, with its communication threads and page
tables, once for each file (0.19 has threads). A rank that is killed leaves them behind. Serializing a tensor and
writing it release the interpreter lock, so threads write as fast.
"""

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

Results = dict[int, Any] | Exception


def install() -> None:
    """Replace the two functions that start processes, under either of their names (0.16's, 0.19's)."""
    writer: Any = filesystem_async.FileSystemWriterAsync
    write = next(name for name in ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
                 if name in vars(writer))
    setattr(writer, write, staticmethod(write_in_threads))
    results = next(name for name in ("_get_write_results_queue", "get_write_results_queue")
                   if name in vars(filesystem_async))
    vars(filesystem_async)[results] = queue.Queue


def write_in_threads(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any],
                     results: "queue.Queue[Results]") -> None:
    """Write every bucket to its file, concurrently; put the results by bucket, or the first error, into `results`.

    No communication.
    """
    with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint-writer") as pool:
        written: list[Future[Any]] = [
            pool.submit(_write_bucket, transforms, use_msc, index, bucket) for index, bucket in enumerate(buckets)]
    by_bucket: dict[int, Any] = {}
    for index, future in enumerate(written):
        values = future.result()
        if isinstance(values, Exception):
            results.put(values)
            return
        by_bucket[index] = values
    results.put(by_bucket)


def _write_bucket(transforms: list[Any], use_msc: bool, index: int, bucket: Any) -> Any:
    """Write one file by Megatron's own function; returns its results or its error."""
    answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    pending: queue.Queue[int] = queue.Queue()
    pending.put(index)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, index, bucket, answers, pending, True, **({"use_msc": True} if use_msc else {}))
    return answers.get()[1]
