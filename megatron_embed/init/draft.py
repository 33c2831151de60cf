"""A configuration in the making: values with a comment each, and remarks about what has no line."""

import dataclasses
import json
import re
import textwrap
from typing import Any, get_type_hints

import yaml

from megatron_embed.config.foreign_word import OFF_ANYWAY, is_off
from megatron_embed.config.schema import RunConfig
from megatron_embed.config.yaml_tree import Dumper
from megatron_embed.init.defaults import DEFAULTS
from megatron_embed.init.foreign_settings import ForeignSettings, Setting

WIDTH = 120
_TRUE = ("true", "yes", "1", "on", "t", "y")
_FALSE = ("false", "no", "0", "off", "none", "f", "n")


class Draft:
    """The translation of another trainer's settings, as far as it has come.

    Attributes:
        settings: what is translated; each setting that is taken from it counts as translated.
        values: dotted key -> (value, comment).
        remarks: sentences for the head of the file.
        is_reranker: whether the task is reranker; otherwise it is embedding.
        defaults: values of the other trainer for settings that are not given.
        num_rows: rows of `data.train`; None: not known, since they are not on this machine or too many to count.
    """

    def __init__(self, settings: ForeignSettings, task: str) -> None:
        self.settings = settings
        self.is_reranker = task == "reranker"
        self.trainer = settings.launch.trainer
        self.values: dict[str, tuple[Any, str]] = {}
        self.remarks: list[str] = []
        self.num_rows: int | None = None
        self.defaults = DEFAULTS.get(self.trainer, {}) | DEFAULTS.get(f"{self.trainer} {task}", {})

    def set(self, key: str, value: object, comment: str) -> None:
        """Give a key its value; a later value replaces an earlier one."""
        self.values[key] = (value, comment)

    def value(self, key: str, default: object = None) -> Any:
        """The value that a key has so far."""
        return self.values[key][0] if key in self.values else default

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    def given(self, name: str) -> tuple[Any, str] | None:
        """Value and comment of a setting that is given, or of the other trainer's default; None if there is neither."""
        setting = self.settings.take(name)
        if setting is not None and setting.value is not None and str(setting.value).lower() not in ("auto", "none"):
            return setting.value, setting.written
        if name in self.defaults:
            return self.defaults[name], f"not given: the default of {self.trainer}"
        return None

    def number(self, name: str, key: str) -> tuple[float, str] | None:
        """A number; a value that is none is a remark that names `key`."""
        given = self.given(name)
        if given is None:
            return None
        value, comment = given
        if isinstance(value, str) and re.fullmatch(r"[-+\d.eE_]+", value):
            value = _parsed(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.remark(f"{comment}: not a number; set {key} to its value")
            return None
        return value, comment

    def whole(self, name: str, key: str) -> tuple[int, str] | None:
        """A whole number, as `number`."""
        given = self.number(name, key)
        if given is not None and given[0] != int(given[0]):
            self.remark(f"{given[1]}: not a whole number; set {key} in steps")
            return None
        return None if given is None else (int(given[0]), given[1])

    def flag(self, name: str) -> tuple[bool, str] | None:
        """A yes or no."""
        given = self.given(name)
        if given is None:
            return None
        text = str(given[0]).strip().lower()
        if text not in _TRUE and text not in _FALSE:
            return None
        return text in _TRUE, given[1]

    def copy(self, name: str, key: str, note: str = "") -> None:
        """A number that means the same under `key`."""
        given = self.number(name, key)
        if given is not None:
            self.set(key, given[0], f"{given[1]}{f': {note}' if note else ''}")

    def text(self) -> str:
        """The YAML file."""
        head = _wrapped(f"Translated by `megatron-embed init --from` from {self.settings.source}.", "# ", "# ")
        if self.trainer in DEFAULTS:
            head.append(f"# Its defaults are those of {self.trainer}; where they differ from ours, a line states them.")
        for remark in dict.fromkeys(self.remarks):
            head += _wrapped(remark, "# - ", "#   ")
        return "\n".join([*head, *sections(self.values)]) + "\n"


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=others,
                         break_long_words=False, break_on_hyphens=False)


def _parsed(text: str) -> object:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return text


def unused_remarks(draft: Draft) -> None:
    """A remark for each setting that nothing has translated, and one for those that changed nothing."""
    for setting in draft.settings.unused():
        if setting.value is not None:
            draft.remark(_about(setting))
    text = " ".join(line.strip().removeprefix("#").strip() for line in draft.text().splitlines())
    silent = [setting.written for setting in draft.settings.given.values() if not _named_in(setting, text)]
    if silent:
        draft.remark(f"without a line, since they change nothing here: {'; '.join(silent)}")


def _named_in(setting: Setting, text: str) -> bool:
    """Whether a text has the name under which a setting was given."""
    name = re.split(r"[\s=:]", setting.written, maxsplit=1)[0]
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _about(setting: Setting) -> str:
    if setting.word is None:
        return f"{setting.written}: not known; docs/settings.md lists the keys here"
    if setting.word.keys:
        return f"{setting.written}: {' and '.join(setting.word.keys)}" + (
            f"; {setting.word.note}" if setting.word.note else "")
    if not setting.word.supported and is_off(setting.name, setting.value):
        return f"{setting.written}: not needed: {OFF_ANYWAY}"
    return f"{setting.written}: {'not needed' if setting.word.supported else 'not supported'}: {setting.word.note}"


def sections(values: dict[str, tuple[Any, str]]) -> list[str]:
    """The lines of the sections, in the order of the settings' page, each value with its comment."""
    lines: list[str] = []
    types = get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        if field.name in values:
            lines += _line(field.name, *values[field.name], indent=0)
        kind = types[field.name]
        if not dataclasses.is_dataclass(kind):
            continue
        keys = [inner.name for inner in dataclasses.fields(kind) if f"{field.name}.{inner.name}" in values]
        if keys:
            lines.append(f"{field.name}:")
        for key in keys:
            lines += _line(key, *values[f"{field.name}.{key}"], indent=2)
    return lines


def _line(key: str, value: object, comment: str, indent: int) -> list[str]:
    """`key: value  # comment`, the comment above it where both are too long for one line."""
    blank = " " * indent
    if isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [f"{blank}  - {scalar(entry)}" for entry in value]
        return [*_above(comment, indent), f"{blank}{key}:", *entries]
    text = f"{blank}{key}: {scalar(value)}"
    if comment and len(text) + 4 + len(comment) <= WIDTH:
        return [f"{text}  # {comment}"]
    return [*_above(comment, indent), text]


def _above(comment: str, indent: int) -> list[str]:
    start = " " * indent + "# "
    return _wrapped(comment, start, start) if comment else []


def scalar(value: object) -> str:
    """A value on one line of YAML."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text: str = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**9,
                          sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()
