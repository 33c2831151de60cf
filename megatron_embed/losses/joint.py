"""The three scores of BGE-M3 (Chen et al. 2024, arXiv:2402.03216) and their loss with self-distillation, with the
gradients in closed form; no communication.

dense: the dot product of two texts' vectors. sparse: the sum, over the tokens that both texts contain, of the product
of their weights, of which a token that a text contains several times has the largest. multi_vector: MaxSim divided by
the number of the query's vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_embed.batch import TextVectors
from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, InfoNCESums, similarity_gradients
from megatron_embed.losses.maxsim import maxsim, maxsim_gradients, maxsim_pairs
from megatron_embed.names import JOINT_SCORES


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """The weights above 0 of the tokens that texts contain, each token of a text once."""

    weights: Tensor
    """[entries]."""
    ids: Tensor
    """[entries] int64, in the vocabulary."""
    texts: Tensor
    """[entries] int64, the text of each."""
    rows: Tensor
    """[entries] int64, the row of the texts' outputs that each comes from."""
    num_texts: int

    def matrix(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([texts, columns] weights, [entries] int64 each entry's column, [entries] bool whether it has one).

        `columns`: [columns] int64, ids of tokens, ascending, at least one.
        """
        column = torch.searchsorted(columns, self.ids).clamp_(max=len(columns) - 1)
        present = columns[column] == self.ids
        result = self.weights.new_zeros(self.num_texts, len(columns))
        result[self.texts[present], column[present]] = self.weights[present]
        return result, column, present


class JointTexts:
    """What a joint model gives for some texts, taken apart.

    The first rows of a text hold its dense vector, one behind the other, filled up with zeros. Each further row belongs
    to a token: its vector, its weight, and its id, -1 if it has no weight.

    Attributes:
        dense: [texts, numbers of these rows].
        tokens: the tokens' vectors.
        weights: the largest weight of each token of a text.
    """

    def __init__(self, texts: TextVectors, dense_rows: int) -> None:
        """`dense_rows`: rows of a text before those of its tokens."""
        counts, device = texts.counts, texts.vectors.device
        of_dense = ((counts.cumsum(0) - counts)[:, None] + torch.arange(dense_rows)).flatten()
        is_token = torch.ones(len(texts.vectors), dtype=torch.bool).index_fill_(0, of_dense, False)
        self._dense = of_dense.to(device, non_blocking=True)
        self._tokens = is_token.nonzero()[:, 0].to(device, non_blocking=True)
        self._shape = texts.vectors.shape
        rows = texts.vectors.index_select(0, self._tokens)
        self.dense = texts.vectors.index_select(0, self._dense).view(len(counts), -1)
        self.tokens = TextVectors(vectors=rows[:, :-2].contiguous(), counts=counts - dense_rows)
        self.weights = self._largest(rows[:, -2], rows[:, -1].to(torch.int64))

    def _largest(self, weights: Tensor, ids: Tensor) -> TokenWeights:
        """The largest weight of each token; among equal ones the first token's counts."""
        text_of = self.tokens.text_of
        places = ((ids >= 0) & (weights > 0)).nonzero()[:, 0]
        places = places[torch.sort(weights[places], descending=True, stable=True).indices]
        token = text_of[places] * (int(ids.max()) + 1 if len(ids) else 1) + ids[places]
        sort = torch.sort(token, stable=True)
        is_first = torch.ones_like(sort.values, dtype=torch.bool)
        is_first[1:] = sort.values[1:] != sort.values[:-1]
        places = places[sort.indices[is_first]]
        return TokenWeights(weights=weights[places], ids=ids[places], texts=text_of[places],
                            rows=self._tokens[places], num_texts=len(self.tokens.counts))

    def of_rows(self, dense: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """[rows, width] of the outputs, from gradients: [texts, numbers] of the dense vectors, [entries] of the
        weights, [tokens, dim] of the tokens' vectors."""
        result = tokens.new_zeros(self._shape)
        result[self._dense] = dense.reshape(len(self._dense), -1)
        result[self._tokens, :-2] = tokens
        result[self.weights.rows, -2] = weights
        return result


def _shared_tokens(queries: TokenWeights, documents: TokenWeights) -> Tensor:
    """[tokens] int64, ascending: the ids that some query and some document have."""
    ids: Tensor = torch.unique_consecutive(queries.ids.sort().values)
    return ids[torch.isin(ids, documents.ids)]


def _query_lengths(queries: JointTexts) -> Tensor:
    """[queries, 1], what MaxSim is divided by."""
    return queries.tokens.counts.to(queries.dense.device, queries.dense.dtype)[:, None]


def joint_scores(queries: JointTexts, documents: JointTexts) -> Tensor:
    """[scores, queries, documents] in the order of JOINT_SCORES."""
    scores = queries.dense.new_zeros(len(JOINT_SCORES), len(queries.dense), len(documents.dense))
    torch.mm(queries.dense, documents.dense.T, out=scores[0])
    shared = _shared_tokens(queries.weights, documents.weights)
    if len(shared):
        torch.mm(queries.weights.matrix(shared)[0], documents.weights.matrix(shared)[0].T, out=scores[1])
    maxsim(queries.tokens, documents.tokens, out=scores[2])
    scores[2] /= _query_lengths(queries)
    return scores


def joint_score_gradients(queries: JointTexts, documents: JointTexts, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad_scores * scores): of the outputs, [rows of the queries, width] and those of documents.

    Args:
        grad_scores: [scores, queries, documents].
    """
    of_dense, of_sparse, of_maxsim = grad_scores
    shared = _shared_tokens(queries.weights, documents.weights)
    weights = [torch.zeros_like(texts.weights.weights) for texts in (queries, documents)]
    if len(shared):
        (query, *of_query), (document, *of_document) = (texts.weights.matrix(shared) for texts in (queries, documents))
        for own, texts, gradient, (column, present) in (
                (weights[0], queries.weights, of_sparse @ document, of_query),
                (weights[1], documents.weights, of_sparse.T @ query, of_document)):
            own[present] = gradient[texts.texts[present], column[present]]
    query_tokens, document_tokens = maxsim_gradients(queries.tokens, documents.tokens,
                                                     of_maxsim / _query_lengths(queries))
    return (queries.of_rows(of_dense @ documents.dense, weights[0], query_tokens),
            documents.of_rows(of_dense.T @ queries.dense, weights[1], document_tokens))


def joint_pair_scores(queries: JointTexts, documents: JointTexts, query_of: Tensor) -> Tensor:
    """[scores, documents] of each document with its own query.

    Args:
        query_of: [documents] int64 on the CPU, each document's query.
    """
    own = query_of.to(queries.dense.device)
    scores = queries.dense.new_zeros(len(JOINT_SCORES), len(documents.dense))
    scores[0] = (queries.dense[own] * documents.dense).sum(dim=1)
    shared = _shared_tokens(queries.weights, documents.weights)
    if len(shared):
        scores[1] = (queries.weights.matrix(shared)[0][own] * documents.weights.matrix(shared)[0]).sum(dim=1)
    scores[2] = maxsim_pairs(queries.tokens, documents.tokens, query_of) / _query_lengths(queries)[own, 0]
    return scores


@dataclass(frozen=True, kw_only=True)
class JointWeights:
    """How the three scores make up a loss, in the order of JOINT_SCORES."""

    scores: Sequence[float]
    """Weight of each score in their sum."""
    losses: Sequence[float]
    """Weight of each score's own loss."""
    distils: bool
    """Whether each score also learns from the sum's softmax."""


@dataclass(frozen=True, kw_only=True)
class JointSums:
    """Sums over the rows of one call."""

    of_sum: InfoNCESums
    """Sums by the weighted sum of the scores, but with the whole loss."""
    losses: Tensor
    """[scores + 2] float64: InfoNCE of each score and of the sum, and the mean of the distillations' cross-entropies
    by the weights of the losses (0 without)."""


def joint_loss_gradients(scores: Tensor, candidates: Candidates, settings: ContrastiveSettings, joint: JointWeights, *,
                         first: int, total: float, weights: Tensor | None = None) -> JointSums:
    """The loss of BGE-M3 and its gradient, from known scores.

    L = (InfoNCE(sum) + sum_k lambda_k InfoNCE(k)) / 4. With self-distillation the loss is (L + L') / 2, where L' is the
    sum over k of lambda_k times the cross-entropy of score k's softmax to that of the sum, which is a constant there,
    / 3. All by the same columns and temperature. Cross-entropy and its gradient follow from those of InfoNCE: with y
    one-hot, p - q = (p - y) - (q - y).

    Args:
        scores: [scores, rows, candidates], of rows `first`, `first + 1`, ... of `candidates`; becomes the gradient of
            sum(weight * loss of a row) / total with respect to it.
        candidates: the columns; their vectors are not used.
        settings: without a margin, hardness or bias.
        total: rows of the whole batch, over which the loss is a mean.
        weights: [rows], of each row's loss; None: 1.
    """
    count = len(scores)
    grad_sum = torch.tensordot(scores.new_tensor(joint.scores), scores, dims=1)
    of_sum = similarity_gradients(grad_sum, candidates, settings, first=first, total=total, weights=weights)
    losses, distilled = [], torch.zeros_like(of_sum.loss)
    for own, weight, of_loss in zip(scores, joint.scores, joint.losses, strict=True):
        product = (grad_sum * own).sum(dtype=torch.float64)
        sums = similarity_gradients(own, candidates, settings, first=first, total=total, weights=weights)
        losses.append(sums.loss)
        share = of_loss / (count + 1)
        if joint.distils:
            distilled += of_loss / count * (sums.loss - total * product)
            own *= 0.5 * (share + of_loss / count)
            own += grad_sum * (0.5 * (weight / (count + 1) - of_loss / count))
        else:
            own *= share
            own += grad_sum * (weight / (count + 1))
    loss = of_sum.loss + sum(weight * own for weight, own in zip(joint.losses, losses, strict=True))
    loss = loss / (count + 1)
    if joint.distils:
        loss = 0.5 * (loss + distilled)
    return JointSums(of_sum=of_sum._replace(loss=loss), losses=torch.stack([*losses, of_sum.loss, distilled]))
