"""Losses of a reranker over the scores of one query's documents at a time, with graded labels.

Every function takes scores and labels padded to the longest group, and a mask of the real documents:

    scores: [queries, most] of any float dtype, computed in at least float32.
    labels: [queries, most], larger is better; values in the padding do not matter.
    valid: [queries, most] bool, true at real documents; a group may have one document.

It returns a LossSum, so that micro-batches and ranks can add theirs: the loss of a batch is the sum of all totals over
the sum of all numbers of terms. These depend on labels alone, never on scores. No communication.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

NDCG_WEIGHT = 10.0
"""mu of NDCG-Loss2++ (Wang et al. 2018, section 4.2), Sentence Transformers' default."""
_SMALLEST_IDEAL = 1e-10
"""Lower bound of an ideal DCG that is divided by; a group without gain has no pairs anyway."""


class LossSum(NamedTuple):
    """A loss as numerator and denominator."""

    total: Tensor
    """Scalar, the sum of all terms; the one to differentiate."""
    terms: Tensor
    """Scalar of the same dtype, how many terms there are; may be 0."""

    @property
    def mean(self) -> Tensor:
        """The loss of these rows; 0 where there are no terms."""
        return self.total / self.terms.clamp(min=1)


def pad_groups(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Groups that lie one after the other as rows of one tensor.

    Args:
        values: [documents].
        sizes: documents of each group, each >= 1; they sum up to `documents`.
    Returns:
        ([groups, most], [groups, most] bool, true at the values that were given); 0 elsewhere, with gradient.
    """
    most, device = max(sizes), values.device
    valid = torch.arange(most, device=device) < torch.tensor(sizes, device=device)[:, None]
    padded = values.new_zeros(len(sizes), most).masked_scatter(valid, values)
    return padded, valid


def pointwise(scores: Tensor, labels: Tensor, valid: Tensor) -> LossSum:
    """Binary cross entropy of every document by itself; labels are probabilities of relevance, from 0 to 1.

    With a yes/no head (score = difference of the two logits) it is the cross entropy of the answers yes and no.
    """
    scores = _at_least_float32(scores)
    losses = functional.binary_cross_entropy_with_logits(scores, labels.to(scores), reduction="none")
    return LossSum(torch.where(valid, losses, 0.0).sum(), valid.sum().to(scores))


def listwise(scores: Tensor, labels: Tensor, valid: Tensor, temperature: float = 1.0) -> LossSum:
    """Softmax cross entropy over a group, against its labels scaled to sum 1 (ListNet's top-one loss, Cao et al. 2007,
    with labels in place of their exponentials; Bruch et al. 2019, doi:10.1145/3341981.3344221).

    With one positive it is the usual cross entropy. A group without a label above 0 adds no term.

    Args:
        labels: >= 0.
        temperature: divides the scores.
    """
    scores = _at_least_float32(scores)
    gains = torch.where(valid, labels.to(scores), 0.0)
    totals = gains.sum(dim=1, keepdim=True)
    some = totals > 0
    log_probabilities = _log_softmax(scores / temperature, valid)
    losses = -(gains / torch.where(some, totals, 1.0) * log_probabilities).sum(dim=1)
    return LossSum(losses.sum(), some.sum().to(scores))


def margin_ranking(scores: Tensor, labels: Tensor, valid: Tensor, margin: float = 1.0) -> LossSum:
    """Hinge max(0, margin - (better - worse)) of every pair of documents of a query with different labels
    (Herbrich et al. 2000)."""
    scores = _at_least_float32(scores)
    pairs = _better(labels, valid)
    hinges = functional.relu(margin - _differences(scores, valid))
    return LossSum(torch.where(pairs, hinges, 0.0).sum(), pairs.sum().to(scores))


def ranknet(scores: Tensor, labels: Tensor, valid: Tensor) -> LossSum:
    """log2(1 + exp(worse - better)) of every pair of documents of a query with different labels (Burges et al. 2005,
    doi:10.1145/1102351.1102363); the base 2 is Sentence Transformers'."""
    scores = _at_least_float32(scores)
    pairs = _better(labels, valid)
    losses = -functional.logsigmoid(_differences(scores, valid)) / math.log(2)
    return LossSum(torch.where(pairs, losses, 0.0).sum(), pairs.sum().to(scores))


def lambda_loss(scores: Tensor, labels: Tensor, valid: Tensor, weight: float = NDCG_WEIGHT) -> LossSum:
    """RankNet's pairs weighted by the change of nDCG if they are exchanged: NDCG-Loss2++ (Wang et al. 2018, "The
    LambdaLoss Framework", doi:10.1145/3269206.3271784), as in Sentence Transformers.

    The weight of a pair at ranks i and j of the model's own order, with gains G = (2^label - 1) / ideal DCG and
    discounts D(r) = log2(1 + r), is |G_i - G_j| * (weight * |1/D(|i-j|) - 1/D(|i-j|+1)| + |1/D(i) - 1/D(j)|). The
    order is taken as given, so no gradient flows through the weights.
    """
    scores = _at_least_float32(scores)
    filled = torch.where(valid, scores, -math.inf)
    order = filled.detach().sort(dim=1, descending=True, stable=True).indices
    scores, valid = scores.gather(1, order), valid.gather(1, order)
    labels = labels.to(scores).gather(1, order)
    gains = torch.where(valid, 2.0 ** labels.clamp(min=0) - 1, 0.0)
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    inverse = 1.0 / torch.log2(1.0 + ranks)
    ideal = (gains.sort(dim=1, descending=True).values * inverse).sum(dim=1).clamp(min=_SMALLEST_IDEAL)
    gains = gains / ideal[:, None]
    apart = (ranks[:, None] - ranks[None, :]).abs().clamp(min=1)  # the diagonal holds no pairs
    by_distance = (1.0 / torch.log2(1.0 + apart) - 1.0 / torch.log2(2.0 + apart)).abs()
    by_rank = (inverse[:, None] - inverse[None, :]).abs()
    weights = (gains[:, :, None] - gains[:, None, :]).abs() * (weight * by_distance + by_rank)
    pairs = _better(labels, valid)
    losses = -functional.logsigmoid(_differences(scores, valid)) / math.log(2) * weights
    return LossSum(torch.where(pairs, losses, 0.0).sum(), pairs.sum().to(scores))


def kl_distillation(scores: Tensor, teacher_scores: Tensor, valid: Tensor, temperature: float = 1.0) -> LossSum:
    """KL divergence from a teacher's distribution over a group to the model's, times temperature^2 (Hinton et al. 2015,
    arXiv:1503.02531).

    Args:
        teacher_scores: [queries, most], logits of the same meaning as the scores; in place of labels.
        temperature: divides both.
    """
    scores = _at_least_float32(scores)
    teacher = _log_softmax(teacher_scores.to(scores) / temperature, valid)
    student = _log_softmax(scores / temperature, valid)
    losses = torch.where(valid, teacher.exp() * (teacher - student), 0.0)
    return LossSum(losses.sum() * temperature ** 2, scores.new_full((), len(scores)))


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _log_softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """Log-softmax over the valid documents of each row; 0 in the padding, so that a product with 0 is 0 and not NaN."""
    return torch.where(valid, torch.log_softmax(torch.where(valid, scores, -math.inf), dim=1), 0.0)


def _better(labels: Tensor, valid: Tensor) -> Tensor:
    """[queries, most, most] bool, true where the first document's label is above the second's."""
    return (labels[:, :, None] > labels[:, None, :]) & valid[:, :, None] & valid[:, None, :]


def _differences(scores: Tensor, valid: Tensor) -> Tensor:
    """[queries, most, most], the first document's score minus the second's."""
    scores = torch.where(valid, scores, 0.0)
    return scores[:, :, None] - scores[:, None, :]
