"""What a run writes: bytes of a checkpoint and of an export, and how many checkpoints lie there at once."""

import dataclasses
import math

from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.planning.memory import DTYPE_BYTES
from megatron_embed.planning.parameters import Held, Parts, held_parameters


def checkpoint_bytes(config: RunConfig, shape: ModelShape, parts: Parts | None = None) -> int:
    """Of one checkpoint's tensors: every parameter once, and what the optimizer knows of those that are trained; not
    the files' own 2 KB for each of these.

    Args:
        parts: linear layers with adapters, which alone are trained; the frozen weights are saved with them.
    """
    held, element = _on_one_rank(config, shape, parts), DTYPE_BYTES[config.model.dtype]
    # Two moments in float32. Main parameters in float32 come besides where the model's own are not, and where the
    # optimizer is distributed, which saves them always.
    optimizer = 12 if element == 2 or config.optimizer.distributed else 8
    return held.total * element + held.trained.total * optimizer


def export_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Of the model for Hugging Face: every parameter, adapters merged into theirs."""
    return _on_one_rank(config, shape, None).total * DTYPE_BYTES[config.model.dtype]


def total_steps(config: RunConfig) -> int | None:
    """Optimizer steps of the run; null where they depend on the number of rows."""
    return None if config.training.epochs is not None else config.training.train_steps or 1000


def checkpoints_at_once(config: RunConfig) -> int:
    """Most checkpoints that lie on the disk together: those that are kept, the one that is being written, and the best
    where there is one; fewer if the run ends before. Two, where epochs are counted and all are kept.
    """
    keep, steps = config.checkpoint.keep, total_steps(config)
    saved = None if steps is None else math.ceil(steps / config.checkpoint.save_every_steps)
    at_once = keep + 1 + config.keeps_best if keep else saved or 2
    return at_once if saved is None else min(at_once, saved)


def _on_one_rank(config: RunConfig, shape: ModelShape, parts: Parts | None) -> Held:
    """All parameters of the run, as one rank alone would hold them."""
    return held_parameters(dataclasses.replace(config, parallel=ParallelConfig()), shape, 0, parts)
