"""One long text on context-parallel ranks: what a rank's memory grows by, and its gradients."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_embed.config.schema import RunConfig
from tests.helpers.gradient_errors import squared_errors
from tests.helpers.toys import open_model, pack_all


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(value) * 1024


def one_text(config: RunConfig, ids: list[int], weights: torch.Tensor, reference: str | None) -> tuple[int, Any]:
    """(peak bytes above what was held before, squared errors of this rank's gradients). Called by all ranks."""
    from megatron_embed.models.encoder import to_device

    opened = open_model(config)
    (chunk,) = opened.chunks
    batch = to_device(pack_all([ids], config), opened.topology, "mean", kernel="sdpa", causal=chunk.causal,
                      shape=chunk.shape)
    held = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that from here on
    (chunk(batch)[0] * weights).sum().backward()
    peak = status("VmHWM") - held
    for parameter in chunk.parameters():
        dist.all_reduce(parameter.grad, group=opened.topology.groups.cp)
        parameter.main_grad = parameter.grad
    return peak, None if reference is None else squared_errors(opened.chunks, opened.topology, Path(reference))
