"""The documents that are searched for negatives: those of a file, read when they are needed, and those of the rows."""

from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.corpus import ID_KEYS, LazyTexts
from megatron_embed.data.indexed_rows import JsonlRows
from megatron_embed.data.jsonl import BLANK
from megatron_embed.data.records import Record, text_id
from megatron_embed.data.row_fields import Row, name_of, titled, trusted_title
from megatron_embed.errors import DataError
from megatron_embed.mining.exclusions import NamedDocument


class CorpusFile(LazyTexts):
    """The different documents of a file of rows `{"text": str, "title"?: str, "_id"?: str}`, in its order.

    A document is `title + " " + text` where the title is not empty. Its id may also have the key `docid` or `id`, and
    may be an integer or absent. Memory: 48 bytes per row; equal texts are known by a 64-bit hash.

    Attributes:
        document_of_row: [rows] int64, the document of each row.
        first_rows: [documents] int64, the first row of each document, ascending.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row is invalid, or the file has no rows.
    """

    def __init__(self, path: str, key: str = "--corpus") -> None:
        self._rows, hashes = JsonlRows(path, key), array("q")
        for row, source in self._rows.scan():
            hashes.append(text_id(titled(row, "", source)))
            _optional_name(row, source)
        if not hashes:
            raise DataError(f'{path}:1: no rows; a row is one line such as {{"text": "..."}}')
        in_file_order: NDArray[np.int64] = np.frombuffer(hashes, dtype=np.int64)
        order = np.argsort(in_file_order, kind="stable")
        ordered = in_file_order[order]
        begins = np.ones(len(order), dtype=bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        self._hashes, firsts = ordered[begins], order[begins]
        self.first_rows: NDArray[np.int64] = np.sort(firsts)
        self._documents = np.searchsorted(self.first_rows, firsts)
        self.document_of_row: NDArray[np.int64] = np.empty(len(order), dtype=np.int64)
        self.document_of_row[order] = self._documents[np.cumsum(begins) - 1]
        self._later_names: dict[int, str] = {}
        for row_index in np.sort(order[~begins]).tolist():
            document = int(self.document_of_row[row_index])
            name = _trusted_name(self._rows.row(row_index)[0])
            if name is not None and document not in self._later_names and self._first_name(document) is None:
                self._later_names[document] = name

    def __len__(self) -> int:
        return len(self.first_rows)

    def find(self, text: str) -> int | None:
        """The document with this text."""
        wanted = text_id(text)
        position = int(np.searchsorted(self._hashes, wanted))
        is_there = position < len(self._hashes) and int(self._hashes[position]) == wanted
        return int(self._documents[position]) if is_there else None

    def name(self, document: int) -> str | None:
        """The first id that a row gives the document."""
        first = self._first_name(document)
        return self._later_names.get(document) if first is None else first

    def source(self, document: int) -> str:
        """FILE:LINE of the document's first row."""
        return self._rows.source(int(self.first_rows[document]))

    def named(self) -> Iterator[NamedDocument]:
        """Every row in order; reads the file from its beginning."""
        row_index = 0
        for line_number, _, raw in self._rows.read():
            if not raw.strip(BLANK):
                continue
            row = self._rows.parse(raw, f"{self._rows.path}:{line_number}", trusted=True)
            text = trusted_title(row)
            yield NamedDocument(int(self.document_of_row[row_index]), text, len(text) - len(str(row["text"])),
                                _trusted_name(row))
            row_index += 1

    def _text(self, index: int) -> str:
        return trusted_title(self._rows.row(int(self.first_rows[index]))[0])

    def _first_name(self, document: int) -> str | None:
        return _trusted_name(self._rows.row(int(self.first_rows[document]))[0])


class Documents(LazyTexts):
    """The documents of a mining task: those of the corpus, then every document of the rows that it lacks.

    Args:
        records: the rows.
        corpus: None: the documents are every positive and negative of the rows; else their positives count besides.

    Attributes:
        own: the documents behind those of the corpus.
    """

    def __init__(self, records: Sequence[Record], corpus: CorpusFile | None) -> None:
        self.corpus, self._records = corpus, records
        texts = chain.from_iterable(record.positive for record in records)
        if corpus is None:
            texts = chain(texts, chain.from_iterable(record.negatives for record in records))
        first = 0 if corpus is None else len(corpus)
        self.own = [text for text in dict.fromkeys(texts) if corpus is None or corpus.find(text) is None]
        self._own_index = {text: index for index, text in enumerate(self.own, first)}
        self._own_names: dict[int, str] = {}
        for document in self._named_of_rows():
            if document.name is not None:
                self._own_names.setdefault(document.document, document.name)

    def __len__(self) -> int:
        return len(self.own) + (0 if self.corpus is None else len(self.corpus))

    def find(self, text: str) -> int | None:
        """The document with this text."""
        index = self._own_index.get(text)
        return self.corpus.find(text) if index is None and self.corpus is not None else index

    def index(self, value: str, *_: Any) -> int:
        """The document with this text, which there is."""
        found = self.find(value)
        assert found is not None, value
        return found

    def name(self, document: int) -> str | None:
        """The document's id, if a row or the corpus has one."""
        own = self._own_names.get(document)
        if own is not None or self.corpus is None or document >= len(self.corpus):
            return own
        return self.corpus.name(document)

    def named(self) -> Iterator[NamedDocument]:
        """The documents as in the rows, then as in the corpus."""
        yield from self._named_of_rows()
        if self.corpus is not None:
            yield from self.corpus.named()

    def _named_of_rows(self) -> Iterator[NamedDocument]:
        for record in self._records:
            for text, name in zip_longest((*record.positive, *record.negatives), record.document_ids or ()):
                document = self.find(text)
                if document is not None:
                    yield NamedDocument(document, text, 0, name)

    def _text(self, index: int) -> str:
        first = 0 if self.corpus is None else len(self.corpus)
        if index >= first:
            return self.own[index - first]
        assert self.corpus is not None
        return self.corpus[index]


def _optional_name(row: Row, source: str) -> str | None:
    """The id of a row, or None."""
    for key in ID_KEYS:
        value = row.get(key)
        if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.strip()):
            return name_of(value, key, source)
    return None


def _trusted_name(row: Row) -> str | None:
    """The same of a row that was checked before."""
    return _optional_name(row, "")
