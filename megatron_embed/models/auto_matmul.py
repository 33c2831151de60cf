"""Resolution of `model.cpu_matmul` to the same libraries on all ranks."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_embed.config.load import read_resolved
from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.names import MATMUL_LIBRARIES
from megatron_embed.platform.bf16_support import has_native_bf16
from megatron_embed.platform.compat import HAS_CUDA
from megatron_embed.platform.cpu_linear import DEFAULT_LIBRARIES, Libraries, use_libraries
from megatron_embed.platform.cpu_matmul import fastest_libraries

logger = logging.getLogger(__name__)


def resolve_cpu_matmul(config: RunConfig, shape: ModelShape) -> RunConfig:
    """Set the libraries with which this process of a training run multiplies in float32.

    In the configuration that comes in, `model.cpu_matmul: null` means that nothing is measured yet, and rank 0 measures
    now; the log says what. In the one that is returned, which checkpoints keep, it means oneDNN for all products:
    because `training.deterministic` is on, the matrices are small, products are of bfloat16, or this torch has a single
    library. On a GPU it stays as it is and means nothing.

    Called by all ranks once the dtype is settled; one broadcast over the world if there is something to measure.
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


def libraries_for_encoding(config: RunConfig, shape: ModelShape, checkpoint: Path | None) -> Libraries:
    """The libraries of a model of which forward products alone are computed; the process keeps its own.

    They are those of `model.cpu_matmul`, else those of the checkpoint's run, else for the forward pass rank 0's
    measurement, else oneDNN, as for a run with `training.deterministic`. Called by all ranks once the dtype is settled;
    at most one broadcast over the world.

    Args:
        checkpoint: None: a Hugging Face directory.
    Raises:
        ConfigError: the checkpoint's config.yaml is damaged.
    """
    if HAS_CUDA:
        return DEFAULT_LIBRARIES
    known = config.model.cpu_matmul
    if known is None and checkpoint is not None and (checkpoint / "config.yaml").is_file():  # not of a converted model
        values = read_resolved(checkpoint / "config.yaml")
        known = libraries_of_run(values)
        if known is None and values.get("training", {}).get("deterministic") is True:
            known = DEFAULT_LIBRARIES
    return known or _measured_on_rank_0(config, shape, forward_only=True) or DEFAULT_LIBRARIES


def libraries_of_run(values: Mapping[str, Any]) -> Libraries | None:
    """The libraries that a checkpoint's config.yaml names; None: none were measured."""
    # Before there was this setting, all products were oneDNN's.
    saved = values.get("model", {}).get("cpu_matmul", [*DEFAULT_LIBRARIES])
    is_known = isinstance(saved, list) and len(saved) == len(DEFAULT_LIBRARIES) and all(
        name in MATMUL_LIBRARIES for name in saved)
    return tuple(saved) if is_known else None


def _measured_on_rank_0(config: RunConfig, shape: ModelShape, *, forward_only: bool = False) -> Libraries | None:
    """Rank 0's measurement on every rank; None: nothing was measured. `forward_only`: see `fastest_libraries`."""
    choice = torch.full((len(DEFAULT_LIBRARIES),), -1, dtype=torch.int64)
    multiplies_float32 = config.model.dtype == "float32" or not has_native_bf16()
    if dist.get_rank() == 0 and multiplies_float32:
        best = fastest_libraries(mlp_weights(shape, config.parallel.tensor_model_parallel_size),
                                 forward_only=forward_only)
        if best is not None:
            libraries, ratios = best
            choice = torch.tensor([MATMUL_LIBRARIES.index(library) for library in libraries])
            products = "forward pass" + ("" if forward_only else ", gradient of the input, gradient of the weight")
            logger.info("model.cpu_matmul = [%s] for %s: measured, torch's library takes %s times as long as oneDNN",
                        ", ".join(libraries), products, ", ".join(f"{ratio:.2f}" for ratio in ratios))
    if dist.get_world_size() > 1:
        dist.broadcast(choice, src=0)
    return None if choice[0] < 0 else tuple(MATMUL_LIBRARIES[index] for index in choice.tolist())


def mlp_weights(shape: ModelShape, tp_size: int) -> list[tuple[int, int]]:
    """(outer, inner) of a rank's share of an MLP's two weights, where most of a model's products are."""
    width = shape.ffn_hidden_size // tp_size
    return [(width * (1 + shape.gated), shape.hidden_size), (shape.hidden_size, width)]
