"""Resolution of `model.cpu_matmul` to the same libraries on all ranks."""

import dataclasses
import logging

import torch
import torch.distributed as dist

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.names import MATMUL_LIBRARIES, MatmulLibrary
from megatron_embed.platform.bf16_support import has_native_bf16
from megatron_embed.platform.compat import HAS_CUDA
from megatron_embed.platform.cpu_linear import DEFAULT_LIBRARIES, use_libraries
from megatron_embed.platform.cpu_matmul import fastest_libraries

logger = logging.getLogger(__name__)


def resolve_cpu_matmul(config: RunConfig, shape: ModelShape) -> RunConfig:
    """Set this process's libraries of float32 products. Returns the configuration with them, if they were measured.

    They are those of `model.cpu_matmul`, else rank 0's measurement, which is logged, else oneDNN, as always under
    `training.deterministic`. Called by all ranks
    once the dtype is settled; one broadcast over the world unless the setting is given. Nothing on a GPU.
    """
    if HAS_CUDA:
        return config
    if config.model.cpu_matmul is not None:
        use_libraries(config.model.cpu_matmul)
        return config
    measured = None if config.training.deterministic else _measured_on_rank_0(config, shape)
    use_libraries(measured or DEFAULT_LIBRARIES)
    if measured is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, cpu_matmul=measured))


def _measured_on_rank_0(config: RunConfig, shape: ModelShape) -> tuple[MatmulLibrary, ...] | None:
    """Rank 0's measurement on every rank; None: nothing was measured."""
    choice = torch.full((len(DEFAULT_LIBRARIES),), -1, dtype=torch.int64)
    multiplies_float32 = config.model.dtype == "float32" or not has_native_bf16()
    if dist.get_rank() == 0 and multiplies_float32:
        best = fastest_libraries(mlp_weights(shape, config.parallel.tensor_model_parallel_size))
        if best is not None:
            libraries, ratios = best
            choice = torch.tensor([MATMUL_LIBRARIES.index(library) for library in libraries])
            logger.info("model.cpu_matmul = [%s] for forward pass, gradient of the input, gradient of the weight: "
                        "measured, torch's library takes %s times as long as oneDNN", ", ".join(libraries),
                        ", ".join(f"{ratio:.2f}" for ratio in ratios))
    if dist.get_world_size() > 1:
        dist.broadcast(choice, src=0)
    return None if choice[0] < 0 else tuple(MATMUL_LIBRARIES[index] for index in choice.tolist())


def mlp_weights(shape: ModelShape, tp_size: int) -> list[tuple[int, int]]:
    """(outer, inner) of a rank's share of an MLP's two weights, where most of a model's products are."""
    width = shape.ffn_hidden_size // tp_size
    return [(width * (1 + shape.gated), shape.hidden_size), (shape.hidden_size, width)]
