"""The option of commands that read training rows without a configuration for columns with names of one's own."""

import argparse
from collections.abc import Sequence
from typing import Any


class _Columns(argparse.Action):
    """Collects COLUMN=FIELD of one option or several into a dict."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: str | Sequence[Any] | None, option_string: str | None = None) -> None:
        columns = dict(vars(namespace)[self.dest])
        for part in str(values).split(","):
            column, _, field = (text.strip() for text in part.rpartition("="))
            if not column or not field:
                raise argparse.ArgumentError(self, f"{part!r} is not COLUMN=FIELD, as in "
                                                   "question=query,answer=positive")
            if column in columns or field in columns.values():
                twice = column if column in columns else field
                raise argparse.ArgumentError(self, f"{part!r}: {twice} is there twice; keep one of them")
            columns[column] = field
        setattr(namespace, self.dest, columns)


def add_columns_argument(parser: argparse.ArgumentParser, of_what: str) -> None:
    """Add --columns, a dict of column -> field. `of_what`: the rows, for the help."""
    parser.add_argument("--columns", action=_Columns, default={}, metavar="COLUMN=FIELD,...",
                        help=f"Columns {of_what} with other names, and the fields that they are, as "
                             "question=query,answer=positive (default: the names of docs/data.md)")
