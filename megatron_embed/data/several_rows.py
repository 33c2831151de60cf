"""The rows of several files as those of one data set."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from megatron_embed.data.indexed_rows import RawRows
from megatron_embed.data.row_fields import Row


class SeveralRows(RawRows):
    """The rows of several files, one file after the other."""

    def __init__(self, path: str, parts: Sequence[RawRows]) -> None:
        self.path = path
        self._parts = parts
        self.detects_changes = all(part.detects_changes for part in parts)
        self.holds_texts = any(part.holds_texts for part in parts)

    def scan(self) -> Iterator[tuple[Row, str]]:
        for part in self._parts:
            yield from part.scan()
        self._ends = list(accumulate(map(len, self._parts)))
        self.digest = hashlib.blake2b("".join(part.digest for part in self._parts).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> tuple[Row, str]:
        part = bisect_right(self._ends, index)
        return self._parts[part].row(index - (self._ends[part - 1] if part else 0))
