"""Bytes of quantized weights on a rank, as models/quantized_weight.py holds them."""

import math
from dataclasses import dataclass

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.models.quantization import BLOCK

SCALES_PER_GROUP = 256
"""Scales of nf4 that share a scale and an offset in double quantization."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear of a layer."""

    outputs: int
    """Rows of a rank's share."""
    inputs: int
    """Columns of a rank's share."""
    tensors: tuple[int, ...]
    """Weights of each whole Hugging Face tensor in it."""

    @property
    def weights(self) -> int:
        """Weights of a rank's share."""
        return self.outputs * self.inputs


def quantized_linears(config: RunConfig, shape: ModelShape) -> list[Linear]:
    """`layer_linears`, or none without `model.quantization`."""
    return [] if config.model.quantization == "none" else layer_linears(config, shape)


def layer_linears(config: RunConfig, shape: ModelShape) -> list[Linear]:
    """The linears of one layer on one rank, every expert's."""
    sizes, hidden, ffn = config.parallel, shape.hidden_size, shape.ffn_hidden_size
    tp, query, key = (sizes.tensor_model_parallel_size, shape.num_attention_heads * shape.head_dim,
                      shape.num_query_groups * shape.head_dim)
    linears = [Linear(outputs=(query + 2 * key) // tp, inputs=hidden,
                      tensors=(query * hidden, key * hidden, key * hidden)),
               Linear(outputs=hidden, inputs=query // tp, tensors=(query * hidden,))]
    split, parts = sizes.expert_tensor_parallel_size if shape.num_experts else tp, 2 if shape.gated else 1
    mlp = [Linear(outputs=parts * ffn // split, inputs=hidden, tensors=(ffn * hidden,) * parts),
           Linear(outputs=hidden, inputs=ffn // split, tensors=(ffn * hidden,))]
    experts = shape.num_experts // sizes.expert_model_parallel_size if shape.num_experts else 1
    return linears + mlp * experts


def quantized_bytes(config: RunConfig, linear: Linear) -> int:
    """Bytes of codes and scales of one linear."""
    if config.model.quantization == "int8":
        return linear.weights + 4 * linear.outputs
    scales = linear.weights // BLOCK
    if not config.model.double_quantization:
        return linear.weights // 2 + 4 * scales
    groups = sum(math.ceil(tensor / BLOCK / SCALES_PER_GROUP) for tensor in linear.tensors)
    return linear.weights // 2 + scales + 8 * groups


def bytes_saved(config: RunConfig, shape: ModelShape, element: int) -> int:
    """Bytes that one layer's weights need less than `element` each."""
    return sum(element * linear.weights - quantized_bytes(config, linear)
               for linear in quantized_linears(config, shape))


def restored_bytes(config: RunConfig, shape: ModelShape, element: int) -> int:
    """Most bytes of weights that are restored at a time: of one linear, or of all experts of a rank, which GPUs
    multiply at once, with a copy that puts them together."""
    linears = quantized_linears(config, shape)
    if not linears:
        return 0
    dense = max(linear.weights for linear in linears)
    if shape.num_experts:
        return 2 * element * max(sum(linear.weights for linear in linears[2::2]), dense)
    return element * dense


def restoring_traffic(config: RunConfig, shape: ModelShape, element: int) -> int:
    """Bytes that a pass over a micro-batch moves to restore the weights of one layer: codes and scales are read, the
    restored weights are written and read."""
    return sum(quantized_bytes(config, linear) + 2 * element * linear.weights
               for linear in quantized_linears(config, shape))
