"""Experts of a mixture whose products are grouped: one for all experts of a rank instead of one each."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_embed.models.layer import call_before_forward, gated
from megatron_embed.models.lora import AdaptedLinear, ColumnLora, RowLora, column_adapters, row_adapters
from megatron_embed.models.quantized_linear import GroupedQuantizedProduct, QuantizedLinear
from megatron_embed.platform.compat import ColumnParallelLinear, RowParallelLinear, SequentialMLP
from megatron_embed.platform.grouped_linear import GroupedLinear, Groups, groups_of

Linears = Sequence[ColumnParallelLinear | RowParallelLinear]
FP8_ROWS = 16
"""In FP8 an expert's rows are a multiple of it, along which the product for its weight's gradient runs."""


class GroupedExperts(SequentialMLP):
    """Megatron's SequentialMLP, with its parameters, their names and its checkpoints, computed for all experts at once.

    Adapters of the experts' linears are grouped as well.
    """

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor,
                permuted_probs: Tensor) -> tuple[Tensor, None]:
        """[rows, hidden], sorted by expert, and their router weights [rows] float32 -> ([rows, hidden], no bias).

        `tokens_per_expert`: [experts of this rank], rows of each; read on the host. No communication, but for adapters
        of experts that are split: all-reduces of the gradients of their whole matrices over the group of the split.
        """
        assert not self.config.add_bias_linear and not self.config.moe_apply_probs_on_input
        return self.outputs_of(permuted_local_hidden_states, tokens_per_expert.tolist(),
                               permuted_probs.unsqueeze(-1)), None

    def outputs_of(self, rows: Tensor, sizes: Sequence[int], weights: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; `sizes`: rows of each expert; `weights`: [rows, 1], the router's."""
        groups = groups_of(sizes, rows)
        hidden = self.linear("linear_fc1", rows, groups)
        if self.config.gated_linear_unit:
            hidden = gated(hidden, self.config, weights.squeeze(-1))
        else:
            hidden = (self.config.activation_func(hidden) * weights).to(hidden.dtype)
        return self.linear("linear_fc2", hidden, groups)

    def linear(self, name: str, inputs: Tensor, groups: Groups) -> Tensor:
        """[rows, inputs] -> [rows, outputs] by the linear `name` of each row's expert, with its adapters."""
        linears: Linears = [mlp.get_submodule(name) for mlp in self.local_experts]
        for linear in linears:
            call_before_forward(linear, inputs)
        outputs = self.product(name, inputs, groups, linears)
        loras = [linear.lora for linear in linears if isinstance(linear, AdaptedLinear)]
        columns = [lora for lora in loras if isinstance(lora, ColumnLora)]
        rows = [lora for lora in loras if isinstance(lora, RowLora)]
        if columns:
            return outputs + column_adapters(inputs, groups, columns)
        return outputs + row_adapters(inputs, groups, rows) if rows else outputs

    def product(self, name: str, inputs: Tensor, groups: Groups, linears: Linears) -> Tensor:
        """`linear` without adapters."""
        outputs: Tensor
        if isinstance(linears[0], QuantizedLinear):
            outputs = GroupedQuantizedProduct.apply(inputs, groups, [linear.weight for linear in linears])
        else:
            outputs = GroupedLinear.apply(inputs, groups, *[linear.weight for linear in linears])
        return outputs


class TransformerEngineExperts(GroupedExperts):
    """GroupedExperts whose products are those of Transformer Engine's GroupedLinear, in FP8 too.

    Its modules are not parts of this one: they have no parameters of their own and get the experts' for every product,
    so that parameters, their names and checkpoints stay the same. Weight gradients are added to `main_grad`.
    """

    def __init__(self, num_local_experts: int, config: Any, *arguments: Any, **others: Any) -> None:
        from transformer_engine.pytorch import Fp8Padding, Fp8Unpadding

        # Megatron's own linears, which hold the weights and multiply nothing, would need Apex for it.
        without_fusion = copy.copy(config)
        without_fusion.gradient_accumulation_fusion = False
        super().__init__(num_local_experts, without_fusion, *arguments, **others)
        self.config = config  # whose `fp8` the passes set
        self.engine = {name: self._module(name) for name in ("linear_fc1", "linear_fc2")}
        self.paddings = Fp8Padding(num_local_experts, FP8_ROWS), Fp8Unpadding(num_local_experts, FP8_ROWS)

    def _module(self, name: str) -> Any:
        from transformer_engine.pytorch import GroupedLinear as EngineLinear

        outputs, inputs = self.local_experts[0].get_submodule(name).weight.shape
        # It knows nothing of parallelism: the token dispatcher communicates, and the weights are this rank's share.
        return EngineLinear(
            self.num_local_experts, inputs, outputs, bias=False, params_dtype=self.config.params_dtype, device="meta",
            fuse_wgrad_accumulation=self.config.gradient_accumulation_fusion)

    def outputs_of(self, rows: Tensor, sizes: Sequence[int], weights: Tensor) -> Tensor:
        """As that of GroupedExperts; in FP8, every expert's rows are padded."""
        if not self.config.fp8:
            return super().outputs_of(rows, sizes, weights)
        pad, unpad = self.paddings
        (rows, padded), (weights, _) = pad(rows, sizes), pad(weights, sizes)
        outputs: Tensor = unpad(super().outputs_of(rows, padded, weights), sizes)
        return outputs

    def product(self, name: str, inputs: Tensor, groups: Groups, linears: Linears) -> Tensor:
        """As that of GroupedExperts; by it if there are no rows at all."""
        if not len(inputs):
            return super().product(name, inputs, groups, linears)
        engine = self.engine[name]
        engine._parameters.update((f"weight{index}", linear.weight) for index, linear in enumerate(linears))
        # None: weights in FP8 are not kept for the next micro-batch, see te_layers.configure.
        outputs: Tensor = engine(inputs, list(groups.sizes), is_first_microbatch=None)
        return outputs
