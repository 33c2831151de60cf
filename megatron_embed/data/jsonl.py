"""JSONL files and JSON arrays, plain or compressed (gzip, Zstandard); every error names file and line."""

import gzip
import io
import json
import json.scanner
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, cast

from megatron_embed.config.json_file import DEEPEST, refuse_deep_value, refuse_many_brackets, too_deep
from megatron_embed.errors import ConfigError, DataError

_BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
"""Bytes of a line that holds no row."""
LONGEST_LINE = 64 << 20
"""Bytes of a line, after decompression."""
_BEGINNING = 1 << 16
MOST_BLANK_LINES = 1_000_000
"""Blank lines in a row: 3 GB of them fit into a compressed file of 3 MB."""
LARGEST_ARRAY = 256 << 20
"""Bytes of a file that is one array, which is held in memory."""
ENDINGS = tuple(name + packing for packing in ("", ".gz", ".zst") for name in (".jsonl", ".json"))


class Line(NamedTuple):
    """One line that is not blank."""

    line_number: int
    """Number of the line in the file, from 1, blank lines counted."""
    start: int
    """Byte offset of `raw` in the file (after decompression)."""
    raw: bytes
    """With its line ending; without the byte order mark of the file's first line."""


def shortened(value: object, limit: int = 80) -> str:
    """`repr(value)` on one line of at most `limit` characters."""
    text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_compressed(path: str) -> bool:
    """Whether the file's name ends as that of a compressed file."""
    return path.endswith((".gz", ".zst"))


def _open_binary(path: str) -> BinaryIO:
    if path.endswith(".zst"):
        import pyarrow

        # pyarrow comes with `datasets`; Python itself knows Zstandard from 3.14 on.
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(path, compression="zstd")))
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def open_jsonl(path: str, key: str) -> BinaryIO:
    """The file's decompressed bytes.

    Raises:
        ConfigError: naming `key` (the setting or option the path came from), if it is not a readable JSONL file.
    """
    if not path.endswith(ENDINGS):
        raise ConfigError(f"{key} = {path!r}: not a JSONL file by its name; readable are {', '.join(ENDINGS)}", key=key)
    return open_file(path, key)


def open_file(path: str, key: str) -> BinaryIO:
    """The file's decompressed bytes, whatever its name.

    Raises:
        ConfigError: naming `key`, if it is not a readable file.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ConfigError(f"{key} = {path!r}: not a regular file; name one JSONL file per entry", key=key)
        return _open_binary(path)
    except FileNotFoundError:
        raise ConfigError(f"{key} = {path!r}: no such file; the current directory is {str(Path.cwd())!r}",
                          key=key) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{key} = {path!r}: cannot be read: {reason}", key=key) from None


def read_lines(path: str, key: str) -> Iterator[Line]:
    """Every line that is not blank.

    Raises:
        ConfigError: the file cannot be opened.
        DataError: see `numbered_lines`.
    """
    for line_number, start, raw in read_lines_between(path, key, 0, None):
        if raw.strip(BLANK):
            yield Line(line_number, start, raw)


def read_lines_between(path: str, key: str, begin: int, end: int | None,
                       first_line: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and bytes of every line, blank ones too.

    Args:
        begin, end: of the lines that begin at byte `begin` or behind it, and before byte `end` (None: any).
        first_line: number of the first of them.
    Raises:
        ConfigError: the file cannot be opened.
        DataError: see `numbered_lines`.
    """
    start = begin
    with open_jsonl(path, key) as file:
        if begin:
            file.seek(begin - 1)
            start += len(file.readline(LONGEST_LINE + 1)) - 1
        for line_number, raw in numbered_lines(file, path, first_line):
            if end is not None and start >= end:
                return
            behind = start + len(raw)
            if not start and raw.startswith(_BOM):
                raw, start = raw[len(_BOM):], len(_BOM)
            yield line_number, start, raw
            start = behind


def numbered_lines(file: BinaryIO, path: str | Path, first_line: int = 1) -> Iterator[tuple[int, bytes]]:
    """Every line of an open file with its number, from `first_line` on, blank ones too. Memory: the line.

    Raises:
        DataError: a line is longer than LONGEST_LINE, blank lines do not end, the file breaks off or its compression is
            damaged.
    """
    line_number, num_blank = first_line - 1, 0
    while True:
        line_number += 1
        try:
            raw = file.readline(LONGEST_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}:{line_number}: cannot be read on: {error}; the file is damaged or incomplete, "
                            "make it again") from None
        if not raw:
            return
        if len(raw) > LONGEST_LINE:
            raise DataError(f"{path}:{line_number}: a line of more than {LONGEST_LINE >> 20} MiB; a line holds one "
                            "row, so divide its text, or make the file again with one row a line")
        num_blank = 0 if raw.strip(BLANK) else num_blank + 1
        if num_blank > MOST_BLANK_LINES:
            raise DataError(f"{path}:{line_number}: more than {MOST_BLANK_LINES:,} blank lines in a row; remove them")
        yield line_number, raw


class _RefusedError(Exception):
    """A construct that `json` would accept."""


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not valid JSON")


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(f"key {shortened(twice)} occurs twice; keep one of them")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
_TRUSTING_DECODER = json.JSONDecoder()
_SCAN = json.scanner.make_scanner(_DECODER)


def parse_object(raw: bytes, source: str) -> dict[str, object]:
    """The JSON object of one line.

    Raises:
        DataError: beginning with `source`, if the line is not UTF-8, not JSON, or another JSON value.
    """
    if (plain := _plain_object(raw)) is not None:
        return plain
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line; "
                        "save the file as UTF-8") from None
    try:
        refuse_many_brackets(raw)
        row = _DECODER.decode(text)
        refuse_deep_value(row, raw)
    except json.JSONDecodeError as error:
        near = shortened(text[max(0, error.pos - 20):error.pos + 20].strip("\r\n"))
        raise DataError(f"{source}: not valid JSON: {error.msg} at character {error.pos + 1}, near {near}; "
                        "a line holds exactly one JSON object") from None
    except RecursionError:
        raise DataError(f"{source}: {too_deep()}; correct the line") from None
    except (_RefusedError, ValueError) as error:  # ValueError: an integer of thousands of digits, many brackets
        raise DataError(f"{source}: {error}; correct the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: a JSON {json_type(row)}, {shortened(row)}, where one JSON object per line is "
                        "expected; write one object per line, without enclosing brackets")
    return row


def _plain_object(raw: bytes) -> dict[str, object] | None:
    """The JSON object of a line that begins with it and has few brackets; None for any other line, which may be wrong.
    """
    if raw[:1] != b"{" or raw.count(b"[") + raw.count(b"{") > DEEPEST:
        return None
    try:
        text = raw.decode("utf-8")
        row: dict[str, object]
        row, end = _SCAN(text, 0)
    except (ValueError, StopIteration, _RefusedError):
        return None
    return None if text[end:].strip(" \t\r\n") else row


def parse_trusted_object(raw: bytes, source: str) -> dict[str, object]:
    """The JSON object of a line that `parse_object` has accepted before.

    Raises:
        DataError: it is not JSON any more.
    """
    try:
        row: dict[str, object] = _TRUSTING_DECODER.decode(raw.decode("utf-8"))
    except ValueError:
        return parse_object(raw, source)
    return row


def is_array(path: str, key: str) -> bool:
    """Whether a .json file holds one array instead of an object per line. Raises ConfigError if it cannot be opened."""
    if not path.endswith((".json", ".json.gz", ".json.zst")):
        return False
    with open_file(path, key) as file:
        try:
            return file.read(_BEGINNING).removeprefix(_BOM).lstrip(BLANK).startswith(b"[")
        except (OSError, EOFError, zlib.error):
            return False  # who reads its lines refuses it


def parse_array(path: str, key: str) -> Iterator[tuple[dict[str, object], str]]:
    """The objects of a JSON array, each with its FILE:LINE, in a file of one line FILE:ROW. Memory: the whole file.

    Raises:
        ConfigError: the file cannot be opened, or is larger than LARGEST_ARRAY.
        DataError: it is not an array of objects.
    """
    with open_file(path, key) as file:
        try:
            raw = file.read(LARGEST_ARRAY + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}:1: cannot be read: {error}; the file is damaged or incomplete, make it "
                            "again") from None
    if len(raw) > LARGEST_ARRAY:
        raise ConfigError(f"{key} = {path!r}: an array of more than {LARGEST_ARRAY >> 20} MiB; write one object per "
                          "line (JSONL), which is read line by line", key=key)
    try:
        text = raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}; save the file as UTF-8") from None
    position, line, counted = text.index("[") + 1, 1, 0
    separator, number, one_line = "", 0, "\n" not in text.strip()
    while True:
        number += 1
        position = _after_blanks(text, position)
        line, counted = line + text.count("\n", counted, position), position
        source = f"{path}:{line}"
        if text[position:position + 1] == "]" and separator != ",":
            break
        row, position = _element(text, position, source)
        yield row, f"{path}:{number}" if one_line else source
        position = _after_blanks(text, position)
        separator = text[position:position + 1]
        if separator == "]":
            break
        if separator != ",":
            near = shortened(text[max(0, position - 20):position + 20])
            raise DataError(f"{source}: not valid JSON: a comma or `]` is missing behind this object, near {near}")
        position += 1
    if text[position + 1:].strip():
        raise DataError(f"{path}:{line}: text behind the array's `]`; a file holds one array, or one object per line")


def _after_blanks(text: str, position: int) -> int:
    while text[position:position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _element(text: str, position: int, source: str) -> tuple[dict[str, object], int]:
    """The object of an array at `position`, and the position behind it."""
    try:
        row, end = _DECODER.raw_decode(text, position)
        refuse_deep_value(row, text[position:end].encode("utf-8", "surrogatepass"))
    except json.JSONDecodeError as error:
        near = shortened(text[max(0, error.pos - 20):error.pos + 20])
        raise DataError(f"{source}: not valid JSON: {error.msg}, near {near}") from None
    except RecursionError:
        raise DataError(f"{source}: {too_deep()}; correct the object") from None
    except (_RefusedError, ValueError) as error:
        raise DataError(f"{source}: {error}; correct the object") from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: a JSON {json_type(row)}, {shortened(row)}, where an array of objects is expected")
    return row, end


def json_type(value: object) -> str:
    """JSON's name for the type of a value; Python's for a type that only a table can hold."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number",
             type(None): "null"}
    return names.get(type(value), type(value).__name__)


def check_text(value: object, name: str, source: str) -> str:
    """`value` itself, if it is a string that is valid Unicode and not blank.

    Raises:
        DataError: beginning with `source` and naming `name`.
    """
    if not isinstance(value, str):
        raise DataError(f"{source}: {name} = {shortened(value)} is a JSON {json_type(value)}; it must be a string")
    if not value.strip():
        raise DataError(f"{source}: {name} = {shortened(value)} is empty; give it a text or remove the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{source}: {name} contains an unpaired surrogate, \\u{ord(value[error.start]):04x}, at "
                            f"character {error.start + 1}; write the character itself or both surrogates") from None
    return value
