"""The texts of `serve --corpus`, which the page searches at first."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_embed.data.corpus import ID_KEYS, text_of_document
from megatron_embed.data.row_fields import check_keys, name_of
from megatron_embed.data.row_source import open_rows
from megatron_embed.errors import ConfigError, DataError

KEY = "--corpus"
MOST_TEXTS = 20_000
"""Texts that the page takes: it holds their vectors in the browser."""
_TEXT_ENDINGS = (".txt", ".md")


@dataclass(frozen=True, kw_only=True)
class PageCorpus:
    """Texts with their ids, and the vectors that were computed so far."""

    name: str
    ids: list[str]
    texts: list[str]
    vectors: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    """By model and first text: [texts, dim] float32."""


def read_page_corpus(path: str) -> PageCorpus:
    """The texts of a file of rows, or the paragraphs of a folder's .txt and .md files, without those that are empty.

    Raises:
        ConfigError: it cannot be opened, or holds more than MOST_TEXTS.
        DataError: a row cannot be used, or there is no text.
    """
    files = [] if os.path.isfile(path) else sorted(
        file for file in Path(path).rglob("*") if file.suffix in _TEXT_ENDINGS and file.is_file())
    ids, texts = [], []
    for name, text in _paragraphs(path, files) if files else _rows(path):
        if not text.strip():
            continue
        ids.append(name)
        texts.append(text)
        if len(texts) > MOST_TEXTS:
            raise ConfigError(f"{KEY} {path}: more than {MOST_TEXTS:,} texts, which the page cannot hold; search them "
                              "with `megatron-embed encode` and `megatron-embed search`", key=KEY)
    if not texts:
        raise DataError(f'{path}:1: no rows; a row is one line such as {{"text": "..."}}')
    return PageCorpus(name=os.path.basename(os.path.abspath(path)), ids=ids, texts=texts)


def _rows(path: str) -> Iterator[tuple[str, str]]:
    """(id or number of the row, text) of each row."""
    for number, (row, source) in enumerate(open_rows(path, KEY).scan(), 1):
        check_keys(row, ("text",), ("text",), source)
        key = next((key for key in ID_KEYS if key in row), None)
        yield str(number) if key is None else name_of(row[key], key, source), text_of_document(row, source)


def _paragraphs(folder: str, files: list[Path]) -> Iterator[tuple[str, str]]:
    """(FILE:NUMBER, text) of each part between blank lines."""
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:1: not UTF-8: byte 0x{error.object[error.start]:02x}; save the file as "
                            "UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{KEY} {file}: cannot be read ({error.strerror or error})", key=KEY) from None
        parts = (" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", content))
        for number, part in enumerate(filter(None, parts), 1):
            yield f"{name}:{number}", part

