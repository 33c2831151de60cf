"""Write docs/settings.md from the code: every key of a run's configuration with its type, default and meaning.

    python tools/settings_page.py
"""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

from megatron_embed.config.schema import RunConfig

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "settings.md"
HEAD = """# Settings of a run

Every key of the YAML file that `megatron-embed train`, `plan`, `doctor --config` and `data check` read. On the command
line a key is set with `section.key=value`. An unknown key, a value of a wrong type or out of range ends the program
with exit code 2 and one line with file, line and key; settings without any effect are refused too. This page is
generated from `megatron_embed/config/` by `tools/settings_page.py`.

Values in the file and on the command line follow YAML 1.2: `010` is 10 (octal is `0o10`), `1e-5` and `.5` are numbers,
`true` and `false` are the only booleans; `yes`, `on`, `1:30`, `1_000` and dates are text. Merge keys (`<<`),
`%YAML 1.1` and a key that is set twice are refused.
"""


def docs_of(kind: type[Any]) -> dict[str, str]:
    """Field -> its docstring in the class's source, on one line."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    docs: dict[str, str] = {}
    last = None
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            last = part.target.id
        elif last is not None and isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
            docs[last] = " ".join(str(part.value.value).split())
        else:
            last = None
    return docs


def type_name(kind: Any) -> str:
    """Name of a type in YAML's words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin is tuple:
        return f"list of {type_name(parts[0])}"
    if parts:
        return ", ".join(type_name(part) for part in parts)
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", type(None): "`null`"}
    return names.get(kind, "entries (below)")


def default_of(field: "dataclasses.Field[Any]") -> str:
    """Default value in YAML's spelling."""
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, tuple):
        return "`[" + ", ".join(map(str, field.default)) + "]`"
    if field.default is None:
        return "`null`"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return f"`{field.default}`" if field.default != "" else '`""`'


def table(kind: type[Any]) -> list[str]:
    """Table of a section's keys."""
    docs, types = docs_of(kind), typing.get_type_hints(kind)
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        meaning = docs.get(field.name, "").replace("|", "\\|")
        rows.append(f"| `{field.name}` | {type_name(types[field.name])} | {default_of(field)} | {meaning} |")
    return rows


def entries_of(kind: type[Any]) -> dict[str, type[Any]]:
    """Keys of a section that are lists of mappings, with the dataclass of an entry."""
    parts = {name: typing.get_args(kind) for name, kind in typing.get_type_hints(kind).items()}
    return {name: entry for name, kinds in parts.items() for entry in kinds if dataclasses.is_dataclass(entry)
            and isinstance(entry, type)}


def page() -> str:
    """The whole page."""
    types = typing.get_type_hints(RunConfig)
    lines = [HEAD, "## task", "", "`embedding` (default) or `reranker`.", ""]
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(types[field.name]):
            kind = types[field.name]
            assert isinstance(kind, type)
            lines += [f"## {field.name}", "", *table(kind), ""]
            for key, entry in entries_of(kind).items():
                lines += [f"### An entry of `{field.name}.{key}`", "", "A string is short for `{path: STRING}`.", "",
                          *table(entry), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
