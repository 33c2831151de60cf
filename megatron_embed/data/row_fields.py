"""The fields of one row by name. A wrong field is a DataError that begins with FILE:LINE and names the field."""

import difflib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_embed.data.jsonl import check_text, json_type, shortened
from megatron_embed.data.number_checks import LARGEST
from megatron_embed.data.records import id_from_text
from megatron_embed.errors import DataError

Row = dict[str, object]
Passages = tuple[tuple[str, ...], tuple[str, ...] | None]
"""Texts and their ids, None where no passage has one."""

_SAME_MEANING = (
    {"positive", "positives", "pos", "positive_passages", "positive_ctxs", "pos_doc", "answer", "response", "document"},
    {"negatives", "negative", "neg", "negs", "hard_negatives", "negative_passages", "hard_negative_ctxs", "neg_doc",
     "rejected_response", "negative_messages"},
    {"query", "question", "anchor", "query_text"}, {"instruction", "instruct", "prompt"}, {"documents", "docs"},
    {"label", "labels", "score"})
_NOT_TEXT = ("_id", "_ids", "_score", "_scores", "_label", "_labels")


@lru_cache(maxsize=4096)
def _meant_field(key: str, known: tuple[str, ...], absent: tuple[str, ...]) -> str | None:
    """The absent field that an unknown key looks like, if any."""
    name = key.lower().strip()
    if name.endswith(_NOT_TEXT):
        return None
    same = [field for words in _SAME_MEANING if name in words for field in absent if field in words]
    close = [field for field in difflib.get_close_matches(name, known, n=1, cutoff=0.8) if field in absent]
    return next(iter([*same, *close]), None)


def keys_of(row: Row) -> str:
    """The first keys of a row, for messages."""
    return ", ".join(shortened(key, 40) for key in list(row)[:10]) or "no keys"


def check_keys(row: Row, required: tuple[str, ...], known: tuple[str, ...], source: str, *,
               renaming: str = "") -> None:
    """Refuses a row without a required field, or with a misspelt one.

    Args:
        renaming: a further remedy for a missing field, in which FIELD stands for its name.
    """
    absent = tuple(name for name in known if name not in row)
    for key in row.keys() - set(known):
        meant = _meant_field(key, known, absent)
        if meant is not None:
            raise DataError(f"{source}: unknown key {shortened(key)} = {shortened(row[key])}; did you mean {meant!r}?")
    for name in required:
        if name in absent:
            raise DataError(f"{source}: {name} is missing; the row has {keys_of(row)}; add {name!r}"
                            f"{renaming.replace('FIELD', name)}")


def check_texts(value: object, name: str, source: str) -> None:
    """Refuse what is not a string or a list of strings."""
    if isinstance(value, str):
        check_text(value, name, source)
        return
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a string or a list of strings")
    for index, text in enumerate(value):
        check_text(text, f"{name}[{index}]", source)


def number(value: object, name: str, source: str) -> float:
    """A number that is finite in float32, in which losses are computed; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{source}: {name} = {shortened(value)} is a JSON {json_type(value)}; it must be a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise DataError(f"{source}: {name} = {shortened(value)} is not finite; correct the row or remove it")
    if abs(result) > LARGEST:
        raise DataError(f"{source}: {name} = {shortened(value)} is not finite in float32, in which losses are "
                        f"computed: it may be at most {LARGEST:.4g}; correct the row or remove it")
    if isinstance(value, int) and result != value:
        raise DataError(f"{source}: {name} = {shortened(value)} has more digits than a floating-point number holds; "
                        "round it, or remove the row")
    return result


def name_of(value: object, name: str, source: str) -> str:
    """An id: a string, or a whole number written out."""
    return check_text(str(value) if isinstance(value, int) and not isinstance(value, bool) else value, name, source)


def titled(row: Row, name: str, source: str) -> str:
    """`title + " " + text` of a passage, the text alone where the title is absent or empty."""
    prefix = f"{name}." if name else ""
    if "text" not in row:
        raise DataError(f"{source}: {prefix}text is missing; the passage has {keys_of(row)}; add 'text'")
    check_text(row["text"], f"{prefix}text", source)
    title = row.get("title")
    if title is not None and not (isinstance(title, str) and not title.strip()):
        check_text(title, f"{prefix}title", source)
    return trusted_title(row)


def trusted_title(row: dict[str, Any]) -> str:
    """The same for a passage that was checked before."""
    title = row.get("title")
    return f"{title} {row['text']}" if isinstance(title, str) and title.strip() else str(row["text"])


def _check_passages(value: object, name: str, source: str, id_keys: tuple[str, ...]) -> None:
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a list of passages such as "
                        '{"title": ..., "text": ...}')
    for index, passage in enumerate(value):
        field = f"{name}[{index}]"
        if not isinstance(passage, dict):
            raise DataError(f"{source}: {field} = {shortened(passage)} is a JSON {json_type(passage)}; it must be a "
                            'passage such as {"title": ..., "text": ...}')
        titled(passage, field, source)
        for key in id_keys:
            if passage.get(key) not in (None, ""):
                name_of(passage[key], f"{field}.{key}", source)
                break


@dataclass(slots=True)
class Fields:
    """A row whose fields are taken by name. Each method raises DataError for a field that cannot be used.

    A row that was checked before, and cannot have changed since, is trusted: its fields are converted, not checked.
    """

    row: dict[str, Any]
    source: str
    """FILE:LINE, with which messages begin."""
    trusted: bool = False

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value: str = self.row[name]
        return value if self.trusted else check_text(value, name, self.source)

    def optional_text(self, name: str) -> str | None:
        """A text, None if the row has no value for it."""
        return None if self.row.get(name) is None else self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts of a string or a list of strings."""
        value = self.row[name]
        if not self.trusted:
            check_texts(value, name, self.source)
        return (value,) if isinstance(value, str) else tuple(value)

    def some_texts(self, name: str) -> tuple[str, ...]:
        """The same, at least one."""
        texts = self.texts(name)
        if not texts:
            raise DataError(f"{self.source}: {name} = [] is empty; give it at least one text or remove the row")
        return texts

    def optional_texts(self, name: str) -> tuple[str, ...]:
        """The same, none if the row has no value for it."""
        return () if self.row.get(name) is None else self.texts(name)

    def number(self, name: str) -> float:
        """A number that is finite in float32."""
        value = self.row[name]
        return float(value) if self.trusted else number(value, name, self.source)

    def optional_number(self, name: str) -> float | None:
        """The same, None if the row has no value for it."""
        return None if self.row.get(name) is None else self.number(name)

    def numbers(self, name: str, count: int, what: str) -> tuple[float, ...]:
        """`count` finite numbers, one for each of `what`."""
        values = self.row[name]
        if self.trusted:
            return tuple(map(float, values))
        if not isinstance(values, list):
            raise DataError(f"{self.source}: {name} = {shortened(values)}: it must be a list of numbers")
        if len(values) != count:
            raise DataError(f"{self.source}: {name} has {len(values)} numbers for {count} {what}; give one for each")
        return tuple(number(value, f"{name}[{index}]", self.source) for index, value in enumerate(values))

    def optional_numbers(self, name: str, count: int, what: str) -> tuple[float, ...] | None:
        """The same, None if the row has no value for it."""
        return None if self.row.get(name) is None else self.numbers(name, count, what)

    def ids(self, name: str) -> tuple[str, ...]:
        """A list of ids."""
        return self._ids(self.row[name], name)

    def optional_ids(self, name: str) -> tuple[str, ...]:
        """The same, none if the row has no value for it, or an empty one."""
        return self._ids(self.row.get(name) or [], name)

    def _ids(self, values: Any, name: str) -> tuple[str, ...]:
        if self.trusted:
            return tuple(map(str, values))
        if not isinstance(values, list):
            raise DataError(f"{self.source}: {name} = {shortened(values)}: it must be a list of ids")
        return tuple(name_of(value, f"{name}[{index}]", self.source) for index, value in enumerate(values))

    def passages(self, name: str, id_keys: tuple[str, ...] = ("docid",)) -> Passages:
        """Texts and ids of `[{"title"?, "text"}, ...]`.

        A passage has its id under one of `id_keys`; one without gets it from its text, if any other has one.
        """
        return self._passages(self.row[name], name, id_keys)

    def optional_passages(self, name: str, id_keys: tuple[str, ...] = ("docid",)) -> Passages:
        """The same, none if the row has no value for it, or an empty one."""
        return self._passages(self.row.get(name) or [], name, id_keys)

    def _passages(self, passages: Any, name: str, id_keys: tuple[str, ...]) -> Passages:
        if not self.trusted:
            _check_passages(passages, name, self.source, id_keys)
        texts = tuple(trusted_title(passage) for passage in passages)
        ids = [next((str(passage[key]) for key in id_keys if passage.get(key) not in (None, "")), None)
               for passage in passages]
        if all(name is None for name in ids):
            return texts, None
        return texts, tuple(id_from_text(text) if name is None else name
                            for name, text in zip(ids, texts, strict=True))
