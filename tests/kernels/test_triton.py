"""The Triton kernels, run by Triton's interpreter on the CPU, against the plain functions; and that each is one launch.

Skipped where Triton is not installed: torch's CPU builds come without it (`pip install triton`).
"""

import os
import sys
from importlib.util import find_spec
from unittest import mock

import pytest
import torch

from megatron_embed.kernels import operators, reference
from tests.helpers.kernels import kernel_cases

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def launchers():
    """The operators' launchers, with kernels that are interpreted, and a list of their launches.

    Triton decides when it decorates a function, its own ones included, so all but its library is imported again.
    """
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), mock.patch.dict(sys.modules):
        for name in list(sys.modules):
            if (name.split(".")[0] == "triton" and "._C" not in name) or ".kernels.triton_" in name:
                del sys.modules[name]
        from triton.runtime.interpreter import GridExecutor

        from megatron_embed.kernels import triton_norm, triton_rotary
        from megatron_embed.kernels.triton_launch import LAUNCHERS

        launches, call = [], GridExecutor.__call__

        def counted(*arguments, **options):
            launches.append(1)
            return call(*arguments, **options)

        # Fewer programs than tokens, so that each sums over several.
        with (mock.patch.object(GridExecutor, "__call__", counted), mock.patch.object(triton_norm, "PARTS", 4),
              mock.patch.object(triton_rotary, "PARTS", 4)):
            yield LAUNCHERS, launches


def results_of(function, arguments):
    """Its results; parts of a weight's gradient summed."""
    results = function(*arguments)
    results = list(results if isinstance(results, tuple) else (results,))
    if function.__name__ in ("rms_norm_backward", "qkv_rotary_backward"):
        results[1] = results[1].sum(0)
    return results


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
def test_kernels_equal_the_plain_functions_in_one_launch(launchers, dtype, tolerance):
    functions, launches = launchers
    seen = set()
    for name, arguments in kernel_cases(dtype):
        launches.clear()
        results, wanted = results_of(functions[name], arguments), results_of(vars(reference)[name], arguments)
        assert len(launches) == 1, name
        for result, expected in zip(results, wanted, strict=True):
            assert result.dtype == expected.dtype
            scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * scale,
                                       msg=lambda message, of=name: f"{of}: {message}")
        seen.add(name)
    assert seen == operators.SCHEMAS.keys() == functions.keys()
