"""The layers to which PEFT gives adapters, or that it trains whole, by the settings of adapter_config.json.

PEFT makes adapters where the settings say, and then reads their tensors: one that the file holds for another layer has
no effect there.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from megatron_embed.errors import CheckpointError
from megatron_embed.models.key_table import shown_value

ALL_LINEAR = "all-linear"
_SECONDS = 10.0
"""Longest time for all comparisons of names with the regular expressions of a file."""


class PeftSelection:
    """`target_modules`, less `exclude_modules` and `modules_to_save`."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        """
        Args:
            file: adapter_config.json, for messages.
            values: its contents.
        Raises:
            CheckpointError: a value of another type than PEFT's, or no target_modules.
        """
        self._file, self._seconds = file, _SECONDS
        self._targets = self._names(values, "target_modules", may_be_pattern=True)
        self._excluded = self._names(values, "exclude_modules", may_be_pattern=True)
        self._saved = self._names(values, "modules_to_save", may_be_pattern=False)
        # PEFT adds the classifier's usual names for this type.
        self._classifies = values.get("task_type") == "SEQ_CLS"
        if not self._targets:
            raise CheckpointError(f"{file}: target_modules = {shown_value(values.get('target_modules'))} names no "
                                  "modules, so that it depends on PEFT's version which have adapters; write their "
                                  "names there")

    def adapts(self, name: str) -> bool:
        """Whether the module of this name, as in Transformers' class, gets an adapter."""
        if self._excluded and self._matches("exclude_modules", self._excluded, name):
            return False
        # PEFT's own expression: the module, or one inside it. Then it wraps every module whose name ends so.
        if any(name.endswith(module) or self._find("modules_to_save", rf"(^|.*\.){module}($|\..*)", name)
               for module in self._saved):
            return False
        if isinstance(self._targets, str) and self._targets.lower() == ALL_LINEAR:
            return True
        return self._matches("target_modules", self._targets, name)

    def trains_whole(self, name: str) -> bool:
        """Whether the module of this name, or one that contains it, is trained whole, so that its tensors count."""
        words = name.split(".")
        saved = (*self._saved, *(("classifier", "score") if self._classifies else ()))
        return any(".".join(words[:count + 1]).endswith(module) for count in range(len(words)) for module in saved)

    def _names(self, values: Mapping[str, Any], key: str, *, may_be_pattern: bool) -> str | Sequence[str]:
        """A list of names or, if it may be one, a regular expression; empty without the key."""
        value = values.get(key)
        if value is None:
            return ()
        if isinstance(value, str) and may_be_pattern:
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            kind = "a list of names, or a regular expression" if may_be_pattern else "a list of names"
            raise CheckpointError(f"{self._file}: {key} = {shown_value(value)} must be {kind}; correct it")
        return value

    def _matches(self, key: str, wanted: str | Sequence[str], name: str) -> bool:
        if isinstance(wanted, str):
            return self._find(key, wanted, name, whole=True)
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)

    def _find(self, key: str, pattern: str, name: str, *, whole: bool = False) -> bool:
        """Whether the pattern matches the beginning of the name, or the whole name."""
        started = time.monotonic()
        try:
            match = regex.fullmatch if whole else regex.match
            found = match(pattern, name, timeout=max(self._seconds, 1e-3)) is not None
        except (regex.error, TimeoutError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"{self._file}: {key} = {shown_value(pattern)} cannot be used as a regular "
                                  f"expression ({str(error)[:60] or type(error).__name__}); list the modules' names "
                                  "instead") from error
        self._seconds -= time.monotonic() - started
        return found
