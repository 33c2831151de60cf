"""Columns with names of one's own: `columns` of an entry of data.train, or --columns of a command."""

import difflib
from collections.abc import Callable, Collection

from megatron_embed.data.jsonl import shortened
from megatron_embed.data.row_fields import Row, keys_of
from megatron_embed.errors import DataError

COLUMNS_SETTING = "data.train.columns"
COLUMNS_OPTION = "--columns"
_REMEDIES = {
    COLUMNS_SETTING: ", or say in data.train which column it is: {path: FILE, columns: {COLUMN: FIELD}}",
    COLUMNS_OPTION: ", or say which column it is: --columns COLUMN=FIELD"}


class Columns:
    """The names that rows are read by in place of those of their columns.

    Args:
        fields: column -> field.
        key: what sets them: COLUMNS_SETTING, COLUMNS_OPTION, or None where nothing does.

    Attributes:
        present: those of the columns that were in a row.
    """

    def __init__(self, fields: dict[str, str], key: str | None) -> None:
        self.present: set[str] = set()
        self._fields = fields
        self._key = key

    @property
    def remedy(self) -> str:
        """A remedy for a field that is missing, which stands as FIELD in it."""
        return _REMEDIES.get(self._key or "", "")

    def renamed(self, row: Row) -> Row:
        """The row with its columns under the names of their fields; columns that it lacks stay absent."""
        kept = {name: value for name, value in row.items() if name not in self._fields}
        return kept | {field: row[name] for name, field in self._fields.items() if name in row}

    def absent(self, row: Row) -> dict[str, str]:
        """Columns that the row lacks, with their fields; takes note of those that it has."""
        if row.keys() >= self._fields.keys():
            self.present.update(self._fields)
            return {}
        self.present.update(row.keys() & self._fields.keys())
        return {name: field for name, field in self._fields.items() if name not in row}

    def needed(self, name: str, row: Row, source: str) -> DataError:
        """The error for a row, as it is written, without a column whose field every row needs."""
        return self._error(name, row, source, f"every row needs {self._fields[name]!r}; correct the name, or the row")

    def ambiguous(self, name: str, row: Row, source: str) -> DataError:
        """The error for a row, as it is written, without a column, but with one that has the name of its field."""
        field = self._fields[name]
        return self._error(name, row, source, f"its own {field!r} is not read in place of it: correct the name, or the "
                           "row", (field,))

    def require_found(self, present: Collection[str], first_row: Callable[[], tuple[Row, str]],
                      known: Collection[str], ignored: Collection[str]) -> None:
        """Raise DataError for a column that no row has, or that is no field.

        Args:
            present: the columns that some row has.
            first_row: reads the first row as it is written, with its FILE:LINE.
            known: fields of the file's format.
            ignored: those of our fields that rows of this format do not have.
        """
        if absent := [name for name in self._fields if name not in present]:
            raise self._error(absent[0], *first_row(), "no other row has it either; correct the name, or leave it out",
                              known)
        for name, field in self._fields.items():
            if field in ignored:
                raise DataError(f"{first_row()[1]}: {self._key} says that {shortened(name)} is {shortened(field)}, "
                                f"which is no field of these rows ({', '.join(known)}); correct it, or leave it out")

    def _error(self, name: str, row: Row, source: str, remedy: str, known: Collection[str] = ()) -> DataError:
        field, is_option = self._fields[name], self._key == COLUMNS_OPTION
        if near := difflib.get_close_matches(name, list(row), n=1):
            remedy = f"did you mean {shortened(near[0])}?"
        if field in row and field not in known:
            remedy = f"write the column first: {f'--columns {field}={name}' if is_option else f'{{{field}: {name}}}'}"
        return DataError(f"{source}: {self._key} names {shortened(name)}, and the row has {keys_of(row)}; {remedy}")
