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

from megatron_embed.batch import TextVectors, owners
from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, InfoNCESums, similarity_gradients
from megatron_embed.losses.maxsim import maxsim, maxsim_gradients, maxsim_pairs
from megatron_embed.names import JOINT_SCORES

NO_TOKEN = -1
"""Less than every id."""
LARGEST_VOCABULARY = 2**24
"""More than every id, since the outputs hold ids as float32."""


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """The weights above 0 of the tokens that texts contain, each token of a text once.

    An entry for each token of the texts, so that the host knows how many there are; those that do not count, since
    another token of the text has the same id and the larger weight, have the weight 0 and the id NO_TOKEN.
    """

    weights: Tensor
    """[tokens]."""
    ids: Tensor
    """[tokens] int64, in the vocabulary, or NO_TOKEN."""
    texts: Tensor
    """[tokens] int64, the text of each."""
    num_texts: int

    def matrix(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """([texts, columns] weights, [tokens] int64 each token's column).

        `columns`: see `columns_of`; the first one is that of tokens that have none, and 0 everywhere.
        """
        column = torch.searchsorted(columns, self.ids).clamp_(max=len(columns) - 1)
        column = torch.where(columns[column] == self.ids, column, 0)
        result = self.weights.new_zeros(self.num_texts, len(columns))
        # Several tokens of a text may have column 0, all of them 0 there.
        result[self.texts, column] = torch.where(column > 0, self.weights, 0.0)
        return result, column

    def of_matrix(self, gradient: Tensor, column: Tensor) -> Tensor:
        """[tokens] gradient of the weights, from [texts, columns] that of the matrix and each token's column."""
        return torch.where(column > 0, gradient[self.texts, column], 0.0)


def columns_of(ids: Tensor) -> Tensor:
    """[columns] int64, the columns of TokenWeights.matrix for these tokens: NO_TOKEN, then their ids, ascending.

    Args:
        ids: [any number] int64 of any order, ids of tokens or NO_TOKEN. On a GPU the host waits for their number.
    """
    columns: Tensor = torch.unique(torch.cat([ids.new_full((1,), NO_TOKEN), ids]))
    return columns


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
        counts, device = texts.device_counts, texts.vectors.device
        self._dense = ((counts.cumsum(0) - counts)[:, None] + torch.arange(dense_rows, device=device)).flatten()
        num_tokens = len(texts.vectors) - len(texts.counts) * dense_rows
        text_of = owners(counts - dense_rows, num_tokens)
        self._tokens = torch.arange(num_tokens, device=device) + (text_of + 1) * dense_rows
        self._shape = texts.vectors.shape
        rows = texts.vectors.index_select(0, self._tokens)
        self.dense = texts.vectors.index_select(0, self._dense).view(len(counts), -1)
        self.tokens = TextVectors(vectors=rows[:, :-2].contiguous(), counts=texts.counts - dense_rows,
                                  counts_on_device=counts - dense_rows)
        self.weights = self._largest(rows[:, -2], rows[:, -1].to(torch.int64), text_of)

    def _largest(self, weights: Tensor, ids: Tensor, text_of: Tensor) -> TokenWeights:
        """The largest weight of each token; among equal ones the first token's counts."""
        counts = (ids >= 0) & (weights > 0)
        key = torch.where(counts, text_of * LARGEST_VOCABULARY + ids, NO_TOKEN)
        order = torch.sort(weights, descending=True, stable=True).indices
        sort = torch.sort(key[order], stable=True)
        is_first = torch.ones_like(sort.values, dtype=torch.bool)
        is_first[1:] = sort.values[1:] != sort.values[:-1]
        is_largest = torch.empty_like(is_first).index_copy_(0, order[sort.indices], is_first) & counts
        return TokenWeights(weights=torch.where(is_largest, weights, 0.0), ids=torch.where(is_largest, ids, NO_TOKEN),
                            texts=text_of, num_texts=len(self.tokens.counts))

    def of_rows(self, dense: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """[rows, width] of the outputs, from gradients: [texts, numbers] of the dense vectors, [tokens] of the weights,
        [tokens, dim] of the tokens' vectors."""
        result = tokens.new_zeros(self._shape)
        result[self._dense] = dense.reshape(len(self._dense), -1)
        result[self._tokens, :-2] = tokens
        result[self._tokens, -2] = weights
        return result


def _query_lengths(queries: JointTexts) -> Tensor:
    """[queries, 1], what MaxSim is divided by."""
    return queries.tokens.device_counts.to(queries.dense.dtype)[:, None]


def joint_scores(queries: JointTexts, documents: JointTexts, columns: Tensor) -> Tensor:
    """[scores, queries, documents] in the order of JOINT_SCORES.

    Args:
        columns: those of `columns_of` for all tokens of the queries, or for more.
    """
    scores = queries.dense.new_zeros(len(JOINT_SCORES), len(queries.dense), len(documents.dense))
    torch.mm(queries.dense, documents.dense.T, out=scores[0])
    torch.mm(queries.weights.matrix(columns)[0], documents.weights.matrix(columns)[0].T, out=scores[1])
    maxsim(queries.tokens, documents.tokens, out=scores[2])
    scores[2] /= _query_lengths(queries)
    return scores


def joint_score_gradients(queries: JointTexts, documents: JointTexts, columns: Tensor,
                          grad_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad_scores * scores): of the outputs, [rows of the queries, width] and those of documents.

    Args:
        columns: see `joint_scores`.
        grad_scores: [scores, queries, documents].
    """
    of_dense, of_sparse, of_maxsim = grad_scores
    (query, query_column), (document, document_column) = (
        texts.weights.matrix(columns) for texts in (queries, documents))
    query_weights = queries.weights.of_matrix(of_sparse @ document, query_column)
    document_weights = documents.weights.of_matrix(of_sparse.T @ query, document_column)
    query_tokens, document_tokens = maxsim_gradients(queries.tokens, documents.tokens,
                                                     of_maxsim / _query_lengths(queries))
    return (queries.of_rows(of_dense @ documents.dense, query_weights, query_tokens),
            documents.of_rows(of_dense.T @ queries.dense, document_weights, document_tokens))


def joint_pair_scores(queries: JointTexts, documents: JointTexts, columns: Tensor, query_of: Tensor) -> Tensor:
    """[scores, documents] of each document with its own query.

    Args:
        columns: see `joint_scores`.
        query_of: [documents] int64 on the CPU, each document's query.
    """
    own = query_of.to(queries.dense.device)
    scores = queries.dense.new_zeros(len(JOINT_SCORES), len(documents.dense))
    scores[0] = (queries.dense[own] * documents.dense).sum(dim=1)
    scores[1] = (queries.weights.matrix(columns)[0][own] * documents.weights.matrix(columns)[0]).sum(dim=1)
    scores[2] = maxsim_pairs(queries.tokens, documents.tokens, query_of, own) / _query_lengths(queries)[own, 0]
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
    grad_sum = scores[0] * joint.scores[0]
    for own, weight in zip(scores[1:], joint.scores[1:], strict=True):
        grad_sum.add_(own, alpha=weight)
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
