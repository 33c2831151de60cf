"""The scores and the loss of BGE-M3 of one process by autograd, text by text; nothing of the trainer's is used."""

from collections.abc import Sequence

import torch
from torch import Tensor

Text = tuple[Tensor, Tensor, Tensor]
"""(dense vector, [tokens] weights before ReLU, [tokens, dim] vectors) of the tokens that give any."""


def largest_weights(ids: Sequence[int], weights: Tensor) -> dict[int, Tensor]:
    """The largest weight of each token, -1 left out."""
    found: dict[int, Tensor] = {}
    for token, weight in zip(ids, weights.relu(), strict=True):
        if token >= 0 and (token not in found or bool(weight > found[token])):
            found[token] = weight
    return found


def scores_of_texts(query_ids: Sequence[Sequence[int]], queries: Sequence[Text],
                    document_ids: Sequence[Sequence[int]], documents: Sequence[Text]) -> list[Tensor]:
    """[queries, documents] each: dense, sparse and multi-vector."""
    rows: list[list[list[Tensor]]] = [[], [], []]
    for q_ids, (q_dense, q_weights, q_vectors) in zip(query_ids, queries, strict=True):
        of_query = largest_weights(q_ids, q_weights)
        for row in rows:
            row.append([])
        for d_ids, (d_dense, d_weights, d_vectors) in zip(document_ids, documents, strict=True):
            of_document = largest_weights(d_ids, d_weights)
            shared = [of_query[token] * of_document[token] for token in of_query if token in of_document]
            rows[0][-1].append(q_dense @ d_dense)
            rows[1][-1].append(torch.stack(shared).sum() if shared else q_dense.new_zeros(()))
            rows[2][-1].append((q_vectors @ d_vectors.T).max(dim=1).values.mean())
    return [torch.stack([torch.stack(row) for row in score]) for score in rows]


def joint_loss(logits: Sequence[Tensor], positive: Tensor, score_weights: Sequence[float],
               loss_weights: Sequence[float], *, distils: bool) -> Tensor:
    """[queries]: Chen et al. 2024, section 3.3."""
    total = sum(weight * score.nan_to_num(neginf=0.0) for weight, score in zip(score_weights, logits, strict=True))
    total = total.masked_fill(logits[0] == -torch.inf, -torch.inf)

    def contrast(score: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(score, positive, reduction="none")

    loss = (contrast(total) + sum(weight * contrast(score) for weight, score in zip(
        loss_weights, logits, strict=True))) / 4
    if not distils:
        return loss
    target = total.detach().softmax(dim=1)
    taught = [-(target * score.log_softmax(dim=1).masked_fill(score == -torch.inf, 0.0)).sum(dim=1)
              for score in logits]
    return (loss + sum(weight * own for weight, own in zip(loss_weights, taught, strict=True)) / 3) / 2
