"""How fast a run is and what memory it takes: tokens, floating-point operations, the largest rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.parallel.collectives import largest
from megatron_embed.parallel.topology import Topology
from megatron_embed.planning.flops import BACKWARD_COST, BACKWARD_COST_FROZEN, forward_flops
from megatron_embed.planning.hardware import gpu_named
from megatron_embed.platform.heap import resident_bytes


class Throughput:
    """Metrics of a run's speed and memory, from what its steps read.

    Model FLOPs are those of one forward and one backward pass over real tokens (docs/planning.md): what padding, the
    gradient cache's other forward pass and recomputation cost is not counted, so it lowers the utilization.
    """

    def __init__(self, models: Sequence[EmbeddingModel], topology: Topology) -> None:
        model, self._topology = models[0], topology
        self._shape, self._causal = model.shape, model.causal
        trains_all = all(parameter.requires_grad for parameter in model.parameters())
        self._cost = 1 + (BACKWARD_COST if trains_all else BACKWARD_COST_FROZEN)
        gpu = gpu_named(torch.cuda.get_device_name(topology.device)) if topology.device.type == "cuda" else None
        self._peak_tflops = None if gpu is None else gpu.peak_tflops

    def of_step(self, *, tokens: float, squared_lengths: float, padded_tokens: float,
                seconds: float) -> dict[str, float]:
        """Metrics of a step of the whole run. No communication.

        Args:
            tokens, squared_lengths: sums over the step's texts of their lengths in tokens, and of the lengths' squares.
        """
        flops = self._cost * forward_flops(self._shape, tokens, squared_lengths, causal=self._causal)
        tflops = flops / seconds / self._topology.world_size / 1e12
        found = {"tokens_per_second": tokens / seconds, "padding_fraction": 1.0 - tokens / padded_tokens,
                 "step_seconds": seconds, "tflops_per_rank": tflops}
        return found if self._peak_tflops is None else {**found, "mfu": tflops / self._peak_tflops}

    def memory(self) -> dict[str, float]:
        """GiB of the rank that holds most: what tensors took at most since the last call on a GPU, resident memory on a
        CPU. One small all-reduce over the world."""
        held = resident_bytes()
        if self._topology.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self._topology.device)
            torch.cuda.reset_peak_memory_stats(self._topology.device)
        return {"memory_gib": largest(held, dist.group.WORLD) / 2**30}
