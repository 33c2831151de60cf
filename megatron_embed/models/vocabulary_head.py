"""The vocabulary head of a sparse model: token states to a weight of the text for every token of the vocabulary.

An encoder's masked-language-model head (a square linear layer, an activation, a norm, then the vocabulary with a bias),
or a decoder's language-model head, divided over the tensor-parallel ranks by the vocabulary. It comes before the
pooling, so that with context parallelism every rank has the gradient of its own tokens, as in the layers below.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.kernels.reference import ACTIVATIONS
from megatron_embed.models.families import ModelShape
from megatron_embed.models.lora import SumGradients
from megatron_embed.models.pooling import PoolingPlan
from megatron_embed.models.splade_pooling import splade_max
from megatron_embed.models.vocabulary_shape import MASKED_LM, check_family, padded_vocabulary
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import (
    make_sharded_tensors_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
    tensor_parallel,
)

FIRST_LOGITS = 4.0
"""How far below 0 the logits of a new head begin, in lengths of a word embedding."""


class VocabularyHead(torch.nn.Module):
    """See above; on the last pipeline stage, uninitialized.

    Encoders: dense.weight [hidden, hidden], dense.bias [hidden], norm.weight [hidden], norm.bias [hidden], bias
    [vocabulary/tp]; some have not all of these biases. Weight [vocabulary/tp, hidden] only if it is not tied to the
    word embeddings.
    """

    def __init__(self, shape: ModelShape, topology: Topology) -> None:
        super().__init__()
        check_family(shape)
        self.topology, self.is_tied = topology, shape.tie_word_embeddings
        self.tied_weight: Tensor | None = None
        """[vocabulary/tp, hidden] float32 of a tied head in a pipeline, a leaf that collects the gradient of a step."""
        hidden, rows = shape.hidden_size, padded_vocabulary(shape.vocab_size, topology.tp_size) // topology.tp_size
        self.rows = rows
        self.own_rows = max(0, min(rows, shape.vocab_size - topology.tp_rank * rows))
        """Without the rows that pad the vocabulary."""
        self.dense = self.norm = self.bias = self.weight = None
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS["gelu"]
        if shape.family in MASKED_LM:
            self._add_transform(shape, hidden)
            self.bias = torch.nn.Parameter(torch.empty(rows)) if shape.vocabulary_bias else None
        if not self.is_tied:
            self.weight = torch.nn.Parameter(torch.empty(rows, hidden))
        for parameter in (self.bias, self.weight):
            if parameter is not None:
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def _add_transform(self, shape: ModelShape, hidden: int) -> None:
        """What comes before the vocabulary; each sequence-parallel rank computes it for its own tokens."""
        own = shape.classifier
        assert own is not None
        is_modern = shape.family == "modernbert"
        self.dense = torch.nn.Linear(hidden, hidden, bias=own.dense_bias if is_modern else True)
        self.norm = torch.nn.LayerNorm(hidden, eps=shape.norm_eps, bias=shape.norm_bias)
        if shape.family == "bert":
            self.activation = ACTIVATIONS[shape.activation]
        elif is_modern and own.activation != "tanh":
            self.activation = ACTIVATIONS[own.activation]
        for parameter in (*self.dense.parameters(), *self.norm.parameters()):
            parameter.sequence_parallel = self.topology.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: Tensor, plan: PoolingPlan, embeddings: Tensor | None) -> Tensor:
        """[tokens/(cp*tp), hidden] (tokens/cp without sequence parallelism) -> [texts, vocabulary/tp] float32.

        Args:
            plan: over the tokens of this context-parallel rank.
            embeddings: [vocabulary/tp, hidden], the word embeddings if this stage has them.
        """
        tp = self.topology.groups.tp
        if self.dense is not None and self.norm is not None:
            states = self.norm(self.activation(self.dense(states)))
        if self.topology.sequence_parallel:
            states = tensor_parallel.gather_from_sequence_parallel_region(
                states, tensor_parallel_output_grad=True, group=tp)
        elif tp.size() > 1:
            states = SumGradients.apply(states, tp)  # type: ignore[no-untyped-call]
        weight = self.weight
        if self.is_tied:
            weight = self.tied_weight if embeddings is None else embeddings
        assert weight is not None, "fetch_tied_weight must be called before a pass"
        rows = splade_max(states.index_select(0, plan.tokens), weight[: self.own_rows].to(states.dtype),
                          None if self.bias is None else self.bias[: self.own_rows], plan, self.topology.groups.cp)
        return rows if self.own_rows == self.rows else functional.pad(rows, (0, self.rows - self.own_rows))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state; what is divided by the vocabulary may be padded otherwise in another layout."""
        assert metadata is not None
        groups: dict[str, Any] = {"tp_group": self.topology.groups.tp, "dp_cp_group": metadata["dp_cp_group"]}
        own = self.state_dict(prefix="", keep_vars=True)
        divided = {name: own.pop(name) for name in ("weight", "bias") if name in own}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets, **groups)
        for name, tensor in divided.items():
            state[prefix + name] = make_tp_sharded_tensor_for_checkpoint(
                tensor, prefix + name, tp_axis=0, allow_shape_mismatch=True, prepend_offsets=sharded_offsets, **groups)
        return state


def fetch_tied_weight(embeddings: Tensor | None, head: VocabularyHead | None, shape: ModelShape,
                      topology: Topology) -> None:
    """Copy the first stage's word embeddings to the last stage's head. Called by all ranks of a pipeline before a pass.

    One broadcast of [vocabulary/tp, hidden] float32 over the pipeline.

    Args:
        embeddings: on the first stage; None elsewhere.
        head: on the last stage; None elsewhere.
    """
    rows = padded_vocabulary(shape.vocab_size, topology.tp_size) // topology.tp_size
    values = torch.zeros(rows, shape.hidden_size, device=topology.device)
    if embeddings is not None:
        values.copy_(embeddings.detach())
    dist.broadcast(values, src=dist.get_global_rank(topology.groups.pp, 0), group=topology.groups.pp)
    if head is not None:
        head.tied_weight = values.requires_grad_(True)


def return_tied_gradient(embeddings: Tensor | None, head: VocabularyHead | None, shape: ModelShape,
                         topology: Topology) -> None:
    """Add the gradient of the head's copy to that of the first stage's word embeddings.

    Called by all ranks of a pipeline after a step's backward passes and before gradients are reduced over data-parallel
    ranks; one broadcast, and arguments as in `fetch_tied_weight`.
    """
    rows = padded_vocabulary(shape.vocab_size, topology.tp_size) // topology.tp_size
    gradient = torch.zeros(rows, shape.hidden_size, device=topology.device)
    if head is not None and head.tied_weight is not None and head.tied_weight.grad is not None:
        gradient = head.tied_weight.grad
    group = topology.groups.pp
    dist.broadcast(gradient, src=dist.get_global_rank(group, topology.pp_size - 1), group=group)
    if embeddings is not None and embeddings.requires_grad:
        embeddings.main_grad += gradient  # type: ignore[attr-defined]


@torch.no_grad()
def initialize_vocabulary_head(head: VocabularyHead, names: Sequence[str], embedding_length: float) -> None:
    """New tensors of an encoder's head: the transform passes states on, and logits begin low, so that a text has
    weights for the few tokens of the vocabulary whose embeddings are closest to its states; equal in every layout.

    With random weights and no bias, as Transformers makes them, a text has a weight for nearly every token, and dot
    products of tens of thousands say little. The norm makes states as long as sqrt(hidden), so logits spread by about
    the length of an embedding.

    Args:
        names: tensors that are new. A bias alone begins with 0.
        embedding_length: mean length of the rows of the head's matrix.
    """
    for name in names:
        parameter = head.get_parameter(name)
        parameter.zero_()
        if name == "norm.weight":
            parameter.fill_(1.0)
        elif name == "dense.weight":
            parameter.fill_diagonal_(1.0)
        elif name == "bias" and "dense.weight" in names:
            parameter[: head.own_rows] = -FIRST_LOGITS * embedding_length
