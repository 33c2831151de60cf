"""Imported by every Python process whose PYTHONPATH has this folder: gives torch the pretend device.

Only with PRETEND_CUDA=1, and not where CUDA_VISIBLE_DEVICES is empty, as on a real GPU.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Finds torch with a loader that puts the device under it."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _TorchLoader(spec.loader.name, spec.loader.path)
        return spec


class _TorchLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        from tests.pretend_cuda import build

        library = build.build()
        build.load(library)
        super().exec_module(module)
        from tests.pretend_cuda import device

        device.install(library)


if os.environ.get("PRETEND_CUDA") == "1" and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    sys.path.append(str(Path(__file__).resolve().parents[3]))
    sys.meta_path.insert(0, _TorchFinder())
