"""Late interaction's loss on two ranks, in many blocks and rounds, against one process by autograd."""

import pytest
import torch

from tests.helpers.ranks import run_on_ranks

DIM, TEMPERATURE = 8, 0.5
GROUPS = ((1, 2), (2, 0), (1, 0), (2, 1), (1, 3), (1, 1), (2, 2), (1, 0))
"""(positives, hard negatives) of each query; the first half is on the first rank."""
COUNTS = (3, 2, 4, 1, 3, 5, 2, 4)
"""Vectors of each query."""


def global_vectors():
    """([vectors per query], [per query: vectors per document])."""
    generator = torch.Generator().manual_seed(4)

    def unit(count):
        vectors = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(vectors, dim=1)

    return [unit(count) for count in COUNTS], [
        [unit(2 + (query + 3 * index) % 5) for index in range(sum(group))] for query, group in enumerate(GROUPS)]


def batch_of(first, last):
    """(embeddings, batch) of queries `first` to `last - 1`."""
    from megatron_embed.batch import Capacity, EmbedBatch

    queries, documents = global_vectors()
    groups, own = GROUPS[first:last], [document for group in documents[first:last] for document in group]
    texts = [*queries[first:last], *own]
    is_positive = torch.tensor([index < positives for positives, negatives in groups
                                for index in range(positives + negatives)])
    document_query = torch.tensor([query for query, group in enumerate(groups) for _ in range(sum(group))])
    ids = torch.arange(len(texts)) + 100 * first
    sizes = torch.tensor([sum(group) for group in groups])
    batch = EmbedBatch(
        micro_batches=(), num_truncated=0, num_queries=len(groups), num_documents=len(own),
        positive_index=sizes.cumsum(0) - sizes, is_positive=is_positive, document_query=document_query,
        query_ids=ids[: len(groups)], positive_query=document_query[is_positive], document_ids=ids[len(groups) :],
        positive_ids=ids[len(groups) :][is_positive], vector_counts=torch.tensor([len(text) for text in texts]),
        capacity=Capacity(4, 20, 8), micro_capacity=Capacity(4, 20, 8))
    return torch.cat(texts), batch


def objective_on_ranks(tile):
    """Called by all ranks: (metrics, gradient of this rank's vectors)."""
    import torch.distributed as dist

    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.losses import maxsim
    from megatron_embed.objectives import document_tiles, multi_vector

    config = config_of_overrides(["model.path=m", "embedding.head=multi_vector", f"objective.temperature={TEMPERATURE}",
                                  "objective.learnable_temperature=true", "data.num_positives=2",
                                  "data.num_negatives=3"])
    embeddings, batch = batch_of(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    before = maxsim.MAXSIM_TILE_ELEMENTS
    try:
        for module in (maxsim, document_tiles, multi_vector):
            module.MAXSIM_TILE_ELEMENTS = tile
        result = multi_vector.MultiVectorContrastive(config, dist.group.WORLD)(embeddings, batch, total=8.0)
    finally:
        for module in (maxsim, document_tiles, multi_vector):
            module.MAXSIM_TILE_ELEMENTS = before
    return result.sums.metrics(), result.embeddings


def reference():
    """(loss, gradient of log(1 / temperature), gradients of all vectors: queries and documents of each rank)."""
    queries, documents = global_vectors()
    leaves = [text.requires_grad_() for text in [*queries, *(text for group in documents for text in group)]]
    columns = [(query, index, text) for query, group in enumerate(documents) for index, text in enumerate(group)]
    log_scale = torch.tensor(TEMPERATURE, dtype=torch.float64).log().neg().requires_grad_()
    losses = []
    for query, (positives, _) in enumerate(GROUPS):
        scores = torch.stack([(queries[query] @ text.T).max(dim=1).values.sum() for _, _, text in columns])
        logits = scores * log_scale.exp()
        for positive in range(positives):
            kept = [column for column, (owner, index, _) in enumerate(columns)
                    if owner != query or index == positive or index >= positives]
            target = next(column for column, (owner, index, _) in enumerate(columns)
                          if (owner, index) == (query, positive))
            losses.append((logits[kept].logsumexp(0) - logits[target]) / positives)
    loss = torch.stack(losses).sum() / len(GROUPS)
    scale_gradient, *gradients = torch.autograd.grad(loss, [log_scale, *leaves])
    of_query, rest = gradients[: len(GROUPS)], iter(gradients[len(GROUPS) :])
    of_documents = [[next(rest) for _ in group] for group in documents]
    halves = [torch.cat([*of_query[part], *(text for group in of_documents[part] for text in group)])
              for part in (slice(0, 4), slice(4, 8))]
    return float(loss.detach()), float(scale_gradient), halves


@pytest.mark.parametrize("tile", [1 << 22, 64], ids=["one tile", "many blocks and rounds"])
def test_loss_and_gradients_equal_one_process(tile):
    loss, scale_gradient, halves = reference()
    for (metrics, gradient), expected in zip(run_on_ranks(objective_on_ranks, 2, tile), halves, strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
        assert metrics["log_scale_gradient"] == pytest.approx(scale_gradient, rel=1e-9)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def teacher_scores(first, last):
    generator = torch.Generator().manual_seed(9)
    scores = [torch.randn(sum(group), generator=generator, dtype=torch.float64) for group in GROUPS]
    return torch.cat(scores[first:last])


def distillation_on_ranks(loss):
    """Called by all ranks: (metrics, gradient of this rank's vectors), the batch in two parts as micro-batches are."""
    import dataclasses

    import torch.distributed as dist

    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.objectives.multi_vector import MultiVectorDistillation
    from megatron_embed.objectives.splitting import part_of

    config = config_of_overrides(["model.path=m", "embedding.head=multi_vector", f"objective.loss={loss}",
                                  "data.num_negatives=3", *(["objective.temperature=0.5"] if "kl" in loss else [])])
    first = 4 * dist.get_rank()
    embeddings, batch = batch_of(first, first + 4)
    batch = dataclasses.replace(batch, teacher_scores=teacher_scores(first, first + 4))
    objective = MultiVectorDistillation(config, dist.group.WORLD)
    total, gradient, loss_sum = objective.total(batch), torch.zeros_like(embeddings), 0.0
    for queries in (torch.tensor([0, 2]), torch.tensor([1, 3])):
        documents = torch.isin(batch.document_query, queries).nonzero()[:, 0]
        part = part_of(batch, queries, documents, micro_batches=(), capacity=batch.capacity)
        rows = batch.outputs_of(torch.cat([queries, documents + batch.num_queries]))
        result = objective(embeddings[rows], part, total=total)
        gradient[rows] = result.embeddings
        loss_sum += result.sums.values[0, 0]
    return float(loss_sum) / total, gradient


def distillation_reference(loss):
    """(loss, gradients of each rank's vectors)."""
    queries, documents = global_vectors()
    leaves = [text.requires_grad_() for text in [*queries, *(text for group in documents for text in group)]]
    terms = []
    for query, group in enumerate(documents):
        scores = torch.stack([(queries[query] @ text.T).max(dim=1).values.sum() for text in group])
        teacher = teacher_scores(query, query + 1)
        if loss == "margin_mse":
            # Every document but the first positive is compared with, unless it is a positive.
            positives = GROUPS[query][0]
            terms += [((scores[0] - scores[index]) - (teacher[0] - teacher[index])).square()
                      for index in range(positives, len(group))]
        else:
            wanted, predicted = teacher.div(0.5).log_softmax(0), scores.div(0.5).log_softmax(0)
            terms.append((wanted.exp() * (wanted - predicted)).sum() * 0.25)
    value = torch.stack(terms).sum() / (len(GROUPS) if loss == "kl_distillation" else total_of_margins())
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    of_query, rest = gradients[: len(GROUPS)], iter(gradients[len(GROUPS) :])
    of_documents = [[next(rest) for _ in group] for group in documents]
    return float(value.detach()), [
        torch.cat([*of_query[part], *(text for group in of_documents[part] for text in group)])
        for part in (slice(0, 4), slice(4, 8))]


def total_of_margins():
    """What the objective divides by: documents but one of each query."""
    return sum(sum(group) - 1 for group in GROUPS)


@pytest.mark.parametrize("loss", ["kl_distillation", "margin_mse"])
def test_distillation_equals_one_process(loss):
    value, halves = distillation_reference(loss)
    for (own, gradient), expected in zip(run_on_ranks(distillation_on_ranks, 2, loss), halves, strict=True):
        assert own == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
