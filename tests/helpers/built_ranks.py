"""Helpers of tests/planning/test_memory.py and other tests."""

from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.shapes import shape_of


def build(config, topology):
    """This rank's chunks, with adapters if `lora` asks for them."""
    from megatron_embed.models.adapters import Adapters
    from megatron_embed.models.encoder import build_model

    shape = shape_of(config.model.path)
    parts = adapted_linears(config, shape)
    adapters = None if parts is None else Adapters(rank=config.lora.rank, scale=1.0, dropout=0.0, seed=1, parts=parts)
    return build_model(config, shape, topology, "mean", adapters=adapters)
