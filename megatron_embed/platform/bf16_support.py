"""Whether this machine has bfloat16 instructions, for `model.dtype: auto`.

A processor without them emulates them: torch's bfloat16 products took 25 times as long as float32 ones on an EPYC with
AVX2 only.
"""

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags in /proc/cpuinfo: on x86 (bf16 products of AVX2-VNNI-2 alone are no faster than float32's) and on ARM."""

_LIMITS = {
    "ATEN_CPU_CAPABILITY": {"default", "avx2"},
    "ONEDNN_MAX_CPU_ISA": {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"},
    "DNNL_MAX_CPU_ISA": {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"},
    "MKL_ENABLE_INSTRUCTIONS": {"sse4_2", "avx", "avx2", "avx512", "avx512_e1", "avx512_e2"},
}
"""Variables that restrict the instructions of torch's libraries -> values with which bfloat16's are not used."""


def limiting_variable(environment: Mapping[str, str]) -> str | None:
    """`NAME=value` of the first variable that keeps a library from bfloat16 instructions; None if none does."""
    for name, values in _LIMITS.items():
        value = environment.get(name, "")
        if value.lower() in values:
            return f"{name}={value}"
    return None


def processor_has_bf16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the processor has bfloat16 instructions and the environment lets the libraries use them.

    Loads no library. False if the system does not list its processor's features.
    """
    return limiting_variable(os.environ) is None and not _BF16_FEATURES.isdisjoint(_features(cpuinfo))


@functools.cache
def has_native_bf16() -> bool:
    """Whether the device that this process computes on has bfloat16 instructions; a GPU has."""
    import torch

    if torch.cuda.is_available():
        return True
    return processor_has_bf16() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def why_not_bf16() -> str:
    """Reason for the log why there are no bfloat16 instructions: a variable, or the processor."""
    variable = limiting_variable(os.environ)
    return f"{variable} keeps from it" if variable else "this processor has no AVX512-BF16, AMX-BF16 or ARM BF16"


def _features(cpuinfo: str) -> Iterable[str]:
    """The first processor's features, as the kernel lists them."""
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ())
