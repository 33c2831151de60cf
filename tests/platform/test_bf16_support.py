"""What `model.dtype: auto` is on this machine, under the variables that limit libraries, and over ranks."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from megatron_embed.platform import bf16_support, cpu_linear
from megatron_embed.platform.cpu_linear import OneDnnFrozenLinear, OneDnnLinear, WidenedLinear
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import run_config


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY=avx2", "ATEN_CPU_CAPABILITY=default",
                                      "ONEDNN_MAX_CPU_ISA=AVX2", "ONEDNN_MAX_CPU_ISA=AVX512_CORE",
                                      "DNNL_MAX_CPU_ISA=AVX2_VNNI", "MKL_ENABLE_INSTRUCTIONS=AVX2"])
def test_variables_that_forbid(variable):
    name, _, value = variable.partition("=")
    assert bf16_support.limiting_variable({name: value}) == variable
    assert bf16_support.limiting_variable({name: value.lower()}) == f"{name}={value.lower()}"


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY=avx512", "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16",
                                      "ONEDNN_MAX_CPU_ISA=ALL", "MKL_ENABLE_INSTRUCTIONS=AVX512_E4", "OTHER=avx2"])
def test_variables_that_do_not(variable):
    name, _, value = variable.partition("=")
    assert bf16_support.limiting_variable({name: value}) is None


@pytest.mark.parametrize("flags, has", [("flags\t: avx2 avx512f avx512_bf16", True), ("flags\t: amx_bf16 avx2", True),
                                        ("flags\t: avx2 avx512f avx512_vnni", False), ("Features\t: asimd bf16", True),
                                        ("Features\t: asimd", False), ("", False)])
def test_what_the_kernel_says(flags, has, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\nbugs\t: none\n")
    with mock.patch.dict(os.environ):
        for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
            os.environ.pop(name, None)
        assert bf16_support.processor_has_bf16(str(tmp_path / "cpuinfo")) == has
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
        assert not bf16_support.processor_has_bf16(str(tmp_path / "cpuinfo"))
    assert not bf16_support.processor_has_bf16(str(tmp_path / "none"))


def test_a_process_of_its_own_under_the_variable():
    """As torch sees it: its own kernels and the module agree."""
    program = ("import json, torch; from megatron_embed.platform.bf16_support import has_native_bf16, why_not_bf16; "
               "print(json.dumps([has_native_bf16(), torch.backends.cpu.get_cpu_capability(), why_not_bf16()]))")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
    has, _, why = json.loads(output)
    assert (has, why) == (False, "ATEN_CPU_CAPABILITY=avx2 keeps from it")


def settled(wanted, without):
    """(dtype, lines of the log) on a rank; the ranks of `without` lack the instructions."""
    import logging

    import torch.distributed as dist

    from megatron_embed.models import auto_dtype as module

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    module.logger.addHandler(handler)
    level, module.logger.level = module.logger.level, logging.INFO
    try:
        with mock.patch.object(module, "has_native_bf16", return_value=dist.get_rank() not in without):
            return module.resolve_dtype(run_config("m", dtype=wanted)).model.dtype, lines
    finally:
        module.logger.removeHandler(handler)
        module.logger.level = level


def test_all_ranks_choose_alike():
    for without, dtype in ([(), "bfloat16"], [(1,), "float32"], [(0, 1), "float32"]):
        by_rank = run_on_ranks(settled, 2, "auto", without)
        assert [name for name, _ in by_rank] == [dtype, dtype]
        assert all(len(lines) == 1 and f"model.dtype = auto: {dtype}" in lines[0] for _, lines in by_rank)
    assert "another rank has no such instructions" in run_on_ranks(settled, 2, "auto", (1,))[0][1][0]
    for name, lines in run_on_ranks(settled, 2, "bfloat16", (1,)):
        assert name == "bfloat16"
        assert "products are computed in float32" in lines[0]
    assert run_on_ranks(settled, 2, "float32", (0, 1)) == [("float32", [])] * 2


def of_each(apply, widened, shapes):
    """Result and gradients of a linear in bfloat16, with native products or widened ones."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    with mock.patch.object(cpu_linear, "has_native_bf16", return_value=not widened):
        result = apply(*tensors)
        weights = torch.randn(result.shape, generator=generator).bfloat16()
        (result * weights).sum().backward()
    return [result.detach(), *(tensor.grad for tensor in tensors)]


def megatrons(inputs, weight, bias=None):
    return OneDnnLinear.apply(inputs, weight, bias, False, False, False, None, None, None)


@pytest.mark.parametrize("apply, shapes", [
    (megatrons, [(70, 1, 48), (33, 48), (33,)]), (megatrons, [(70, 1, 16), (64, 16), (64,)]),
    (megatrons, [(0, 16), (64, 16)]),
    (lambda x, w: WidenedLinear.apply(x, w), [(70, 1, 48), (4, 48)])], ids=["narrow", "wide", "empty", "adapter"])
def test_widened_products_are_those_of_bfloat16(apply, shapes):
    for widened, native, exact in zip(
            of_each(apply, True, shapes), of_each(apply, False, shapes),
            of_each(lambda x, w, b=None: torch.nn.functional.linear(x, w, b), False, shapes), strict=True):
        assert widened.dtype == native.dtype == torch.bfloat16
        # One rounding to eight bits apart, at most, of sums that may cancel.
        torch.testing.assert_close(widened, native, rtol=2**-7, atol=2**-6)
        torch.testing.assert_close(widened, exact, rtol=2**-7, atol=2**-6)


def test_a_widened_product_is_rounded_once():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator).bfloat16() for size in ((9, 64), (5, 64)))
    with mock.patch.object(cpu_linear, "has_native_bf16", return_value=False):
        assert torch.equal(cpu_linear.forward_product(left, right), (left.float() @ right.float().T).bfloat16())
        assert cpu_linear.linear(left, right).dtype == torch.bfloat16
        inputs = left.clone().requires_grad_()
        OneDnnFrozenLinear.apply(inputs, right, None, False, None).sum().backward()
    assert torch.equal(inputs.grad, (torch.ones(9, 5) @ right.float()).bfloat16())


def test_float32_is_not_touched():
    left, right = (torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in ((9, 64), (5, 64)))
    with mock.patch.object(cpu_linear, "has_native_bf16", return_value=False):
        narrow = cpu_linear.forward_product(left, right)
    assert torch.equal(narrow, cpu_linear.forward_product(left, right))


def test_plans_are_for_gpus_and_the_doctor_looks_at_this_machine():
    from megatron_embed.planning.disk import checkpoint_bytes
    from megatron_embed.planning.shapes import shape_of
    from megatron_embed.run import doctor_checks

    auto, half, full = (run_config("Qwen/Qwen3-Embedding-0.6B", dtype=dtype)
                        for dtype in ("auto", "bfloat16", "float32"))
    shape = shape_of(auto.model.path)
    assert checkpoint_bytes(auto, shape) == checkpoint_bytes(half, shape) < checkpoint_bytes(full, shape)
    for gpus, has_bf16, expected in ((0, False, full), (0, True, half), (1, False, half)):
        with mock.patch.object(doctor_checks, "visible_gpus", return_value=gpus), mock.patch.object(
                doctor_checks, "processor_has_bf16", return_value=has_bf16):
            assert doctor_checks._with_local_dtype(auto) == expected
            assert doctor_checks._with_local_dtype(full) == full


def test_commands_take_auto():
    from megatron_embed.__main__ import build_parser

    for command in (["encode", "--model", "m", "--input", "i", "--output", "o"],
                    ["evaluate", "--model", "m", "--data", "d"],
                    ["mine", "--model", "m", "--data", "d", "--output", "o"]):
        assert build_parser().parse_args([*command, "--dtype", "auto"]).dtype == "auto"
