"""Tables of keys of settings files that other programs wrote: each key is honoured, harmless or refused.

The tables themselves are in known_keys.py; docs/model_directories.md shows them. A key that is not in its table is
refused by name: silently ignored it could give wrong results with exit code 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_embed.errors import CheckpointError

Verdict = Literal["honoured", "harmless", "refused"]

SHOWN_CHARACTERS = 80
"""Length of a value in a message."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a settings file."""

    verdict: Verdict
    about: str
    """Its effect, for the page and for the message that refuses it."""
    values: tuple[object, ...] | None = None
    """honoured: the only values that are; None: every value that the reader of the key takes. refused: the values,
    besides None, at which it has no effect and passes."""
    remedy: str = ""
    """Remedy for the user, if it differs from the table's."""
    nested: "Mapping[str, Key] | None" = None
    """Keys of the object that is its value."""


def honoured(about: str, *values: object, remedy: str = "") -> Key:
    """A key that has the same effect here as in its own library; `values`: the only values that are supported."""
    return Key(verdict="honoured", about=about, values=values or None, remedy=remedy)


def harmless(about: str) -> Key:
    """A key that changes nothing in what the model computes here."""
    return Key(verdict="harmless", about=about)


def refused(about: str, *off: object, remedy: str = "") -> Key:
    """A key whose effect is not computed here; at None and the values `off` it has no effect and passes."""
    return Key(verdict="refused", about=about, values=off, remedy=remedy)


def nested(about: str, keys: Mapping[str, Key]) -> Key:
    """A key whose value is an object with keys of its own."""
    return Key(verdict="honoured", about=about, nested=keys)


@dataclass(frozen=True, kw_only=True)
class FileTable:
    """The keys of one settings file."""

    file: str
    """Its name on the page."""
    about: str
    """Who reads and writes it."""
    keys: Mapping[str, Key]
    closed: bool = True
    """Whether a key that is not in the table is refused; if not, it is left to the library that reads the file."""
    unset: tuple[object, ...] = field(default=(None, [], {}))
    """Values at which a key that is not in the table has no effect."""
    remedy: str = "remove the key if the model was trained without it"
    """Remedy for the user if a key is refused."""

    def check(self, path: Path, values: Mapping[str, Any]) -> None:
        """Raises CheckpointError, naming file, key, value and remedy, for what is refused; `path`: the file read."""
        self._check(path, values, self.keys, "")

    def _check(self, path: Path, values: Mapping[str, Any], keys: Mapping[str, Key], prefix: str) -> None:
        for name, value in values.items():
            printed = name if name.isprintable() and len(name) <= SHOWN_CHARACTERS else shown_value(name)
            key, shown = keys.get(name), f"{path}: {prefix}{printed} = {shown_value(value)}"
            if key is None:
                if self.closed and not _is_among(value, self.unset):
                    raise CheckpointError(f"{shown}: a key that this version does not know, so its effect would be "
                                          f"silently ignored; {self.remedy}")
            elif key.nested is not None:
                if value is None:
                    continue
                if not isinstance(value, dict):
                    raise CheckpointError(f"{shown}: must be a JSON object; fetch the file again")
                self._check(path, value, key.nested, f"{prefix}{name}.")
            elif _is_refused(key, value):
                raise CheckpointError(f"{shown} is not supported: {key.about}; {key.remedy or self.remedy}")


def shown_value(value: object) -> str:
    """A value for a message: at most SHOWN_CHARACTERS long, control characters escaped."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _is_refused(key: Key, value: object) -> bool:
    if key.verdict == "refused":
        return value is not None and not _is_among(value, key.values or ())
    return key.verdict == "honoured" and key.values is not None and not _is_among(value, key.values)


def _is_among(value: object, values: tuple[object, ...]) -> bool:
    """Whether it is one of them; True and 1, False and 0 are different."""
    return any(type(value) is type(other) and value == other for other in values)
