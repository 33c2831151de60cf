"""Check of a machine for a run: versions, backends, missing packages and how to install them."""

import ast
import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from megatron_embed import __version__
from megatron_embed.platform.bf16_support import processor_has_bf16, why_not_bf16
from megatron_embed.platform.terminal_text import counted

DISTRIBUTION = "megatron_embed"
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
SLOW_LOOKUP_SECONDS = 0.5
GPU_PACKAGES = {
    "transformer_engine": "Megatron-Core takes its fused kernels; on a CUDA machine: pip install 'megatron_embed[gpu]'",
    "flash_attn": "not needed: torch's own variable-length flash kernels serve",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report. A check with a remedy must be fixed before a run; a note is only for information."""

    name: str
    value: str
    note: str = ""
    remedy: str = ""


def run_checks() -> list[Check]:
    """All checks of this machine; never raises because something is missing."""
    return [*_host(), *_requirements(), *_torch(), *_megatron(), *_gpu_packages(), _apex()]


def report(checks: list[Check]) -> str:
    """A table of the checks, followed by the remedies."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "!!" if check.remedy else "ok" if not check.note else "--"
        note = f"  ({check.note})" if check.note else ""
        lines.append(f"{mark} {check.name:<{width}}  {check.value}{note}")
    problems = [check for check in checks if check.remedy]
    lines.append("")
    lines += [f"{check.name}: {check.remedy}" for check in problems]
    lines.append(f"{counted(len(problems), 'thing')} to put right" if problems else
                 "everything that a run needs is here")
    return "\n".join(lines)


def _host() -> list[Check]:
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    features, model = cpu_features()
    note = "" if processor_has_bf16() else f"model.dtype = auto is float32 on this CPU: {why_not_bf16()}"
    return [
        Check(name="megatron_embed", value=f"{__version__}, {Path(__file__).resolve().parent.parent}"),
        Check(name="python", value=f"{platform.python_version()}, {platform.platform()}",
                remedy="" if sys.version_info >= (3, 11) else "install Python 3.11 or later"),
        Check(name="cpu", value=f"{model}, {cpus} usable cores"),
        Check(name="cpu features", value=" ".join(features) or "none of " + " ".join(CPU_FEATURES), note=note),
        _name_lookup(os.environ.get("MASTER_ADDR") or "127.0.0.1"),
    ]


def _name_lookup(host: str) -> Check:
    """How long a lookup of an address' name takes: torch makes one whenever it connects to a store or a rank."""
    longest = 0.0
    for _ in range(3):
        started = time.monotonic()
        try:  # IPv4 as IPv6, as torch asks
            found = socket.getaddrinfo(host, 0, socket.AF_INET6, socket.SOCK_STREAM, flags=socket.AI_V4MAPPED)
            socket.getnameinfo(found[0][-1], socket.NI_NUMERICSERV)
        except OSError as error:
            return Check(name="name lookup", value=f"{host}: {error}")
        longest = max(longest, time.monotonic() - started)
        if longest > SLOW_LOOKUP_SECONDS:
            note = ("torch waits so long for the name server at each connection; RES_OPTIONS='timeout:1 attempts:1' in "
                    "the ranks' environment shortens it")
            return Check(name="name lookup", value=f"{host}: {longest:.1f} s", note=note)
    return Check(name="name lookup", value=f"{host}: {1000 * longest:.1f} ms")


def cpu_features(cpuinfo: str = "/proc/cpuinfo") -> tuple[list[str], str]:
    """The vector features that matter here, and the processor's name."""
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8").splitlines()
    except OSError:
        return [], platform.processor() or platform.machine()
    values = {}
    for line in reversed(lines):  # The first processor's lines take precedence.
        key, _, value = line.partition(":")
        values[key.strip()] = value.strip()
    flags = values.get("flags", values.get("Features", "")).split()
    return [name for name in CPU_FEATURES if name in flags], values.get("model name", platform.machine())


def _requirements() -> list[Check]:
    """The packages that setup.py requires, each with its version range."""
    try:
        texts, notes = importlib.metadata.requires(DISTRIBUTION) or [], []
    except importlib.metadata.PackageNotFoundError:
        setup = Path(__file__).resolve().parents[2] / "setup.py"
        texts = requirements_of(setup)
        if not texts:
            return [Check(name="requirements", value="unknown", remedy="install this package: pip install -e .")]
        notes = [Check(name="installation", value=f"none: runs from {setup.parent}",
                         note="as `python -m megatron_embed`; the command megatron-embed comes with pip install -e .")]
    requirements = [Requirement(text) for text in texts]
    core = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [*notes, *(check_requirement(item) for item in core)]


def requirements_of(setup: Path) -> list[str]:
    """The requirements in the list CORE of a setup.py; empty if there is none."""
    if not setup.is_file():
        return []
    for node in ast.parse(setup.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(name, ast.Name) and name.id == "CORE"
                                                for name in node.targets):
            return [str(text) for text in ast.literal_eval(node.value)]
    return []


def check_requirement(requirement: Requirement) -> Check:
    """Whether a package is installed in the required version range."""
    remedy = f"pip install '{requirement}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=requirement.name, value="missing", remedy=remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name=requirement.name, value=f"{version}, outside {requirement.specifier}", remedy=remedy)
    return Check(name=requirement.name, value=version)


def _torch() -> list[Check]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        return [Check(name="torch backends", value=f"torch cannot be imported: {error}",
                        remedy="reinstall torch; on a machine without GPU its CPU build is enough")]
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    backends = [name for name, there in available.items() if there]
    checks = [Check(name="process groups", value=" ".join(backends) or "none",
                        remedy="" if backends else "install a torch build with torch.distributed")]
    if not torch.cuda.is_available():
        build = torch.version.cuda
        reason = f"torch is built for CUDA {build}, but finds no device or driver" if build else "torch's CPU build"
        note = f"{reason}; runs use the CPU, gloo and sdpa attention"
        return [*checks, Check(name="gpu", value="none", note=note)]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        checks.append(Check(name=f"gpu {index}", value=f"{device.name}, {device.total_memory / 2**30:.0f} GiB, "
                                f"compute capability {device.major}.{device.minor}, CUDA {torch.version.cuda}"))
    checks.append(_flash())
    if dist.is_nccl_available():
        checks.append(Check(name="nccl", value=".".join(map(str, torch.cuda.nccl.version()))))
    return checks


def _flash() -> Check:
    from megatron_embed.platform.flash_attention import why_no_flash, why_no_flash_3

    missing = why_no_flash()
    if missing is None:
        older = why_no_flash_3(dropout=0.0)
        return Check(name="flash attention", value=f"FlashAttention {2 if older else 3}, by torch's own operators",
                     note=f"not 3: {older}" if older else "2 with training.attention_dropout")
    return Check(name="flash attention", value="none", note=f"model.attention = auto is sdpa: {missing}")


def _megatron() -> list[Check]:
    """Whether Megatron-Core can be imported here, with our adapter if CUDA is missing."""
    try:
        from megatron_embed.platform import compat
    except Exception as error:  # noqa: BLE001  a broken installation can raise anything
        return [Check(name="megatron-core import", value=f"{type(error).__name__}: {error}",
                        remedy="reinstall megatron-core in the range above, and remove what broke it")]
    return [Check(name="megatron-core import", value="on CUDA" if compat.HAS_CUDA else "with the CPU adapter")]


def _gpu_packages() -> list[Check]:
    checks = []
    for module, advice in GPU_PACKAGES.items():
        name = module.replace("_", "-")
        if importlib.util.find_spec(module) is None:
            checks.append(Check(name=name, value="not installed", note=advice))
        else:
            checks.append(Check(name=name, value=_version_of(name)))
    return checks


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _apex() -> Check:
    """Whether apex is NVIDIA's, not the unrelated project of that name, on which Megatron-Core breaks."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check(name="apex", value="not installed", note="not needed; the package index's apex is not NVIDIA's")
    folders = [Path(location) for location in spec.submodule_search_locations or []]
    if any((folder / "optimizers").is_dir() and (folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Check(name="apex", value=f"NVIDIA's, {folders[0]}")
    return Check(name="apex", value=f"the wrong package, {spec.origin or folders}",
                   remedy="pip uninstall apex: it is not NVIDIA's, and Megatron-Core breaks on it")
