"""Resolution of `model.dtype: auto` to one dtype for all ranks."""

import dataclasses
import logging

from megatron_embed.config.schema import RunConfig
from megatron_embed.names import ModelDtype
from megatron_embed.parallel.collectives import smallest
from megatron_embed.platform.bf16_support import has_native_bf16, why_not_bf16

logger = logging.getLogger(__name__)


def resolve_dtype(config: RunConfig) -> RunConfig:
    """The configuration with a dtype in place of `auto`: bfloat16 if every rank has instructions for it, else float32.

    Called by all ranks, before the first collective that depends on the dtype; one all-reduce of an integer, unless the
    dtype is float32. The result is logged.
    """
    if config.model.dtype == "float32":
        return config
    everywhere = bool(smallest(int(has_native_bf16())))
    reason = "" if everywhere else why_not_bf16() if not has_native_bf16() else "another rank has no such instructions"
    if config.model.dtype == "bfloat16":
        if not everywhere:
            logger.info("model.dtype = bfloat16: %s, so parameters and activations are bfloat16 and products are "
                        "computed in float32; model.dtype = auto would take float32", reason)
        return config
    dtype: ModelDtype = "bfloat16" if everywhere else "float32"
    logger.info("model.dtype = auto: %s%s", dtype, "" if everywhere else f" ({reason})")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
