"""The tests for GPUs, on a device that names itself CUDA and computes on the CPU (docs/pretend_device.md)."""

import os
import subprocess
import sys

import pytest

from tests.helpers.toys import REPOSITORY
from tests.pretend_cuda.build import CannotBuildError, reason_against
from tests.pretend_cuda.environment import environment


@pytest.fixture(scope="module")
def device():
    reason = reason_against()
    if reason is not None:
        pytest.skip(f"no pretend device: {reason}")
    try:
        return environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    except CannotBuildError as error:
        pytest.fail(str(error))


def run_tests(device, mark, path="tests/gpu"):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", mark, "-p", "no:cacheprovider", path],
        cwd=REPOSITORY, env=device, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "CUDA device(s), this machine has" not in done.stdout, done.stdout


def test_quick_tests_for_gpus_pass(device):
    run_tests(device, "(gpu or multi_gpu) and not slow")


@pytest.mark.slow
def test_slow_tests_for_gpus_pass(device):
    run_tests(device, "(gpu or multi_gpu) and slow")


@pytest.mark.slow
@pytest.mark.parametrize("path", [
    "tests/checkpoint/test_resume.py", "tests/cli/test_evaluate.py", "tests/cli/test_export.py",
    "tests/cli/test_lora.py", "tests/cli/test_mine.py", "tests/cli/test_pair_losses.py", "tests/cli/test_reranker.py"])
def test_tests_of_commands_pass_there_as_on_the_cpu(device, path):
    run_tests(device, "not slow", path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["tests/launch/test_two_nodes.py", "tests/models/test_te_layers.py"])
def test_tests_of_whole_jobs_pass_there_as_on_the_cpu(device, path):
    """Two torchrun nodes, and layers of Transformer Engine, whose stand-ins check what they are given."""
    run_tests(device, "slow or not slow", path)


def test_the_device_is_off_where_no_gpu_is_visible(device):
    """As `CUDA_VISIBLE_DEVICES=""` hides real ones: by it the tests get their CPU curves."""
    finders = "import sys; print([finder for finder in sys.meta_path if 'sitecustomize' in repr(finder)])"
    done = subprocess.run([sys.executable, "-c", finders],
                          env=device | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert os.environ.get("PRETEND_CUDA") is None
