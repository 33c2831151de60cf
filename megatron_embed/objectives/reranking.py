"""Losses of a reranker: no query depends on another, so one pass is enough."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import RerankBatch
from megatron_embed.config.schema import RerankerConfig
from megatron_embed.losses import rerank
from megatron_embed.losses.rerank import LossSum, pad_groups
from megatron_embed.objectives.base import LossGradient, Objective, Sums
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.device_copy import copy_to_device

Loss = Callable[[Tensor, Tensor, Tensor], LossSum]
"""([queries, most] scores, labels or teacher's scores, which are real) -> the loss of these queries."""


class Reranking(Objective[RerankBatch]):
    """A loss over the scores of each query's documents, as a mean over its terms in the global batch: documents of
    `pointwise`, queries of `listwise` and `kl_distillation`, pairs with different labels of the others."""

    names = ("loss", "accuracy", "positive_score", "negative_score", "margin")
    couples_batch = False

    def __init__(self, loss: str, config: RerankerConfig, dp_group: dist.ProcessGroup) -> None:
        """`loss`: one of config.objective.RERANK_LOSSES."""
        self.loss = loss_of(loss, config)
        self.distils = loss == "kl_distillation"
        self.dp_group = dp_group

    def total(self, batch: RerankBatch) -> float:
        """Terms of all data-parallel ranks: one all-reduce of a number over them. At least 1, so that a batch without
        a term (no labels that differ) has the loss 0."""
        if not batch.num_queries:
            count = torch.zeros((), dtype=torch.float64)
        else:
            targets, valid = pad_groups(self._targets(batch), batch.group_sizes)
            count = self.loss(torch.zeros_like(targets), targets, valid).terms
        return max(1.0, float(sum_over(count.double(), self.dp_group)))

    def split(self, batch: RerankBatch) -> list[RerankBatch]:
        bounds = [0, *accumulate(batch.group_sizes)]
        parts = []
        for micro in batch.micro_batches:
            rows = micro.valid_rows.sort().values
            row_set = set(rows.tolist())
            queries = [query for query in range(batch.num_queries) if bounds[query] in row_set]
            sizes = tuple(batch.group_sizes[query] for query in queries)
            assert sum(sizes) == len(rows), "a query's documents share a micro-batch"
            teacher = batch.teacher_scores
            parts.append(RerankBatch(
                micro_batches=(micro,), num_queries=len(queries), num_documents=len(rows), group_sizes=sizes,
                labels=batch.labels[rows], teacher_scores=None if teacher is None else teacher[rows], num_truncated=0))
        return parts

    def __call__(self, embeddings: Tensor, batch: RerankBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings` are scores [documents, 1]. One all-reduce of ten numbers."""
        gradient = embeddings
        values = torch.zeros(len(self.names), 2, dtype=torch.float64, device=embeddings.device)
        if batch.num_queries:
            groups = copy_to_device(_Groups.of(batch, self._targets(batch)), embeddings.device)
            with torch.enable_grad():
                scores = embeddings[:, 0].detach().requires_grad_(True)
                padded = scores.new_zeros(groups.valid.numel()).index_copy(0, groups.positions, scores)
                padded = padded.view(groups.valid.shape)
                loss = self.loss(padded, groups.targets, groups.valid)
                (gradient,) = torch.autograd.grad(loss.total / total, scores)
            gradient = gradient[:, None]
            values = torch.cat([torch.stack([loss.total.detach(), loss.terms]).double()[None],
                                _statistics(padded.detach(), groups.labels, groups.valid)])
        return LossGradient(sums=Sums(names=self.names, values=sum_over(values, self.dp_group)), embeddings=gradient)

    def _targets(self, batch: RerankBatch) -> Tensor:
        """[documents] labels, or the teacher's scores."""
        if not self.distils:
            return batch.labels
        assert batch.teacher_scores is not None, "rows without teacher scores are refused before training"
        return batch.teacher_scores


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """Documents by query, padded to the most of a query."""

    positions: Tensor
    """[documents] int64, the documents' positions in [queries, most]."""
    valid: Tensor
    """[queries, most] bool, true at real documents."""
    targets: Tensor
    """[queries, most] of the loss."""
    labels: Tensor
    """[queries, most] float32."""

    @staticmethod
    def of(batch: RerankBatch, targets: Tensor) -> "_Groups":
        """Those of a batch, on the CPU. `targets`: [documents] of the loss."""
        padded, valid = pad_groups(targets, batch.group_sizes)
        labels = padded if targets is batch.labels else pad_groups(batch.labels, batch.group_sizes)[0]
        return _Groups(positions=valid.flatten().nonzero()[:, 0], valid=valid, targets=padded, labels=labels)


def loss_of(name: str, config: RerankerConfig) -> Loss:
    """The function that `objective.loss` names, with its settings."""
    if name == "pointwise":
        return rerank.pointwise
    if name == "listwise":
        return lambda scores, labels, valid: rerank.listwise(scores, labels, valid, config.temperature)
    if name == "margin_ranking":
        return lambda scores, labels, valid: rerank.margin_ranking(scores, labels, valid, config.margin)
    if name == "ranknet":
        return rerank.ranknet
    if name == "lambda_loss":
        return rerank.lambda_loss
    assert name == "kl_distillation", name
    return lambda scores, labels, valid: rerank.kl_distillation(scores, labels, valid, config.temperature)


def _statistics(scores: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """[4, 2] float64 sums and divisors: queries whose best-scored document has their highest label, the scores of
    documents with labels above 0 and of the others, and the distance of a query's lowest positive to its highest
    negative. The first and the last are of queries with both kinds."""
    scores = scores.double()
    positive, negative = valid & (labels > 0), valid & (labels <= 0)
    both = positive.any(dim=1) & negative.any(dim=1)
    best = torch.where(valid, scores, -torch.inf).argmax(dim=1, keepdim=True)
    highest = torch.where(valid, labels, -torch.inf).amax(dim=1, keepdim=True)
    correct = (labels.gather(1, best) == highest)[:, 0] & both
    margin = (torch.where(positive, scores, torch.inf).amin(dim=1)
              - torch.where(negative, scores, -torch.inf).amax(dim=1))
    sums = [correct.sum(), torch.where(positive, scores, 0.0).sum(), torch.where(negative, scores, 0.0).sum(),
            torch.where(both, margin, 0.0).sum()]
    counts = [both.sum(), positive.sum(), negative.sum(), both.sum()]
    return torch.stack([torch.stack(sums).double(), torch.stack(counts).double()], dim=1)
