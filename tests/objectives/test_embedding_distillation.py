"""Distillation of vectors: Sentence Transformers' EmbedDistillLoss and MSELoss, in two micro-batches on two ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MSELoss

from tests.helpers.objective_variants import DIM, config_of, variant_batch
from tests.helpers.other_models import hashed_vectors
from tests.helpers.ranks import run_on_ranks

TEACHER_DIM = 5
DISTANCES = ("cosine", "mse", "l2")
PLAIN = ({}, {}, ())
LEARNING_RATE = 3e-3


def teacher_of(dim):
    return hashed_vectors(dim, 3), hashed_vectors(dim, 4)


def parts_of(batch, embeddings):
    """The batch in two parts, as micro-batches are."""
    from megatron_embed.objectives.splitting import part_of

    for first, last in ((0, 1), (1, batch.num_queries)):
        queries = torch.arange(first, last)
        documents = torch.isin(batch.document_query, queries).nonzero()[:, 0]
        rows = torch.cat([queries, documents + batch.num_queries])
        yield part_of(batch, queries, documents, micro_batches=(), capacity=batch.capacity), rows


def distilled_on_ranks():
    """Per distance, without and with a projection: (loss, gradient, the projection before and after a step)."""
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.objectives.fixed_vectors import FixedVectors
    from megatron_embed.objectives.learned_projection import LearnedProjection

    embeddings, batch = variant_batch(dist.get_rank(), PLAIN)
    own, results = dist.new_group([dist.get_rank()], use_local_synchronization=True), []
    for distance in DISTANCES:
        for projected in (False, True):
            config = config_of({"loss": "embedding_distillation", "teacher_model": "teacher",
                                "teacher_distance": distance, "teacher_projection": projected})
            query, document = teacher_of(TEACHER_DIM if projected else DIM)
            projection = LearnedProjection(config, DIM, TEACHER_DIM, dp_group=dist.group.WORLD, pp_group=own,
                                           device=torch.device("cpu")) if projected else None
            objective = build_objective(config, dist.group.WORLD, None, FixedVectors(
                teacher_query=query, teacher_document=document, projection=projection))
            before = None if projection is None else projection.parameters.clone()
            for _ in range(2):  # what an evaluation leaves behind is forgotten
                total, gradient, loss = objective.total(batch), torch.zeros_like(embeddings), 0.0
                for part, rows in parts_of(batch, embeddings):
                    result = objective(embeddings[rows], part, total=total)
                    gradient[rows] = result.embeddings
                    loss += float(result.sums.values[0, 0]) / total
            if projection is not None:
                projection.receive(projection.complete_gradient())
                projection.step({}, LEARNING_RATE)
            results.append((loss, gradient, before, None if projection is None else projection.parameters))
    return results


def reference(distance, projected, weights):
    """(loss, gradients of each rank's rows, gradient of the projection) by Sentence Transformers on all rows."""
    parts = [variant_batch(rank, PLAIN) for rank in range(2)]
    query, document = teacher_of(TEACHER_DIM if projected else DIM)
    teacher = torch.cat([torch.cat([query(batch.query_ids), document(batch.document_ids)]) for _, batch in parts])
    student = torch.cat([embeddings for embeddings, _ in parts]).double().requires_grad_()
    model = SimpleNamespace(get_embedding_dimension=lambda: DIM, device="cpu")
    loss = MSELoss(None) if distance == "mse" and not projected else EmbedDistillLoss(
        model, distance_metric=distance, projection_dim=TEACHER_DIM if projected else None)
    leaves = [student]
    if projected:
        loss.projection.double()
        with torch.no_grad():
            loss.projection.weight.copy_(weights[:, :-1])
            loss.projection.bias.copy_(weights[:, -1])
        leaves += [loss.projection.weight, loss.projection.bias]
    value = loss.compute_loss_from_embeddings([student], [teacher.double()])
    of_student, *of_projection = torch.autograd.grad(value, leaves)
    return (float(value.detach()), of_student.split([len(embeddings) for embeddings, _ in parts]),
            torch.cat([of_projection[0], of_projection[1][:, None]], dim=1) if projected else None)


def test_value_and_gradients_equal_sentence_transformers():
    results = run_on_ranks(distilled_on_ranks, 2)
    for index, (distance, projected) in enumerate((distance, projected) for distance in DISTANCES
                                                  for projected in (False, True)):
        before = results[0][index][2]
        value, gradients, of_projection = reference(distance, projected, before)
        assert sum(own[index][0] for own in results) == pytest.approx(2 * value, rel=1e-6), distance
        for own, wanted in zip(results, gradients, strict=True):
            assert wanted.norm() > 1e-3
            assert (own[index][1].double() - wanted).norm() <= 1e-5 * wanted.norm()
        if projected:
            weights = torch.nn.Parameter(before.clone())
            weights.grad = of_projection.float()
            torch.optim.Adam([weights], lr=LEARNING_RATE).step()
            for own in results:
                torch.testing.assert_close(own[index][3], weights.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(results[0][index][3], results[1][index][3])


def test_a_projection_goes_on_where_it_was_saved():
    assert torch.equal(*run_on_ranks(saved_projection, 1)[0])


def saved_projection():
    """Parameters after three steps, and after two, a save and one more."""
    from megatron_embed.objectives.learned_projection import LearnedProjection

    def make():
        return LearnedProjection(config_of({}), DIM, TEACHER_DIM, dp_group=dist.group.WORLD, pp_group=dist.group.WORLD,
                                 device=torch.device("cpu"))

    gradients = [torch.randn(TEACHER_DIM, DIM + 1, generator=torch.Generator().manual_seed(step)) for step in range(3)]

    def steps(projection, some):
        for gradient in some:
            projection.forget_gradient()
            projection.add_gradient(gradient)
            projection.receive(projection.complete_gradient())
            projection.step({}, LEARNING_RATE)
        return projection

    straight, first, second = steps(make(), gradients), steps(make(), gradients[:2]), make()
    second.load_state_dict(first.state_dict())
    return straight.parameters, steps(second, gradients[2:]).parameters
