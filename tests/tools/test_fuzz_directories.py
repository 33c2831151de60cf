"""Some cases of the fuzz, and that it would notice what it looks for."""

import subprocess
import sys

import pytest

from tests.helpers.toys import REPOSITORY


def run(*arguments, tool="fuzz_directories"):
    return subprocess.run([sys.executable, f"tools/{tool}.py", *arguments], cwd=REPOSITORY, text=True,
                          capture_output=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["fuzz_directories", "fuzz_files"])
def test_spoiled_directories_end_well_or_are_refused(tool):
    done = run("--count", "15", "--seed", "1", "--verbose", tool=tool)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("15 cases, seed 1: ")
    assert ", 0 faults; " in done.stdout.splitlines()[-1]
