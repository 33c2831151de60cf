"""Faults that a CPU run cannot see, and the device must: each stops a run there and leaves the CPU's as it is.

Without them the tests on the pretend device could be hollow. `git worktree` is not needed: a copy of the package is
changed by one line.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.device_runs import models, train_arguments  # noqa: F401  fixtures
from tests.helpers.toys import REPOSITORY
from tests.pretend_cuda.environment import is_pretended

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

MUTATIONS = {
    "rotary frequencies on the host": (
        "models/rope.py", r"frequencies\.to\(position_ids\.device\)", "frequencies", "on the same device"),
}
"""Name -> file, pattern of what is replaced, replacement, words of the error on the device."""


@pytest.fixture(autouse=True)
def _on_the_pretend_device():
    if not is_pretended():
        pytest.skip("changes the package; the pretend device is enough (docs/pretend_device.md)")
