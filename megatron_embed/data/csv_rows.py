"""The rows of CSV and TSV files, each with the number of its first line."""

import csv
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from megatron_embed.config.json_file import json_value
from megatron_embed.data.indexed_rows import IndexedRows
from megatron_embed.data.jsonl import LONGEST_LINE, numbered_lines, open_file, shortened
from megatron_embed.data.row_fields import Row
from megatron_embed.errors import DataError

CSV_ENDINGS = tuple(name + packing for packing in ("", ".gz", ".zst") for name in (".csv", ".tsv"))
_NUMBERS = ("score", "label", "scores", "labels")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_LISTS = ("negatives", "positive", "documents", "docs", "labels", "scores", "teacher_scores", "pos", "neg",
          "pos_scores", "neg_scores", "positive_ids", "negative_ids", "document_ids",
          "rejected_response", "answer", "response")


class CsvRows(IndexedRows):
    """The rows of a CSV file (a header, then fields with commas or semicolons between them) or a TSV file.

    Every value is a text; an empty field is None. `typed` reads the numbers and lists of the fields that hold them.
    """

    holds_texts = True

    def read(self, begin: int = 0, end: int | None = None, first_line: int = 1) -> Iterator[tuple[int, int, bytes]]:
        csv.field_size_limit(LONGEST_LINE)
        with open_file(self.path, self._key) as file:
            lines = _Lines(file, self.path)
            header = lines.first_line()
            is_tsv = ".tsv" in self.path.rpartition("/")[2]
            self._delimiter = "\t" if is_tsv else ";" if ";" in header and "," not in header else ","
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            self._columns: list[str] = []
            while (record := self._next(reader, lines)) is not None:
                line_number, start, raw = lines.take()
                if not any(record):
                    continue
                if not self._columns:
                    self._columns = self._header(record, f"{self.path}:{line_number}")
                else:
                    yield line_number, start, raw

    def prepare(self) -> None:
        next(self.read(), None)

    def _next(self, reader: "Iterator[list[str]]", lines: "_Lines") -> list[str] | None:
        """The next record, None at the end of the file."""
        try:
            return next(reader, None)
        except csv.Error as error:
            raise DataError(f"{self.path}:{lines.line_number}: not CSV: {error}; put a text that holds a quote, a "
                            "line break or the separator in double quotes, and double its own quotes") from None

    def _header(self, record: list[str], source: str) -> list[str]:
        names = [name.strip() for name in record]
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{source}: column {shortened(twice)} occurs twice in the header; rename one of them")
        return names

    def parse(self, raw: bytes, source: str, *, trusted: bool) -> Row:
        text = raw.decode("utf-8")
        try:
            record = next(record for record in csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter,
                                                          strict=True) if any(record))
        except (StopIteration, csv.Error):
            raise DataError(f"{source}: not the row that was here; start the run again") from None
        if len(record) != len(self._columns):
            raise DataError(f"{source}: {len(record)} fields, and the header has {len(self._columns)}; put a text that "
                            "holds the separator in double quotes")
        return {name: value or None for name, value in zip(self._columns, record, strict=True) if name}


class _Lines:
    """The lines of a file as text, for `csv`, and the bytes of those that it has taken since the last `take`."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._lines = numbered_lines(file, path)
        self._path = path
        self._ahead: str | None = None
        self._raw: list[bytes] = []
        self._start = 0
        self._first = 1
        self.line_number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._ahead is not None:
            line, self._ahead = self._ahead, None
            return line
        self.line_number, raw = next(self._lines)
        self._raw.append(raw)
        try:
            return raw.decode("utf-8-sig" if self.line_number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}:{self.line_number}: not UTF-8: byte 0x{raw[error.start]:02x}; save the file "
                            "as CSV UTF-8") from None

    def first_line(self) -> str:
        """The first line, which stays the next one; empty if there is none."""
        self._ahead = next(self, "")
        line, self._ahead = self._ahead, self._ahead or None
        return line

    def take(self) -> tuple[int, int, bytes]:
        """(number of the first line, byte offset, bytes) of the lines since the last call."""
        raw = b"".join(self._raw)
        taken = self._first, self._start, raw
        self._raw, self._start, self._first = [], self._start + len(raw), self.line_number + 1
        return taken


def typed(row: Row) -> Row:
    """The row with the numbers and JSON lists of the fields that hold them; other texts are unchanged."""
    return {name: _typed(name, value) if isinstance(value, str) else value for name, value in row.items()}


def _typed(name: str, text: str) -> object:
    if name in _NUMBERS and _NUMBER.fullmatch(text.strip()):
        return float(text)
    if name in _LISTS and text.lstrip().startswith("["):
        try:
            value = json_value(text.encode("utf-8", "surrogatepass"))
        except ValueError:
            return text
        return value if isinstance(value, list) else text
    return text
