"""Tests compute by the default libraries of float32 products, whatever the processor is and however busy it is.

Tests of the measurement itself call platform/cpu_matmul.py, or replace `auto_matmul.fastest_libraries` once more.
Programs that a test starts measure; their models are too small for it, or their settings name `model.cpu_matmul`.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODULE = "megatron_embed.models.auto_matmul"


def fix_libraries() -> None:
    """Have nothing measured in this process and its forks, without importing torch."""
    if MODULE in sys.modules:
        _fix(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


def _fix(module: ModuleType) -> None:
    vars(module)["fastest_libraries"] = lambda shapes, *, forward_only=False: None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module as Python does, and changes it once it is executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            _fix(module)

        vars(spec.loader)["exec_module"] = executed
        return spec
