"""Imported by every Python process whose PYTHONPATH has this folder: gives torch the pretend device, and bitsandbytes
the library of its CPU kernels, which compute there as well; its CUDA library needs a driver.

Only with PRETEND_CUDA=1, and not where CUDA_VISIBLE_DEVICES is empty, as on a real GPU.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the packages of _LOADERS with loaders that prepare them."""

    def find_spec(self, name, path=None, target=None):
        loader = _LOADERS.get(name)
        spec = None if loader is None else importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = loader(spec.loader.name, spec.loader.path)
        return spec


class _TorchLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        from tests.pretend_cuda import build

        library = build.build()
        build.load(library)
        super().exec_module(module)
        from tests.pretend_cuda import device

        device.install(library)


class _BitsandbytesLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        from unittest import mock

        import torch

        with mock.patch.object(torch.cuda, "is_available", return_value=False):
            super().exec_module(module)


_LOADERS = {"torch": _TorchLoader, "bitsandbytes": _BitsandbytesLoader}

if os.environ.get("PRETEND_CUDA") == "1" and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    sys.path.append(str(Path(__file__).resolve().parents[3]))
    sys.meta_path.insert(0, _Finder())
