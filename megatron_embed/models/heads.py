"""A reranker's head: pooled rows [rows, hidden] -> one score per row, [rows, 1] float32.

The head follows the pooling, so with context parallelism every rank computes the same scores from the same rows and the
whole gradient of the head's weights, whereas backbone gradients are partial sums over the ranks. The head's weights
therefore take 1/cp of their gradient.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.kernels.reference import ACTIVATIONS
from megatron_embed.models.families import ModelShape
from megatron_embed.names import HeadKind, Pooling
from megatron_embed.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The kind of a reranker's head, and its tokens."""

    kind: HeadKind
    true_token_id: int | None = None
    """yes_no: rows of the language-model head; the score is the difference of their logits."""
    false_token_id: int | None = None

    def is_tied(self, shape: ModelShape) -> bool:
        """Whether the head's weights are rows of the word embeddings."""
        return self.kind == "yes_no" and shape.tie_word_embeddings

    @property
    def token_ids(self) -> tuple[int, int]:
        """(true, false) of a yes_no head."""
        assert self.true_token_id is not None and self.false_token_id is not None
        return self.true_token_id, self.false_token_id


def head_pooling(shape: ModelShape) -> Pooling:
    """Pooling of a head, as in the stock classes: an encoder's own, the last token of a decoder."""
    return "lasttoken" if shape.classifier is None else shape.classifier.pooling


def is_encoder(shape: ModelShape) -> bool:
    """Whether the model is an encoder, which reads query and document as a pair of texts."""
    return shape.classifier is not None


class RerankerHead(torch.nn.Module):
    """Scores of rows, on the last pipeline stage. Its weights are whole on every tensor-parallel rank.

    yes_no: weight [2, hidden], the rows of the language-model head for yes and no. If tied to the word embeddings, they
    are not a parameter of this module but a copy of the first stage's rows, fetched before each pass
    (`fetch_tied_rows`), whose gradient is returned after it (`return_tied_gradients`).
    score: weight [1, hidden]; in encoders with bias and, before it, a dense layer with tanh, as in
    BertForSequenceClassification (whose pooler it is) and XLMRobertaForSequenceClassification, or what
    `shape.classifier` says.
    """

    def __init__(self, spec: HeadSpec, shape: ModelShape, cp_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.cp_size = cp_size
        self.tied_rows: Tensor | None = None
        """[2, hidden] float32, a leaf that collects the gradient of a step."""
        hidden, outputs = shape.hidden_size, 2 if spec.kind == "yes_no" else 1
        own = shape.classifier if spec.kind == "score" else None
        self.dense = None if own is None else torch.nn.Linear(hidden, hidden, bias=own.dense_bias)
        self.activation = torch.tanh if own is None or own.activation == "tanh" else ACTIVATIONS[own.activation]
        self.norm = (torch.nn.LayerNorm(hidden, eps=shape.norm_eps, bias=shape.norm_bias)
                     if own is not None and own.norm else None)
        self.weight = self.bias = None
        if not spec.is_tied(shape):
            self.weight = torch.nn.Parameter(torch.empty(outputs, hidden))
        if own is not None:
            self.bias = torch.nn.Parameter(torch.empty(1))

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, hidden] float32 -> [rows, 1] float32. No communication."""
        if self.dense is not None:
            rows = self.activation(functional.linear(rows, self._scaled(self.dense.weight),
                                                     self._scaled(self.dense.bias)))
        if self.norm is not None:
            rows = functional.layer_norm(rows, rows.shape[-1:], self._scaled(self.norm.weight),
                                         self._scaled(self.norm.bias), self.norm.eps)
        if self.weight is None:
            assert self.tied_rows is not None, "fetch_tied_rows must be called before a pass"
            weight = self.tied_rows
        else:
            weight = self._scaled(self.weight)
        scores = functional.linear(rows, weight, self._scaled(self.bias))
        return scores[:, :1] - scores[:, 1:] if self.spec.kind == "yes_no" else scores

    def _scaled(self, weight: Tensor | None) -> Tensor | None:
        """The parameter in float32, with its gradient divided by the context-parallel size; None for none."""
        return None if weight is None else _ScaledGradient.apply(weight.float(), 1.0 / self.cp_size)  # type: ignore[no-any-return,no-untyped-call]


class _ScaledGradient(torch.autograd.Function):
    """The tensor itself, with a factor on its gradient."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * context.factor, None


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The tensor itself, with a factor on its gradient."""
    return _ScaledGradient.apply(tensor, factor)  # type: ignore[no-any-return,no-untyped-call]


def fetch_tied_rows(word_embeddings: torch.nn.Module | None, head: RerankerHead | None, spec: HeadSpec,
                    hidden_size: int, topology: Topology) -> None:
    """Copy the two rows of the first stage's word embeddings to the last stage's head.

    Called by all ranks before a pass. One all-reduce of [2, hidden] float32 over the tensor-parallel group of the first
    stage, one broadcast over the pipeline.

    Args:
        word_embeddings: on the first stage, its vocabulary-parallel embedding; None elsewhere.
        head: on the last stage; None elsewhere.
    """
    rows = torch.zeros(2, hidden_size, device=topology.device)
    pipeline = topology.groups.pp
    if word_embeddings is not None:
        with torch.no_grad():
            for index, local in _local_rows(word_embeddings, spec):
                rows[index] = word_embeddings.weight[local].float()
        if topology.tp_size > 1:
            dist.all_reduce(rows, group=topology.groups.tp)
    if topology.pp_size > 1:
        dist.broadcast(rows, src=dist.get_global_rank(pipeline, 0), group=pipeline)
    if head is not None:
        head.tied_rows = rows.requires_grad_(True)


def return_tied_gradients(word_embeddings: torch.nn.Module | None, head: RerankerHead | None, spec: HeadSpec,
                          hidden_size: int, topology: Topology) -> None:
    """Add the gradient of the head's two rows to that of the word embeddings from which they were copied.

    Called by all ranks after a step's backward passes and before gradients are reduced over data-parallel ranks. One
    broadcast of [2, hidden] float32 over the pipeline; arguments as in `fetch_tied_rows`.
    """
    gradient = torch.zeros(2, hidden_size, device=topology.device)
    pipeline = topology.groups.pp
    if head is not None and head.tied_rows is not None and head.tied_rows.grad is not None:
        gradient = head.tied_rows.grad / topology.cp_size
    if topology.pp_size > 1:
        dist.broadcast(gradient, src=dist.get_global_rank(pipeline, topology.pp_size - 1), group=pipeline)
    if word_embeddings is not None and word_embeddings.weight.requires_grad:
        for index, local in _local_rows(word_embeddings, spec):
            word_embeddings.weight.main_grad[local] += gradient[index]


def _local_rows(word_embeddings: torch.nn.Module, spec: HeadSpec) -> list[tuple[int, int]]:
    """(0 or 1, row in this rank's share of the vocabulary) of the head's rows that this rank holds."""
    first, last = word_embeddings.vocab_start_index, word_embeddings.vocab_end_index
    return [(index, token - int(first)) for index, token in enumerate(spec.token_ids) if first <= token < last]


def initialize_head(parameters: dict[str, torch.nn.Parameter], names: Sequence[str], seed: int, std: float) -> None:
    """Initialize parameters of a new head: normal with `std`, biases 0, a norm's weight 1; the same on every rank and
    layout."""
    for name in names:
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        parameter = parameters[name]
        values = torch.zeros(parameter.shape)
        if name == "norm.weight":
            values.fill_(1.0)
        elif not name.endswith("bias"):
            values.normal_(0.0, std, generator=generator)
        with torch.no_grad():
            parameter.copy_(values)
