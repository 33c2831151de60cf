"""The output of a run: bytes of a checkpoint and of an export, and the largest number of checkpoints at once."""

import dataclasses
import math

from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.planning.memory import DTYPE_BYTES, muon_matrices, saved_state_bytes
from megatron_embed.planning.parameters import AdaptedLinears, Held, held_parameters


def checkpoint_bytes(config: RunConfig, shape: ModelShape, adapted: AdaptedLinears | None = None) -> int:
    """Bytes of one checkpoint's tensors: every parameter once, and optimizer state of those that are trained; without
    the files' own 2 KB for each of these.

    Args:
        adapted: linear layers with adapters, which are the only trained parameters; frozen weights are saved too,
            unless they are quantized.
    """
    held, element = _on_one_rank(config, shape, adapted), DTYPE_BYTES[config.model.dtype]
    matrices = muon_matrices(_of_one_rank(config), shape, 0)
    return (held.saved_by(config).total * element + held.trained.total * saved_state_bytes(config)
            - 4 * matrices.total)


_FURTHER_BYTES = {"onnx": 4, "openvino": 8, "gguf": 4}
"""Most bytes of a parameter in the files of an engine, beside Hugging Face's."""


def export_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of an export for Hugging Face, every parameter with adapters merged, and of those in further formats.

    A graph of 8-bit integers is made of one of float32, and GGUF files of safetensors that are removed afterwards.
    """
    further = sum(_FURTHER_BYTES[kind.partition("-")[0]] for kind in config.checkpoint.export_formats)
    own = DTYPE_BYTES[config.model.dtype] * (1 + len(config.checkpoint.export_formats))
    return _on_one_rank(config, shape, None).total * (own + further)


def total_steps(config: RunConfig) -> int | None:
    """Optimizer steps of the run; None if they depend on the number of rows."""
    return None if config.training.epochs is not None else config.training.train_steps or 1000


def checkpoints_at_once(config: RunConfig) -> int:
    """Largest number of checkpoints on the disk at once: those that are kept, the one being written, and the best one
    if it is kept; fewer if the run ends earlier. Two if the run keeps all and only its rows
    say how many.
    """
    keep, steps = config.checkpoint.keep, total_steps(config)
    epochs, every = config.training.epochs, config.checkpoint.save_every_epochs
    if every is not None:
        saved = None if epochs is None else math.ceil(epochs / every)
    else:
        saved = None if steps is None else math.ceil(steps / config.checkpoint.save_every_steps)
    at_once = keep + 1 + config.keeps_best if keep else saved or 2
    if config.checkpoint.keep_every_steps is not None and steps is not None:
        at_once += steps // config.checkpoint.keep_every_steps
    return at_once if saved is None else min(at_once, saved)


def _on_one_rank(config: RunConfig, shape: ModelShape, adapted: AdaptedLinears | None) -> Held:
    """All parameters of the run, as held by a single rank."""
    return held_parameters(_of_one_rank(config), shape, 0, adapted)


def _of_one_rank(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, parallel=ParallelConfig())
