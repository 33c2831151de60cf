"""Low-rank adapters on Megatron's tensor-parallel linears (Hu et al. 2021, arXiv:2106.09685): W x + scale * B A x.

A fused linear has one pair of matrices for each Hugging Face module in it, so that PEFT's files hold exactly the
trained parameters. Dropout is shared by the modules of one fused linear.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.models.families import ModelShape
from megatron_embed.models.lora_settings import Adapters
from megatron_embed.platform.compat import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
    make_sharded_tensors_for_checkpoint,
    plain_linear,
    tensor_parallel,
)
from megatron_embed.platform.grouped_linear import GroupedLinear, Groups


class SumGradients(torch.autograd.Function):
    """The input; its gradient is summed over the group (one all-reduce in the backward pass).

    Megatron's copy_to_tensor_model_parallel_region loses the sum of a gradient that is not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class LoraMatrices(torch.nn.Module):
    """The matrices A and B of one Hugging Face module, zero until they are initialized or loaded.

    A is [rank, inputs], or [rank, inputs/tp] in a row-parallel linear; B is [outputs, rank], or [outputs/tp, rank] in a
    column-parallel one. A module that stands for several projections has B0, B1, ..., one for each.
    """

    def __init__(self, rank: int, inputs: int, *outputs: int) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.zeros(rank, inputs))
        for index, rows in enumerate(outputs):
            self.register_parameter("B" if len(outputs) == 1 else f"B{index}",
                                    torch.nn.Parameter(torch.zeros(rows, rank)))

    def ups(self) -> list[torch.nn.Parameter]:
        """Every B, in order."""
        return [parameter for name, parameter in self.named_parameters() if name != "A"]


class Lora(torch.nn.Module):
    """Adapters of one linear, by the last word of each Hugging Face module; a subclass for each way of splitting it."""

    split: str
    """The matrix of which each tensor-parallel rank holds a share, and the dim along which it is split."""
    split_dim: int

    def __init__(self, linear: Any, adapters: Adapters) -> None:
        """`linear`: of Megatron or Transformer Engine."""
        super().__init__()
        self.scale = adapters.scale
        self.dropout = adapters.dropout
        self.group = linear.tp_group
        self.is_split = linear.tp_group.size() > 1
        self.is_expert = isinstance(linear, (ColumnParallelLinear, RowParallelLinear)) and linear.is_expert
        self.sequence_parallel = linear.sequence_parallel
        self.inputs = linear.weight.shape[1] * (self.group.size() if self.split == "A" else 1)

    def mark(self, split: torch.nn.Parameter, dim: int, copied: torch.nn.Parameter, linear: torch.nn.Module) -> None:
        """Set the attributes by which Megatron reduces gradients and counts them once in the norm. May be called for
        every matrix that shares the copied one.

        Args:
            split: the matrix of which each tensor-parallel rank holds a share along `dim`.
            copied: the matrix that all of them hold.
        """
        for parameter in (split, copied):
            parameter.allreduce = linear.weight.allreduce  # type: ignore[attr-defined]
        tensor_parallel.set_tensor_model_parallel_attributes(split, True, dim, 1)
        if self.is_expert:
            # The norm of experts is summed over their own tensor-parallel ranks, but Megatron looks for copies on those
            # of the dense layers.
            tensor_parallel.set_tensor_model_parallel_attributes(copied, True, 0, 1)
            copied.shared = self.group.rank() > 0  # type: ignore[attr-defined]
        elif self.is_split:
            copied.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def matrices(self) -> dict[str, LoraMatrices]:
        return {name: pair for name, pair in self.named_children() if isinstance(pair, LoraMatrices)}

    def dropout_inputs(self, inputs: Tensor) -> Tensor:
        """The inputs of an adapter after dropout."""
        return functional.dropout(inputs, self.dropout, self.training) if self.dropout else inputs


class ColumnLora(Lora):
    """Adapters of a linear whose outputs are split: B is split with them, every rank holds all of A."""

    split, split_dim = "B", 0

    def __init__(self, linear: Any, adapters: Adapters, parts: tuple[str | None, ...],
                 widths: tuple[int, ...]) -> None:
        """
        Args:
            parts: names of modules; one that is repeated stands for several projections, which share its A.
            widths: contiguous outputs of each part; the parts repeat in turn until all outputs are filled.
        """
        super().__init__(linear, adapters)
        self.turns = linear.weight.shape[0] // sum(widths)
        self.parts = tuple(zip(parts, widths, strict=True))
        for name in dict.fromkeys(name for name in parts if name is not None):
            pair = LoraMatrices(adapters.rank, self.inputs,
                                *(self.turns * width for part, width in self.parts if part == name))
            self.add_module(name, pair)
            for up in pair.ups():
                self.mark(up, 0, pair.A, linear)

    def forward(self, inputs: Tensor) -> Tensor:
        """[tokens/tp, ..., inputs] (all tokens without sequence parallelism) -> [tokens, ..., outputs/tp].

        Over the tensor-parallel group: with sequence parallelism an all-gather of [tokens/tp, rank] (backward, a
        reduce-scatter), else an all-reduce of its gradient; in experts an all-reduce of A's gradient.
        """
        matrices = self.matrices()
        down = torch.cat([pair.A for pair in matrices.values()])
        if self.is_split and self.is_expert:
            down = SumGradients.apply(down, self.group)
        inner = plain_linear(self.dropout_inputs(inputs), down) * self.scale
        if self.is_split and not self.is_expert:
            inner = (tensor_parallel.gather_from_sequence_parallel_region(inner, group=self.group)
                     if self.sequence_parallel else SumGradients.apply(inner, self.group))
        inners = dict(zip(matrices, inner.chunk(len(matrices), dim=-1), strict=True))
        ups = {name: iter(pair.ups()) for name, pair in matrices.items()}
        outputs = []
        for name, width in self.parts:
            if name is None:
                outputs.append(inner.new_zeros(*inner.shape[:-1], self.turns, width))
            else:
                outputs.append(plain_linear(inners[name], next(ups[name])).unflatten(-1, (self.turns, width)))
        return torch.cat(outputs, dim=-1).flatten(-2)


class RowLora(Lora):
    """Adapters of a linear whose inputs are split: A is split with them, every rank holds all of B."""

    split, split_dim = "A", 1

    def __init__(self, linear: Any, adapters: Adapters, name: str) -> None:
        super().__init__(linear, adapters)
        outputs, inputs = linear.weight.shape
        pair = LoraMatrices(adapters.rank, inputs, outputs)
        self.add_module(name, pair)
        self.mark(pair.A, 1, pair.B, linear)

    def dropout_inputs(self, inputs: Tensor) -> Tensor:
        """The inputs after dropout, with this rank's own random numbers, because the inputs are split (under sequence
        parallelism the whole block runs with its own ones)."""
        if not self.is_split or self.is_expert or self.sequence_parallel or not self.dropout:
            return super().dropout_inputs(inputs)
        with get_cuda_rng_tracker().fork():
            return super().dropout_inputs(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """[tokens, ..., inputs/tp] -> [tokens/tp, ..., outputs] (all tokens without sequence parallelism).

        Over the tensor-parallel group: a reduce-scatter of [tokens, rank] (backward, an all-gather), without sequence
        parallelism an all-reduce; in experts, whose outputs are summed later, an all-reduce of B's gradient.
        """
        (pair,) = self.matrices().values()
        inner = plain_linear(self.dropout_inputs(inputs), pair.A) * self.scale
        up: Tensor = pair.B
        if self.is_split and self.is_expert:
            up = SumGradients.apply(up, self.group)
        elif self.is_split:
            inner = (tensor_parallel.reduce_scatter_to_sequence_parallel_region(inner, group=self.group)
                     if self.sequence_parallel
                     else tensor_parallel.reduce_from_tensor_model_parallel_region(inner, group=self.group))
        return plain_linear(inner, up)


def column_adapters(inputs: Tensor, groups: Groups, loras: Sequence[ColumnLora]) -> Tensor:
    """[rows, inputs] -> [rows, outputs/etp] of the adapters of column-parallel experts, all alike, for their own rows.

    If the experts are split, an all-reduce of A's gradient over their group.
    """
    first, dropped = loras[0], loras[0].dropout_inputs(inputs)
    assert first.turns == 1, "parts that alternate are those of attention"
    outputs = []
    for name, width in first.parts:
        if name is None:
            outputs.append(inputs.new_zeros(len(inputs), width))
        else:
            pairs = [lora.matrices()[name] for lora in loras]
            down, up = torch.stack([pair.A for pair in pairs]), [pair.B for pair in pairs]
            if first.is_split:
                down = SumGradients.apply(down, first.group)
            inner = GroupedLinear.apply(dropped, groups, *down.unbind()) * first.scale
            outputs.append(GroupedLinear.apply(inner, groups, *up))
    return torch.cat(outputs, dim=-1)


def row_adapters(inputs: Tensor, groups: Groups, loras: Sequence[RowLora]) -> Tensor:
    """[rows, inputs/etp] -> [rows, outputs] of the adapters of row-parallel experts, for their own rows.

    If the experts are split, an all-reduce of B's gradient over their group.
    """
    first, pairs = loras[0], [next(iter(lora.matrices().values())) for lora in loras]
    inner = GroupedLinear.apply(first.dropout_inputs(inputs), groups, *[pair.A for pair in pairs]) * first.scale
    up = torch.stack([pair.B for pair in pairs])
    if first.is_split:
        up = SumGradients.apply(up, first.group)
    return GroupedLinear.apply(inner, groups, *up.unbind())  # type: ignore[no-any-return]


class AdaptedLinear:
    """The methods of a linear with adapters, of Megatron or Transformer Engine; its parameters keep their names."""

    lora: Lora

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The linear's output plus that of the adapters."""
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        return output + self.lora(input_), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The linear's sharded state and its adapters', whose split parameters are declared as split."""
        assert metadata is not None
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = {f"lora.{name}": tensor for name, tensor in self.lora.state_dict(prefix="", keep_vars=True).items()}
        return state | make_sharded_tensors_for_checkpoint(
            own, prefix, {name: self.lora.split_dim for name in own
                                if name.rpartition(".")[2].startswith(self.lora.split)},
            sharded_offsets, tp_group=self.lora.group, dp_cp_group=metadata["dp_cp_group"])


@functools.cache
def adapted(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of a linear of this class with adapters."""
    return type(f"Lora{kind.__name__}", (AdaptedLinear, kind), {})


def add_adapters(model: torch.nn.Module, adapters: Adapters, shape: ModelShape,
                 global_name: Callable[[str], str]) -> None:
    """Freeze the model and add adapters to its linears, initialized as in PEFT: A uniform, B zero.

    A rank's share of A is a slice of the whole matrix, which depends only on the seed and its name, so that every
    layout starts from the same weights. No communication.

    Args:
        global_name: maps the name of a parameter of this rank to the name with layers and experts counted over the
            whole model.
    """
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", name, count=1)
        parts = adapters.parts.get(re.sub(r"\.local_experts\.\d+\.", ".local_experts.#.", pattern, count=1))
        if parts is None:
            continue
        # Like torch's parametrizations: the class changes, the linear's parameters and their names stay.
        if _is_column_parallel(linear):
            linear.lora = ColumnLora(linear, adapters, parts, _widths(parts, shape, linear.weight.shape[0]))
        else:
            assert len(parts) == 1 and parts[0] is not None
            linear.lora = RowLora(linear, adapters, parts[0])
        linear.__class__ = adapted(type(linear))
        for part, pair in linear.lora.matrices().items():
            _initialize(pair.A, linear.lora, f"{adapters.seed} {global_name(f'{name}.lora.{part}.A')}")


def _is_column_parallel(linear: Any) -> bool:
    """Whether a linear's outputs are split, and not its inputs."""
    if isinstance(linear, (ColumnParallelLinear, RowParallelLinear)):
        return isinstance(linear, ColumnParallelLinear)
    is_column: bool = linear.parallel_mode == "column"  # Transformer Engine's
    return is_column


def _widths(parts: tuple[str | None, ...], shape: ModelShape, outputs: int) -> tuple[int, ...]:
    """Contiguous outputs of each part of a column-parallel linear: per query group in attention."""
    if len(parts) == 3:
        heads = shape.num_attention_heads // shape.num_query_groups
        return (heads * shape.head_dim, shape.head_dim, shape.head_dim)
    return (outputs // len(parts),) * len(parts)


@torch.no_grad()
def _initialize(matrix: torch.nn.Parameter, lora: Lora, seed: str) -> None:
    """Set this rank's share of A, uniform within 1 / sqrt(inputs) (Kaiming with a = sqrt(5), as in torch's Linear)."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    whole = torch.empty(matrix.shape[0], lora.inputs)
    bound = lora.inputs**-0.5
    whole.uniform_(-bound, bound, generator=generator)
    rank = lora.group.rank() if whole.shape != matrix.shape else 0
    matrix.copy_(whole[:, rank * matrix.shape[1]:(rank + 1) * matrix.shape[1]])
