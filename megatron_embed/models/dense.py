"""Dense modules of Sentence Transformers over pooled rows, on the last pipeline stage.

They follow the pooling, so every tensor- and context-parallel rank has the same rows and the whole gradient of the
output; backbone gradients are partial sums over the context-parallel ranks, and are added up. Weights here therefore
take 1/cp of their gradient, as those of a reranker's head.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.models.dense_settings import DenseSettings
from megatron_embed.models.heads import scale_gradient
from megatron_embed.models.lora import SumGradients
from megatron_embed.names import DenseActivation
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import make_sharded_tensors_for_checkpoint, tensor_parallel

ACTIVATIONS: Mapping[DenseActivation, Callable[[Tensor], Tensor]] = {
    "identity": lambda rows: rows, "tanh": torch.tanh, "relu": torch.relu, "gelu": functional.gelu,
    "silu": functional.silu, "sigmoid": torch.sigmoid}


class DenseLayer(torch.nn.Module):
    """One linear layer with its activation; a wide one is divided by outputs over the tensor-parallel ranks.

    weight [outputs/tp or outputs, inputs], bias [outputs/tp or outputs]; uninitialized.
    """

    def __init__(self, settings: DenseSettings, topology: Topology) -> None:
        super().__init__()
        self.settings = settings
        self.cp_size = topology.cp_size
        shards = settings.shards(topology.tp_size)
        self.shards = shards
        self.group = topology.groups.tp
        self.weight = torch.nn.Parameter(torch.empty(settings.out_features // shards, settings.in_features))
        self.bias = torch.nn.Parameter(torch.empty(settings.out_features // shards)) if settings.bias else None
        if shards > 1:
            for parameter in self.parameters():
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, inputs] float32 -> [rows, outputs] float32, equal on all tensor-parallel ranks.

        If it is divided, an all-gather of [rows, outputs/tp]; backward, an all-reduce of [rows, inputs].
        """
        if self.settings.normalize_input:
            rows = functional.normalize(rows, dim=-1)
        if self.shards > 1:
            rows = SumGradients.apply(rows, self.group)
        rows = functional.linear(rows, self._scaled(self.weight),
                                 None if self.bias is None else self._scaled(self.bias))
        rows = ACTIVATIONS[self.settings.activation](rows)
        if self.shards > 1:
            rows = tensor_parallel.gather_from_tensor_model_parallel_region(rows, group=self.group)
        return rows

    def own_rows(self, whole: Tensor) -> Tensor:
        """This rank's share of a whole weight or bias."""
        return whole.chunk(self.shards)[self.group.rank() if self.shards > 1 else 0]

    def _scaled(self, parameter: Tensor) -> Tensor:
        return scale_gradient(parameter.float(), 1.0 / self.cp_size)


class DenseModules(torch.nn.Sequential):
    """Several of them, one behind the other."""

    def __init__(self, dense: Sequence[DenseSettings], topology: Topology) -> None:
        super().__init__(*(DenseLayer(settings, topology) for settings in dense))

    def layers(self) -> list[DenseLayer]:
        """The layers in order."""
        return [layer for layer in self.children() if isinstance(layer, DenseLayer)]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state: divided weights are declared as divided."""
        assert metadata is not None
        state = {}
        for index, layer in enumerate(self.layers()):
            own = layer.state_dict(prefix="", keep_vars=True)
            state |= make_sharded_tensors_for_checkpoint(
                own, f"{prefix}{index}.", dict.fromkeys(own, 0) if layer.shards > 1 else {}, sharded_offsets,
                tp_group=layer.group, dp_cp_group=metadata["dp_cp_group"])
        return state


@torch.no_grad()
def initialize_dense(modules: DenseModules, seed: int) -> None:
    """New weights as `semi_orthogonal` draws them, biases 0; equal in every layout."""
    for index, layer in enumerate(modules.layers()):
        for name, parameter in layer.named_parameters():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(f"dense.{index}.{name}".encode()))
            shape = layer.settings.shapes[name]
            whole = semi_orthogonal(*shape, generator) if name == "weight" else torch.zeros(shape)
            parameter.copy_(layer.own_rows(whole))


def semi_orthogonal(outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
    """A random [outputs, inputs] float32 matrix whose columns are orthonormal, or the rows if there are fewer of them.

    So a wider layer keeps all dot products of its inputs, and a narrower one is a random projection onto a subspace,
    which keeps them on average (Saxe et al. 2014, arXiv 1312.6120; torch.nn.init.orthogonal_). Values are multiples of
    2^-16, so that processors whose factorizations differ in the last bits give equal ones.
    """
    drawn = torch.randn(max(outputs, inputs), min(outputs, inputs), generator=generator, dtype=torch.float64)
    orthonormal, triangle = torch.linalg.qr(drawn)
    orthonormal = torch.round(orthonormal * torch.sign(torch.diagonal(triangle)) * 2**16) / 2**16
    return (orthonormal if outputs >= inputs else orthonormal.T).float()
