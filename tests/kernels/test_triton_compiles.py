"""The Triton kernels compiled for an H100, which needs no GPU: Triton's compiler accepts them, and ptxas after it.

In processes of their own, because the other test has Triton interpret them. Skipped where Triton is not installed.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.helpers.toys import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")]
SHAPES = [(16, 4, 128), (32, 8, 128), (12, 12, 64), (8, 1, 128), (1, 1, 64)]
"""Heads, groups and their size on a rank; Triton makes an argument that is 1 a constant."""


def kernels(dtype):
    """(name, function, types of its arguments, constants, warps)."""
    from megatron_embed.kernels import triton_activation, triton_norm, triton_rotary

    def types(function, constants):
        wide = ("rstd_ptr", "parts_ptr", "weights_ptr", "grad_weights_ptr")
        return {name: "constexpr" if name in constants else "fp32" if name == "eps" else "i32" if name[-4:] != "_ptr"
                else "*fp32" if name in wide else f"*{dtype}" for name in function.arg_names}

    def case(name, function, warps=4, **constants):
        return name, function, types(function, constants), constants, warps

    for width in (384, 4096, 8192):
        tile = triton_norm._block(width)
        warps = tile.pop("num_warps")
        for name, more in (("_forward", {}), ("_backward", {"NEEDS_WEIGHT": True})):
            yield case(f"norm{name} {width}", vars(triton_norm)[name], warps, HAS_RESIDUAL=True, **more, **tile)
    for heads, groups, size in SHAPES:
        tile = triton_rotary._tile(heads, groups, size)
        warps = tile.pop("num_warps")
        ones = {name: 1 for name, value in (("heads", heads), ("groups", groups)) if value == 1}
        for norm in (True, False):
            of = f"{heads} {groups} {size} {norm}"
            yield case(f"rotary_forward {of}", triton_rotary._forward, warps, HAS_NORM=norm, **tile, **ones)
            yield case(f"rotary_backward {of}", triton_rotary._backward, warps, HAS_NORM=norm,
                       **(tile | {"GROUPS": 1 << (groups - 1).bit_length()}), **ones)
    for name in ("_glu", "_weighted", "_bias"):
        for direction in ("_forward", "_backward"):
            yield case(f"{name}{direction}", vars(triton_activation)[name + direction], ACTIVATION="silu", BLOCK=1024)


def compile_all(dtype):
    """Write {name: bytes of the compiled kernel} as JSON. Called in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = {}
    for name, function, types, constants, warps in kernels(dtype):
        source = ASTSource(fn=function, signature=types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        sizes[name] = len(compiled.asm["cubin"])
    sys.stdout.write(json.dumps(sizes))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_an_h100(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = f"from tests.kernels.test_triton_compiles import compile_all; compile_all({dtype!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 6 + 4 * len(SHAPES) + 6 and all(sizes.values())
