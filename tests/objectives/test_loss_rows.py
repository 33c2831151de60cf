"""Every loss on rows alone, without a model: gradients over data-parallel ranks are those of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as functional

from megatron_embed.batch import Capacity, EmbedBatch
from tests.helpers.loss_reference import LOSSES, TEACHER, settings_of
from tests.helpers.objective_variants import config_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS

DIM = 32


def rows_of_all():
    """(queries, positives, by row its hard negative): unit vectors in float32, those of a row alike."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ROWS, DIM, generator=generator)
    parts = [functional.normalize(base + torch.randn(ROWS, DIM, generator=generator), dim=1) for _ in range(3)]
    return parts[0], parts[1], {row: parts[2][row : row + 1] for row in range(ROWS) if row % 3}


def batch_of_rank(rank, ranks, name):
    """(rows, batch) of one rank's share."""
    query, positive, negative = rows_of_all()
    if not LOSSES[name].num_negatives:
        negative = {}
    share = ROWS // ranks
    mine = range(rank * share, (rank + 1) * share)
    sizes = torch.tensor([1 + (row in negative) for row in mine])
    owner, first = torch.repeat_interleave(torch.arange(share), sizes), sizes.cumsum(0) - sizes
    documents = torch.cat([torch.cat([positive[row : row + 1], *([negative[row]] if row in negative else [])])
                           for row in mine])
    is_positive = torch.zeros(len(owner), dtype=torch.bool)
    is_positive[first] = True
    scores, nothing = LOSSES[name].scores, torch.zeros(0, dtype=torch.int64)
    batch = EmbedBatch(
        micro_batches=(), num_queries=share, num_documents=len(owner), positive_index=first, is_positive=is_positive,
        document_query=owner, query_ids=torch.zeros(share, dtype=torch.int64), positive_query=nothing,
        positive_ids=nothing, document_ids=torch.zeros(len(owner), dtype=torch.int64), num_truncated=0,
        scores=None if scores is None else scores[list(mine)],
        teacher_scores=TEACHER[2 * (owner + mine.start) + (~is_positive).long()],
        capacity=Capacity(share, 2 * share, 0), micro_capacity=Capacity(0, 0, 0))
    return torch.cat([query[list(mine)], documents]), batch


def gradients_on_rank(ranks):
    """For each loss (its value, [queries, dim] gradient, [documents, dim] gradient) of this rank's share."""
    from megatron_embed.objectives.build import build_objective

    results = {}
    for name, loss in LOSSES.items():
        rows, batch = batch_of_rank(dist.get_rank(), ranks, name)
        config = config_of(settings_of(name), {"num_negatives": loss.num_negatives}, loss.dims)
        objective = build_objective(config, dist.group.WORLD)
        result = objective(rows, batch, total=objective.total(batch))
        gradient = result.embeddings
        results[name] = (result.sums.metrics()["loss"], gradient[: batch.num_queries], gradient[batch.num_queries:])
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradients_of_rows_are_those_of_one_process(ranks):
    results = run_on_ranks(gradients_on_rank, ranks, ranks)
    for name, loss in LOSSES.items():
        query, positive, negative = rows_of_all()
        leaves = [query.double().requires_grad_(), positive.double().requires_grad_()]
        others = {row: vector.double().requires_grad_() for row, vector in negative.items() if loss.num_negatives}
        value = loss.reference(*leaves, others, *loss.leaves())
        grad_query, grad_positive, *grad_negative = torch.autograd.grad(
            value, [*leaves, *others.values()], allow_unused=True)
        of_negative = dict(zip(others, grad_negative, strict=True))
        expected = torch.cat([torch.cat([grad_positive[row : row + 1],
                                         *([of_negative[row]] if row in of_negative else [])]) for row in range(ROWS)])
        for part in results:
            assert part[name][0] == pytest.approx(value.item(), rel=2e-6), name
        # A cosine's gradient goes through the norm, a dot product's does not: compare what lies across the vectors.
        documents = torch.cat([batch_of_rank(rank, ranks, name)[0][ROWS // ranks:] for rank in range(ranks)]).double()
        for index, wanted, vectors in ((1, grad_query, query.double()), (2, expected, documents)):
            ours = torch.cat([part[name][index] for part in results]).double()
            ours, wanted = (rows - (rows * vectors).sum(dim=1, keepdim=True) * vectors for rows in (ours, wanted))
            assert wanted.norm() > 1e-3, name
            assert (ours - wanted).norm() <= 1e-5 * wanted.norm(), name
