"""Disentangled attention of DeBERTa (He et al. 2020, arXiv:2006.03654): the score of a query and a key has the products
of the query with the embedding of their relative position, and of the key with it, added.

The embeddings are shared by all layers, each of which projects them as it projects tokens. Every pipeline stage has a
copy, see `relative_bias.sum_over_copies`.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.models.families import DisentangledPositions, ModelShape
from megatron_embed.models.layer import BackboneConfig, PackedSelfAttention
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import make_sharded_tensor_for_checkpoint, tensor_parallel


def position_buckets(distance: Tensor, positions: DisentangledPositions) -> Tensor:
    """[...] int64 key position minus query position -> the embedding of that distance, int64."""
    back, span = -distance, positions.span
    if positions.has_buckets:
        half = span // 2
        # In float32 and in this order as in Transformers: at the border of two buckets rounding decides.
        steps = back.abs().clamp(min=half - 1)
        growth = torch.log(steps / half) / torch.log(torch.tensor((positions.max_distance - 1) / half))
        far = (torch.ceil(growth * (half - 1)) + half) * torch.sign(back)
        back = torch.where(back.abs() <= half, back, far.to(torch.int64))
    return (back + span).clamp(0, 2 * span - 1)


class RelativeEmbeddings(torch.nn.Module):
    """weight [2 * span, hidden] and a LayerNorm, whole on every tensor-parallel rank; uninitialized."""

    def __init__(self, config: BackboneConfig, shape: ModelShape, topology: Topology, *, copy: int) -> None:
        """`copy`: 0 on the first pipeline stage, another number on each further one."""
        super().__init__()
        assert shape.disentangled_positions is not None
        self.positions, self.copy, self.dropout = shape.disentangled_positions, copy, config.hidden_dropout
        self.tp_rank, self.shares = topology.tp_rank, topology.tp_size if config.sequence_parallel else 1
        self.weight = torch.nn.Parameter(torch.empty(2 * self.positions.span, shape.hidden_size))
        self.norm = torch.nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            parameter.shared = copy > 0  # type: ignore[attr-defined]  # counted once in the gradient norm

    def forward(self) -> Tensor:
        """[2 * span, 1, hidden], under sequence parallelism this rank's share of the rows: what a layer projects."""
        rows: Tensor = functional.dropout(self.norm(self.weight), self.dropout, self.training)
        return rows.chunk(self.shares)[self.tp_rank % self.shares][:, None]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state; of several copies the first stage's is saved."""
        assert metadata is not None
        group = metadata["dp_cp_group"]
        return {f"{prefix}{name}": make_sharded_tensor_for_checkpoint(
            parameter, f"{prefix}{name}", prepend_offsets=sharded_offsets, dp_cp_group=group,
            replica_id=(self.copy, self.tp_rank, group.rank())) for name, parameter in self.named_parameters()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisentangledBias:
    """What is added to the attention scores of one layer."""

    positions: DisentangledPositions
    query: Tensor
    """[2 * span, heads/tp, head_dim] of the relative positions, as `key`."""
    key: Tensor
    scale: float

    def share_of(self, group: torch.distributed.ProcessGroup) -> "DisentangledBias":
        """The bias of this rank's share of the heads."""
        query, key = (rows.chunk(group.size(), dim=1)[group.rank()] for rows in (self.query, self.key))
        return dataclasses.replace(self, query=query, key=key)

    def scores(self, distance: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """[segments, heads/tp, queries, keys] of the dtype of `query`.

        Args:
            distance: [segments or 1, queries, keys] int64, key position minus query position.
            query: [segments, heads/tp, queries, head_dim], as `key` with its keys.
        """
        index = position_buckets(distance, self.positions)[:, None]
        shape = (len(query), query.shape[1], *index.shape[2:])
        parts = []
        for contents, rows, at in ((query, self.key, index), (key, self.query, index.transpose(2, 3))):
            products = torch.matmul(contents, rows.to(contents.dtype).permute(1, 2, 0))
            parts.append(products.gather(3, at.expand(*shape[:2], *at.shape[2:])))
        return (parts[0] + parts[1].transpose(2, 3)) * self.scale


class DisentangledSelfAttention(PackedSelfAttention):
    """Self-attention that projects embeddings of relative positions with the weights of queries and keys."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,  # type: ignore[override]
                rotary_pos_emb: Tensor | None = None, packed_seq_params: Any = None,
                **others: Any) -> tuple[Tensor, Tensor | None]:
        """[tokens/tp, 1, hidden] -> (the same shape, bias that is not added yet).

        Args:
            packed_seq_params: with the RelativeEmbeddings as `bias`.
        """
        embeddings: RelativeEmbeddings = packed_seq_params.bias
        position_query, position_key, _ = self._projected(embeddings())

        def attend(query: Tensor, key: Tensor, value: Tensor, position_query: Tensor, position_key: Tensor) -> Tensor:
            bias = DisentangledBias(positions=embeddings.positions, query=position_query, key=position_key,
                                    scale=self.core_attention.scale)
            return self.core_attention(  # type: ignore[no-any-return]
                query[:, None], key[:, None], value[:, None], attention_mask, attn_mask_type=self.attn_mask_type,
                packed_seq_params=dataclasses.replace(packed_seq_params, bias=bias))

        inputs = (*self._projected(hidden_states), position_query, position_key)
        if self.checkpoint_core_attention and self.training:
            return self.linear_proj(tensor_parallel.checkpoint(attend, False, *inputs))  # type: ignore[no-any-return]
        return self.linear_proj(attend(*inputs))  # type: ignore[no-any-return]

    def _projected(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of states, [rows, heads/tp, head_dim] each."""
        mixed, _ = self.linear_qkv(states)
        heads, head_dim = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        return mixed.view(len(mixed), heads, 3, head_dim).unbind(2)  # type: ignore[no-any-return]
