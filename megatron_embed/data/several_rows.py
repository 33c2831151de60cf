"""The rows of several files as those of one data set."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from megatron_embed.data.indexed_rows import IndexedRows, RawRows
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

    def files_with_offsets(self) -> list[IndexedRows] | None:
        files: list[IndexedRows] = []
        for part in self._parts:
            if (found := part.files_with_offsets()) is None:
                return None
            files += found
        return files

    def __len__(self) -> int:
        return self._ends[-1]

    def source(self, index: int) -> str:
        part, row = self._place(index)
        return part.source(row)

    def row(self, index: int) -> tuple[Row, str]:
        part, row = self._place(index)
        return part.row(row)

    def _place(self, index: int) -> tuple[RawRows, int]:
        """The file that holds row `index`, and the row's number in it."""
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)
