"""Copy tensors between files in small blocks, and read them back for comparison in a second thread.

Every layout that a weight table knows moves whole rows, so a conversion copies byte ranges from file to file: no tensor
is created, no memory page is touched for the first time, and memory holds two blocks. It costs little more than `cp`:
reading each byte back, and two checksums.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import xxhash
from torch import Tensor

from megatron_embed.convert.storage.byte_range import ByteRange, read_at, write_at
from megatron_embed.convert.storage.safetensors_file import bytes_of
from megatron_embed.errors import CheckpointError

_BLOCK = 1 << 20
"""Bytes that are read, hashed and written at a time; a block stays in the processor's cache meanwhile."""
_BEHIND = 8
"""Tensors that may wait to be read back; what was just written is still in the page cache."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One tensor to be copied: where its bytes come from and where they go."""

    name: str
    source: Sequence[ByteRange] | Callable[[], Tensor]
    """The ranges that hold its bytes, in order; or a function that computes the tensor in its final dtype."""
    target: Sequence[ByteRange]
    """The ranges to write, in the same order and of the same total length."""
    writes: tuple[str, ...] = ()
    """Declared names of the target's tensors that this copy completes."""


def copy_and_verify(copies: Iterable[Copy], verified: Callable[[Copy], object] = lambda copy: None) -> None:
    """Write every tensor to its target and read it back from there.

    Args:
        copies: the next one is requested once the previous one has been written.
        verified: called in the second thread, in order, with each copy that has been read back.
    Raises:
        CheckpointError: a file holds other bytes than were written, or a source ends too early.
    """
    block, other_block = (memoryview(bytearray(_BLOCK)) for _ in range(2))

    def check(copy: Copy, expected: bytes) -> None:
        _verify(copy, expected, other_block)
        verified(copy)

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Future[None]] = deque()
        try:
            for copy in copies:
                waiting.append(pool.submit(check, copy, _write(copy, block)))
                if len(waiting) > _BEHIND:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _write(copy: Copy, block: memoryview) -> bytes:
    """Write one tensor and return the checksum of its bytes."""
    digest = xxhash.xxh3_128()
    if callable(copy.source):
        data, done = bytes_of(copy.source().contiguous()), 0
        digest.update(data)
        for target in copy.target:
            write_at(target.file.fileno(), data[done:done + target.length], target.start)
            done += target.length
        assert done == len(data), f"{copy.name}: {len(data)} bytes for a target of {done}"
        return digest.digest()
    for source, target in _common_ranges(copy.source, copy.target):
        for part, start in _blocks(source, block):
            digest.update(part)
            write_at(target.file.fileno(), part, target.start + start)
    return digest.digest()


def _verify(copy: Copy, expected: bytes, block: memoryview) -> None:
    """Read a tensor back. Raises CheckpointError if its checksum is another."""
    digest = xxhash.xxh3_128()
    for target in copy.target:
        for part, _ in _blocks(target, block):
            digest.update(part)
    if digest.digest() != expected:
        raise CheckpointError(f"{copy.target[0].file.name}: {copy.name} reads back differently from what was written; "
                              "check the disk and try again")


def _blocks(byte_range: ByteRange, block: memoryview) -> Iterator[tuple[memoryview, int]]:
    """The range's bytes, read into `block` one part after the other, each with its start in the range."""
    for start in range(0, byte_range.length, len(block)):
        part = block[:min(len(block), byte_range.length - start)]
        num_read = read_at(byte_range.file.fileno(), part, byte_range.start + start)
        if num_read < len(part):
            raise CheckpointError(f"{byte_range.file.name}: ended at byte {byte_range.start + start + num_read} while "
                                  "it was read; do not change it during a conversion")
        yield part, start


def _common_ranges(source: Sequence[ByteRange], target: Sequence[ByteRange]) -> Iterator[tuple[ByteRange, ByteRange]]:
    """Source and target split into ranges that are contiguous on both sides."""
    assert sum(part.length for part in source) == sum(part.length for part in target), (source, target)
    rest = deque(source)
    for output in target:
        done = 0
        while done < output.length:
            first = rest.popleft()
            length = min(first.length, output.length - done)
            yield first.part(0, length), output.part(done, length)
            if length < first.length:
                rest.appendleft(first.part(length, first.length - length))
            done += length
