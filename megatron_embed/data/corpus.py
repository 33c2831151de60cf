"""Documents with ids: rows `{"docid" or "_id", "title"?, "text"}`, looked up in their file, not held in memory."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.indexed_rows import JsonlRows
from megatron_embed.data.jsonl import check_text, shortened
from megatron_embed.data.records import text_id
from megatron_embed.data.row_fields import Row, check_keys, name_of, titled, trusted_title
from megatron_embed.data.row_source import open_rows
from megatron_embed.errors import DataError

logger = logging.getLogger(__name__)

ID_KEYS = ("_id", "docid", "id")


class NamedText(NamedTuple):
    """A query or document with its id."""

    name: str
    text: str
    """`title + " " + text` where the title is not empty; may be empty itself: public corpora hold such documents."""


def read_named_text(row: Row, source: str, *, trusted: bool = False) -> NamedText:
    """The id and the text of one row.

    Args:
        trusted: the row was read before and has not changed: it is converted, not checked again.
    Raises:
        DataError: beginning with `source`.
    """
    if trusted:
        return NamedText(str(next(row[key] for key in ID_KEYS if key in row)), trusted_title(row))
    key = next((key for key in ID_KEYS if key in row), None)
    missing = [name for name, absent in (("_id", key is None), ("text", "text" not in row)) if absent]
    if missing or key is None:
        raise DataError(f"{source}: the row lacks {' and '.join(missing)}; it needs _id (or docid) and text")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{source}: {key} = {shortened(value)}: must be a non-empty string or an integer")
    name = name_of(value, key, source)
    return NamedText(name, text_of_document(row, source))


def text_of_document(row: Row, source: str) -> str:
    """`title + " " + text` of a row where the title is not empty, else its text; may be empty itself.

    Raises:
        DataError: beginning with `source`.
    """
    if not isinstance(row["text"], str) or row["text"].strip():
        return titled(row, "", source)
    title = row.get("title")
    has_title = isinstance(title, str) and bool(title.strip())
    return f"{check_text(title, 'title', source)} {row['text']}" if has_title else row["text"]


class LazyTexts(Sequence[str]):
    """A sequence given by `__len__` and `_text`; a slice of it reads a text only when that one is accessed."""

    @abstractmethod
    def _text(self, index: int) -> str:
        """Text `index`, 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        position = range(len(self))[index]
        return Picked(self, position) if isinstance(position, range) else self._text(position)


class DocumentsOnDisk(LazyTexts):
    """The texts of a file of documents, in its order, each read when it is accessed. Memory: 16 bytes per document.

    Attributes:
        names: their ids, held in memory besides.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used, an id occurs twice, or there are no rows; at an access: the file was changed.
    """

    def __init__(self, path: str, key: str) -> None:
        self._rows = open_rows(path, key)
        names: dict[str, None] = {}
        for row, source in self._rows.scan():
            name = read_named_text(row, source).name
            if name in names:
                raise DataError(f"{source}: _id = {shortened(name)}: an earlier line has this id; ids are unique in a "
                                "file")
            names[name] = None
        if not names:
            raise DataError(f"{path}:1: no rows; expected one JSON object per line")
        self.names = list(names)

    def __len__(self) -> int:
        return len(self._rows)

    def _text(self, index: int) -> str:
        return read_named_text(*self._rows.row(index), trusted=self._rows.detects_changes).text


class TextsOnDisk(LazyTexts):
    """The texts of a file of rows `{"text": str, "title"?: str}`, in its order, each read when it is accessed:
    `title + " " + text` where there is a title. Memory: 16 bytes per text.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used, or there are no rows; at an access: the file was changed.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path, self._rows, ignored, with_title = path, JsonlRows(path, key), set[str](), 0
        for row, source in self._rows.scan():
            check_keys(row, ("text",), ("text",), source)
            text = text_of_document(row, source)
            if not text.strip():
                check_text(text, "text", source)
            with_title += text != row["text"]
            ignored.update(row.keys() - {"text", "title"})
        if not len(self):
            raise DataError(f'{path}:1: no rows; a row is one line such as {{"text": "..."}}')
        if with_title:
            logger.info("%s: %d of %d rows have a title, which stands before their text", path, with_title, len(self))
        if ignored:
            logger.info("%s: ignored keys: %s", path, ", ".join(sorted(ignored)))

    def __len__(self) -> int:
        return len(self._rows)

    def source(self, index: int) -> str:
        """FILE:LINE of a text."""
        return self._rows.source(index)

    def _text(self, index: int) -> str:
        return trusted_title(self._rows.row(index)[0])


class Picked(LazyTexts):
    """Some of the texts of a sequence. A text is read when it is accessed; slicing reads none."""

    def __init__(self, texts: Sequence[str], indices: Sequence[int]) -> None:
        """`indices`: of the texts, in the wanted order."""
        self._texts, self._indices = texts, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _text(self, index: int) -> str:
        return self._texts[self._indices[index]]


class Corpus:
    """A file of documents, looked up by id. Memory: 32 bytes per document.

    Attributes:
        path: as it was given.
        digest: hash of its rows.

    Raises:
        ConfigError: the file cannot be opened.
        DataError: a row cannot be used, an id occurs twice, or there are no rows.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self._rows = open_rows(path, key)
        hashes = []
        for row, source in self._rows.scan():
            hashes.append(text_id(read_named_text(row, source).name))
        if not hashes:
            raise DataError(f'{path}:1: no rows; a row is one line such as {{"docid": "1", "text": "..."}}')
        self.digest = self._rows.digest
        in_file_order: NDArray[np.int64] = np.array(hashes, dtype=np.int64)
        self._order = np.argsort(in_file_order, kind="stable")
        self._hashes = in_file_order[self._order]
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if twice.size:
            row, source = self._rows.row(int(self._order[twice + 1].min()))
            name = read_named_text(row, source).name
            raise DataError(f"{source}: id {shortened(name)}: an earlier line has this id; ids are unique in a file")

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        position, wanted = self._position(name)
        return position < len(self._hashes) and int(self._hashes[position]) == wanted

    def _position(self, name: str) -> tuple[int, int]:
        """Position of the id's hash in the sorted hashes, or where it would be, and the hash."""
        wanted = text_id(name)
        return int(np.searchsorted(self._hashes, wanted)), wanted

    def row_of(self, name: str) -> int:
        """Row index, from 0, of the document with this id, which is in the file."""
        return int(self._order[self._position(name)[0]])

    def read(self, row: int) -> tuple[NamedText, str]:
        """The document of a row, and its FILE:LINE."""
        values, source = self._rows.row(row)
        return read_named_text(values, source, trusted=self._rows.detects_changes), source

    def texts_of(self, ids: tuple[str, ...], source: str) -> tuple[str, ...]:
        """The texts of these documents.

        Args:
            source: FILE:LINE of the row that names them.
        Raises:
            DataError: an id is not in the file, or its text is empty.
        """
        texts = []
        for name in ids:
            if name not in self:
                raise DataError(f"{source}: id {shortened(name)} is not in {self.path}; add it there or remove the row")
            text = self.read(self.row_of(name))[0].text
            if not text.strip():
                raise DataError(f"{source}: id {shortened(name)} has an empty text in {self.path}; give it a text or "
                                "remove the row")
            texts.append(text)
        return tuple(texts)
