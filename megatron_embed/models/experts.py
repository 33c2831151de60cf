"""Experts of a mixture whose products are grouped: one for all experts of a rank instead of one each."""

from collections.abc import Sequence

from torch import Tensor

from megatron_embed.models.layer import call_before_forward, gated
from megatron_embed.models.lora import AdaptedLinear, ColumnLora, RowLora, column_adapters, row_adapters
from megatron_embed.models.quantized_linear import GroupedQuantizedProduct, QuantizedLinear
from megatron_embed.platform.compat import ColumnParallelLinear, RowParallelLinear, SequentialMLP
from megatron_embed.platform.grouped_linear import GroupedLinear, Groups, groups_of

Linears = Sequence[ColumnParallelLinear | RowParallelLinear]


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
        groups = groups_of(tokens_per_expert.tolist(), permuted_local_hidden_states)
        hidden = grouped_linear(permuted_local_hidden_states, groups, [mlp.linear_fc1 for mlp in self.local_experts])
        if self.config.gated_linear_unit:
            hidden = gated(hidden, self.config)
        else:
            hidden = self.config.activation_func(hidden)
        hidden = (hidden * permuted_probs.unsqueeze(-1)).to(hidden.dtype)
        return grouped_linear(hidden, groups, [mlp.linear_fc2 for mlp in self.local_experts]), None


def grouped_linear(inputs: Tensor, groups: Groups, linears: Linears) -> Tensor:
    """[rows, inputs] -> [rows, outputs] by the linear of each row's expert, with its adapters."""
    for linear in linears:
        call_before_forward(linear, inputs)
    outputs: Tensor
    if isinstance(linears[0], QuantizedLinear):
        outputs = GroupedQuantizedProduct.apply(inputs, groups, [linear.weight for linear in linears])
    else:
        outputs = GroupedLinear.apply(inputs, groups, *[linear.weight for linear in linears])
    loras = [linear.lora for linear in linears if isinstance(linear, AdaptedLinear)]
    columns = [lora for lora in loras if isinstance(lora, ColumnLora)]
    rows = [lora for lora in loras if isinstance(lora, RowLora)]
    if columns:
        return outputs + column_adapters(inputs, groups, columns)
    return outputs + row_adapters(inputs, groups, rows) if rows else outputs
