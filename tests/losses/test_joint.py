"""The loss of BGE-M3 in closed form against autograd over whole matrices."""

import pytest
import torch

from megatron_embed.batch import TextVectors
from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings
from megatron_embed.losses.joint import (
    JointTexts,
    JointWeights,
    columns_of,
    joint_loss_gradients,
    joint_score_gradients,
    joint_scores,
)
from tests.helpers.joint_reference import joint_loss, scores_of_texts

DIM, HIDDEN = 5, 16
DENSE_ROWS = 3
QUERIES = ((2, 3), (1, -1, 1), (3, 4, 3))
"""Ids of the tokens of each query; -1: one without a weight."""
DOCUMENTS = ((3, 2, -1, 3), (4,), (1, 9, 9, 2, 3), (8, 7), (3, 3, 3, 1))


def texts(ids, seed):
    """([vectors, dim + 2] outputs, counts, leaves (dense, weights before ReLU, vectors) of each text)."""
    generator = torch.Generator().manual_seed(seed)
    rows, leaves = [], []
    for own in ids:
        dense = torch.randn(HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(len(own), generator=generator, dtype=torch.float64).add(0.8).requires_grad_()
        vectors = torch.randn(len(own), DIM, generator=generator, dtype=torch.float64, requires_grad=True)
        leaves.append((dense, weights, vectors))
        padded = torch.cat([dense.detach(), dense.new_zeros(DENSE_ROWS * (DIM + 2) - HIDDEN)])
        tokens = torch.cat([vectors.detach(), weights.detach().relu()[:, None], torch.tensor(own)[:, None]], dim=1)
        rows += [padded.view(DENSE_ROWS, DIM + 2), tokens]
    counts = torch.tensor([len(own) + DENSE_ROWS for own in ids])
    return TextVectors(vectors=torch.cat(rows), counts=counts), leaves


def as_outputs(gradients, leaves):
    """Gradients of the leaves in the rows of the outputs; those of weights times ReLU's slope."""
    given, rows = iter(gradients), []
    for _, weights, _ in leaves:
        dense, of_weights, vectors = next(given), next(given), next(given)
        rows.append(torch.cat([dense, dense.new_zeros(DENSE_ROWS * (DIM + 2) - HIDDEN)]).view(DENSE_ROWS, DIM + 2))
        rows.append(torch.cat([vectors, of_weights[:, None], torch.zeros(len(weights), 1)], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("distils", [True, False], ids=["distilled", "plain"])
def test_loss_and_gradients_equal_autograd(distils):
    joint = JointWeights(scores=(1.0, 0.3, 0.7), losses=(0.9, 0.1, 1.0), distils=distils)
    (queries, of_query), (documents, of_document) = texts(QUERIES, 1), texts(DOCUMENTS, 2)
    positive, temperature = torch.tensor([1, 3, 0]), 0.4
    masked = torch.zeros(len(QUERIES), len(DOCUMENTS), dtype=torch.bool)
    masked[0, 4] = masked[2, 3] = True
    row_weights = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)

    reference = scores_of_texts(QUERIES, of_query, DOCUMENTS, of_document)
    losses = joint_loss([score.masked_fill(masked, -torch.inf) / temperature for score in reference], positive,
                        joint.scores, joint.losses, distils=distils)
    expected = (losses * row_weights).sum() / 2.0
    leaves = [leaf for text in (*of_query, *of_document) for leaf in text]
    gradients = torch.autograd.grad(expected, leaves, materialize_grads=True)
    split = 3 * len(QUERIES)

    first, second = JointTexts(queries, DENSE_ROWS), JointTexts(documents, DENSE_ROWS)
    columns = columns_of(first.weights.ids)
    scores = joint_scores(first, second, columns)
    torch.testing.assert_close(scores, torch.stack(reference).detach(), rtol=1e-12, atol=1e-12)
    assert bool((scores != 0).any(dim=2).all()), "a score without a part of it proves nothing"
    result = joint_loss_gradients(
        scores, Candidates(document=torch.empty(0), positive_index=positive, excluded=lambda a, b: masked[a:b]),
        ContrastiveSettings(temperature=temperature), joint, first=0, total=2.0, weights=row_weights)
    assert float(result.of_sum.loss) / 2.0 == pytest.approx(float(expected.detach()), rel=1e-12)
    ours = joint_score_gradients(first, second, columns, scores)
    for own, wanted, text in zip(ours, (gradients[:split], gradients[split:]), (of_query, of_document), strict=True):
        wanted_rows = as_outputs(wanted, text)
        assert wanted_rows.norm() > 0.1
        torch.testing.assert_close(own, wanted_rows, rtol=1e-9, atol=1e-12)
