"""Layers of Transformer Engine in Megatron's wrappers, what they do in which pass, and the micro-batches they need.

Not run on a GPU yet. Constructor and call are tested on the CPU through stand-ins that check their arguments as the
real ones do (tests/helpers/te_stand_in.py). Parameters have the names of Megatron's own Transformer Engine models;
`EmbeddingModel.global_name` gives those of our layers, and checkpoints hold the same either way.
"""

import dataclasses

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.batch import MicroBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.models.backbone import LayerClasses, LayerNorm
from megatron_embed.models.experts import TransformerEngineExperts
from megatron_embed.models.families import ModelShape
from megatron_embed.names import Fp8Passes, Fp8Recipe
from megatron_embed.parallel.topology import token_alignment
from megatron_embed.platform.compat import TransformerConfig, is_te_min_version, transformer_engine_layers
from megatron_embed.rounding import round_up

FP8_FORMATS: dict[Fp8Recipe, str] = {"tensorwise": "hybrid", "blockwise": "e4m3"}
"""Transformer Engine's default of each recipe; hybrid: gradients have one bit more of exponent and one less of
fraction."""
FP8_TOKENS: dict[Fp8Recipe, int] = {"tensorwise": 16, "blockwise": 128}
"""A rank's tokens are a multiple of it. 16: the product for the weight's gradient runs along the tokens. 128: a block,
without which a sequence-parallel gather is not in FP8."""


class SwiGLU(torch.nn.Module):
    """Transformer Engine's SwiGLU: [..., gate and value, one after the other] -> [...].

    Its operation is not one of this module's parts: Megatron's MLP asks each part for a sharded state, which that one
    has not, and it would add its FP8 state to checkpoints.
    """

    def __init__(self, config: TransformerConfig) -> None:
        from transformer_engine.pytorch.ops import SwiGLU as Operation

        super().__init__()
        self.operation = (Operation(),)

    def forward(self, inputs: Tensor) -> Tensor:
        """[tokens, 1, 2 * ffn/tp] -> [tokens, 1, ffn/tp]."""
        outputs: Tensor = self.operation[0](inputs)
        return outputs

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:
        """Empty."""
        return {}


def uses_swiglu(shape: ModelShape) -> bool:
    """Whether the model's MLP is one that `SwiGLU` computes. (GELU here is exact; Transformer Engine's is the tanh
    approximation.)"""
    return shape.gated and shape.activation == "silu" and not shape.num_experts


def te_layer_classes(shape: ModelShape, *, with_adapters: bool) -> LayerClasses:
    """The classes of a model's layers. With adapters, which need a norm's outputs, norms are not part of linears; a
    LayerNorm without bias, which Transformer Engine has not, is ours."""
    engine = transformer_engine_layers()
    own_norm = shape.norm == "LayerNorm" and not shape.norm_bias
    fuses = not with_adapters and not shape.post_norm and not own_norm
    return LayerClasses(
        norm=LayerNorm if own_norm else engine.TENorm, column_linear=engine.TEColumnParallelLinear,
        row_linear=engine.TERowParallelLinear,
        norm_linear=engine.TELayerNormColumnParallelLinear if fuses else None,
        activation=SwiGLU if uses_swiglu(shape) else None, experts=TransformerEngineExperts)


def configure(transformer: TransformerConfig, config: RunConfig, shape: ModelShape) -> None:
    """Set Megatron's configuration of a model of these layers. Called before they are built."""
    transformer.use_te_activation_func = uses_swiglu(shape)
    transformer.gradient_accumulation_fusion = True
    # No FP8 weights are kept from one micro-batch for the next, because Megatron would mark them as old only in a model
    # that is always in FP8, and because the first micro-batch would replace the main gradients instead of adding to
    # them (module/linear.py, accumulate_wgrad_into_param_main_grad).
    transformer.disable_parameter_transpose_cache = True
    transformer.fp8_recipe = config.model.fp8_recipe
    # Read when a layer is built, to store an input of attention's output projection once. The passes set it again.
    transformer.fp8 = FP8_FORMATS[config.model.fp8_recipe] if config.model.fp8 == "both" else None
    transformer.tp_comm_overlap = config.parallel.tp_comm_overlap


@dataclasses.dataclass(kw_only=True)
class PassSettings:
    """What the layers do in the passes of a training step and nowhere else, and the token counts that they need."""

    fp8: Fp8Passes = "none"
    fp8_format: str | None = None
    overlap: bool = False
    """Overlap of communication, in forward passes with gradients; the others have other sizes."""
    multiple: int = 1
    """Tokens of a micro-batch are a multiple of it."""
    least_tokens: int = 0
    """Tokens of a micro-batch are at least so many."""

    @classmethod
    def of_run(cls, config: RunConfig) -> "PassSettings":
        """The settings of a run."""
        model, overlap = config.model, config.parallel.tp_comm_overlap
        shares = token_alignment(config.parallel)
        return cls(fp8=model.fp8, fp8_format=FP8_FORMATS[model.fp8_recipe], overlap=overlap,
                   multiple=shares * (1 if model.fp8 == "none" else FP8_TOKENS[model.fp8_recipe]),
                   least_tokens=overlap_tokens(config) if overlap else 0)

    def prepare(self, model: torch.nn.Module, transformer: TransformerConfig) -> None:
        """Set the layers for the forward pass that follows, and the backward pass that belongs to it.

        The first pass of a step is one in training without gradients.
        """
        gradients = torch.is_grad_enabled()
        in_fp8 = model.training and (self.fp8 == "both" or (self.fp8 == "first_pass" and not gradients))
        transformer.fp8 = self.fp8_format if in_fp8 else None
        if self.overlap:
            for linear in model.modules():
                if isinstance(linear, transformer_engine_layers().TELinear):
                    on = gradients and model.training
                    linear.ub_overlap_ag_fprop = on and linear.parallel_mode == "column"
                    linear.ub_overlap_rs_fprop = on and linear.parallel_mode == "row"

    def pad(self, micro_batch: MicroBatch) -> MicroBatch:
        """The micro-batch with the padding at its end that the layers need."""
        tokens = micro_batch.token_ids.numel()
        missing = max(self.least_tokens, -(-tokens // self.multiple) * self.multiple) - tokens
        if not missing:
            return micro_batch

        def padded(values: Tensor, filler: int = 0) -> Tensor:
            return functional.pad(values, (0, missing), value=filler)

        types, vectors = micro_batch.token_types, micro_batch.vectors
        return dataclasses.replace(
            micro_batch, token_ids=padded(micro_batch.token_ids), position_ids=padded(micro_batch.position_ids),
            token_types=None if types is None else padded(types),
            vectors=None if vectors is None else padded(vectors, -1))


def overlap_tokens(config: RunConfig) -> int:
    """Tokens of every micro-batch of a run with parallel.tp_comm_overlap, over all ranks."""
    budget, model = config.training.micro_batch_tokens, config.model
    assert budget is not None, "run_checks refuses this"
    multiple = token_alignment(config.parallel) * (1 if model.fp8 == "none" else FP8_TOKENS[model.fp8_recipe])
    return round_up(budget, multiple)


_buffers: tuple[int, ...] | None = None


def start_overlap(config: RunConfig, transformer: TransformerConfig) -> None:
    """Make the buffers of parallel.tp_comm_overlap; Transformer Engine has one set in a process. Called by all ranks
    before the layers are built; communicates over the world.

    Raises:
        RuntimeError: Transformer Engine's, if this machine cannot share memory between the ranks.
    """
    global _buffers
    tokens = overlap_tokens(config) // config.parallel.context_parallel_size
    in_fp8 = config.model.fp8 == "both"
    wanted = (tokens, transformer.hidden_size, in_fp8)
    if _buffers == wanted:
        return
    assert _buffers is None, "a process has one model whose communication overlaps"
    from transformer_engine.pytorch.module import base

    if is_te_min_version("2.7.0"):
        modes = base.UserBufferQuantizationMode
        precision = {"quantization_modes": [modes.FP8 if in_fp8 else modes.NONE]}
    else:
        precision = {"use_fp8": in_fp8}
    base.initialize_ub(shape=[tokens, transformer.hidden_size], tp_size=config.parallel.tensor_model_parallel_size,
                       bootstrap_backend="nccl", **precision)
    _buffers = wanted
