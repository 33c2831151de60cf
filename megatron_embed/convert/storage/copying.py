"""Tensors' bytes from files to files, in small blocks, read back and compared in a second thread meanwhile.

Every layout that a weight table knows moves whole rows, so a conversion moves stretches of bytes from one file to
another: no tensor is made, no page is touched for the first time, memory holds two blocks. That costs little more than
`cp` does: reading each byte back, and two checksums.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import xxhash
from torch import Tensor

from megatron_embed.convert.storage.byte_range import Run, fill, pour
from megatron_embed.convert.storage.safetensors_file import bytes_of
from megatron_embed.errors import CheckpointError

_BLOCK = 1 << 20
"""Bytes that are read, hashed and written at a time: they stay in the processor's cache meanwhile."""
_BEHIND = 8
"""Tensors that may wait to be read back; what was written just now is still in the page cache."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One tensor's way into the files being written."""

    name: str
    source: Sequence[Run] | Callable[[], Tensor]
    """Where its bytes lie, in order; or what computes them, in the tensor's dtype."""
    target: Sequence[Run]
    """Where they go, in the same order; as many bytes."""
    writes: tuple[str, ...] = ()
    """Tensors of the target that these bytes are, by the names they were announced with."""


def copy_and_verify(copies: Iterable[Copy], verified: Callable[[Copy], object] = lambda copy: None) -> None:
    """Write every tensor to its place and read it back from there.

    Args:
        copies: each is asked for when the one before has been written.
        verified: called with each when it has been read back, in order, in the second thread.
    Raises:
        CheckpointError: what a file holds afterwards is not what was to be written, or a source ends too early.
    """
    block, other_block = (memoryview(bytearray(_BLOCK)) for _ in range(2))

    def check(copy: Copy, expected: bytes) -> None:
        _verify(copy, expected, other_block)
        verified(copy)

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Future[None]] = deque()
        try:
            for copy in copies:
                waiting.append(pool.submit(check, copy, _carry_over(copy, block)))
                if len(waiting) > _BEHIND:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _carry_over(copy: Copy, block: memoryview) -> bytes:
    """Write one tensor; gives the checksum of its bytes."""
    digest = xxhash.xxh3_128()
    if callable(copy.source):
        data, done = bytes_of(copy.source().contiguous()), 0
        digest.update(data)
        for run in copy.target:
            pour(run.file.fileno(), data[done:done + run.length], run.start)
            done += run.length
        assert done == len(data), f"{copy.name}: {len(data)} bytes for a place of {done}"
        return digest.digest()
    for source, target in _stretches(copy.source, copy.target):
        for piece, start in _blocks(source, block):
            digest.update(piece)
            pour(target.file.fileno(), piece, target.start + start)
    return digest.digest()


def _verify(copy: Copy, expected: bytes, block: memoryview) -> None:
    """Read a tensor back from where it was written. Raises CheckpointError if it is another."""
    digest = xxhash.xxh3_128()
    for run in copy.target:
        for piece, _ in _blocks(run, block):
            digest.update(piece)
    if digest.digest() != expected:
        place = copy.target[0].file.name
        raise CheckpointError(f"{place}: {copy.name} reads back differently from what was written; check the disk and "
                              "try again")


def _blocks(run: Run, block: memoryview) -> Iterator[tuple[memoryview, int]]:
    """The run's bytes as pieces of `block`, each overwritten by the next, and where in the run each begins."""
    for start in range(0, run.length, len(block)):
        piece = block[:min(len(block), run.length - start)]
        found = fill(run.file.fileno(), piece, run.start + start)
        if found < len(piece):
            raise CheckpointError(f"{run.file.name}: ended at byte {run.start + start + found} while it was read; "
                                  "leave it alone during a conversion")
        yield piece, start


def _stretches(source: Sequence[Run], target: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """Source and target cut into stretches that lie together on both sides."""
    assert sum(run.length for run in source) == sum(run.length for run in target), (source, target)
    rest = deque(source)
    for run in target:
        done = 0
        while done < run.length:
            first = rest.popleft()
            length = min(first.length, run.length - done)
            yield first.part(0, length), run.part(done, length)
            if length < first.length:
                rest.appendleft(first.part(length, first.length - length))
            done += length
