"""The fields of one row, checked: whatever is wrong is a DataError that begins with FILE:LINE and names the field."""

import difflib
import math
from functools import lru_cache

from megatron_embed.data.jsonl import check_text, json_type, shortened
from megatron_embed.data.number_checks import LARGEST
from megatron_embed.data.records import id_from_text
from megatron_embed.errors import DataError

Row = dict[str, object]

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


def check_keys(row: Row, required: tuple[str, ...], known: tuple[str, ...], source: str) -> None:
    """Refuses a row without a required field, or with a misspelt one."""
    absent = tuple(name for name in known if name not in row)
    for key in row.keys() - set(known):
        meant = _meant_field(key, known, absent)
        if meant is not None:
            raise DataError(f"{source}: unknown key {shortened(key)} = {shortened(row[key])}; did you mean {meant!r}?")
    for name in required:
        if name in absent:
            keys = ", ".join(shortened(key, 40) for key in list(row)[:10]) or "no keys"
            raise DataError(f"{source}: {name} is missing; the row has {keys}; add {name!r}")


def texts(value: object, name: str, source: str) -> tuple[str, ...]:
    """The texts of a string or a list of strings."""
    if isinstance(value, str):
        return (check_text(value, name, source),)
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a string or a list of strings")
    return tuple(check_text(text, f"{name}[{index}]", source) for index, text in enumerate(value))


def some_texts(value: object, name: str, source: str) -> tuple[str, ...]:
    """The same, at least one."""
    found = texts(value, name, source)
    if not found:
        raise DataError(f"{source}: {name} = [] is empty; give it at least one text or remove the row")
    return found


def optional_texts(row: Row, name: str, source: str) -> tuple[str, ...]:
    """The same, none where the field is absent or null."""
    return () if row.get(name) is None else texts(row[name], name, source)


def optional_text(row: Row, name: str, source: str) -> str | None:
    """A text, null where the field is absent or null."""
    return None if row.get(name) is None else check_text(row[name], name, source)


def number(value: object, name: str, source: str) -> float:
    """A number that is finite in float32, in which losses are computed; a truth value is none."""
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


def numbers(value: object, name: str, source: str, count: int, what: str) -> tuple[float, ...]:
    """`count` finite numbers, one for each of `what`."""
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a list of numbers")
    if len(value) != count:
        raise DataError(f"{source}: {name} has {len(value)} numbers for {count} {what}; give one for each")
    return tuple(number(item, f"{name}[{index}]", source) for index, item in enumerate(value))


def optional_numbers(row: Row, name: str, source: str, count: int, what: str) -> tuple[float, ...] | None:
    """The same, null where the field is absent or null."""
    return None if row.get(name) is None else numbers(row[name], name, source, count, what)


def name_of(value: object, name: str, source: str) -> str:
    """An id: a string, or a whole number written out."""
    return check_text(str(value) if isinstance(value, int) and not isinstance(value, bool) else value, name, source)


def names(value: object, name: str, source: str) -> tuple[str, ...]:
    """A list of ids."""
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a list of ids")
    return tuple(name_of(item, f"{name}[{index}]", source) for index, item in enumerate(value))


def titled(row: Row, name: str, source: str) -> str:
    """`title + " " + text` of a passage, the text alone where the title is absent or empty."""
    prefix = f"{name}." if name else ""
    if "text" not in row:
        keys = ", ".join(shortened(key, 40) for key in list(row)[:10]) or "no keys"
        raise DataError(f"{source}: {prefix}text is missing; the passage has {keys}; add 'text'")
    text = check_text(row["text"], f"{prefix}text", source)
    title = row.get("title")
    if title is None or (isinstance(title, str) and not title.strip()):
        return text
    return f"{check_text(title, f'{prefix}title', source)} {text}"


def passages(value: object, name: str, source: str,
             id_keys: tuple[str, ...] = ("docid",)) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Texts of `[{"title"?, "text"}, ...]`, and their ids if any has one under one of `id_keys`; the others' are made
    from their texts."""
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a list of passages such as "
                        '{"title": ..., "text": ...}')
    found: list[str] = []
    ids: list[str | None] = []
    for index, passage in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(passage, dict):
            raise DataError(f"{source}: {place} = {shortened(passage)} is a JSON {json_type(passage)}; it must be a "
                            'passage such as {"title": ..., "text": ...}')
        found.append(titled(passage, place, source))
        ids.append(next((name_of(passage[key], f"{place}.{key}", source) for key in id_keys
                         if passage.get(key) not in (None, "")), None))
    if found and not any(name is not None for name in ids):
        return tuple(found), None
    return tuple(found), tuple(id_from_text(text) if name is None else name
                               for name, text in zip(ids, found, strict=True))
