"""Sparse vectors' losses on two ranks, data- or tensor-parallel, against Sentence Transformers' in one process."""

import pytest
import torch
from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import (
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)

from tests.helpers.ranks import run_on_ranks

QUERIES, VOCABULARY, TEMPERATURE = 8, 22, 2.0
"""Every query has a positive and a hard negative."""
WEIGHTS = (0.3, 0.2)
"""Weights of the regularizers of queries and of documents."""
STEP, WARMUP = 3, 6
LOSSES = {"info_nce": [f"objective.temperature={TEMPERATURE}"], "margin_mse": ["objective.loss=margin_mse"],
          "kl_distillation": ["objective.loss=kl_distillation", f"objective.temperature={TEMPERATURE}"]}


class GivenVectors(torch.nn.Module):
    """A "model" of the stock losses that has its sparse vectors already."""

    def forward(self, features, task=None):
        return features


def vectors():
    """([queries, vocabulary], [queries, 2, vocabulary]), a third of the weights above 0."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(QUERIES, 3, VOCABULARY, generator=generator, dtype=torch.float64)
    weights = torch.log1p(torch.relu(values - 0.4))
    return weights[:, 0], weights[:, 1:]


def teacher():
    return torch.randn(QUERIES, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def batch_of(first, last):
    """(embeddings, batch) of queries `first` to `last - 1`."""
    from megatron_embed.batch import Capacity, EmbedBatch

    query, document = (part[first:last] for part in vectors())
    count = last - first
    ids = torch.arange(3 * count) + 100 * first
    is_positive = torch.tensor([True, False]).repeat(count)
    document_query = torch.arange(count).repeat_interleave(2)
    batch = EmbedBatch(
        micro_batches=(), num_truncated=0, num_queries=count, num_documents=2 * count,
        positive_index=2 * torch.arange(count), is_positive=is_positive, document_query=document_query,
        query_ids=ids[:count], positive_query=torch.arange(count), document_ids=ids[count:],
        positive_ids=ids[count:][is_positive], teacher_scores=teacher()[first:last].flatten(),
        capacity=Capacity(count, 2 * count, count), micro_capacity=Capacity(count, 2 * count, count))
    return torch.cat([query, document.flatten(0, 1)]), batch


def objective_on_ranks(layout, loss, kind, tile):
    """Called by both ranks: (metrics, gradient of this rank's rows and columns)."""
    import torch.distributed as dist

    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.losses import maxsim
    from megatron_embed.objectives import document_tiles, multi_vector, sparse

    config = config_of_overrides([
        "model.path=m", "embedding.head=sparse", "data.num_negatives=1", *LOSSES[loss],
        f"objective.query_regularizer={kind}", f"objective.document_regularizer={kind}",
        f"objective.query_regularizer_weight={WEIGHTS[0]}", f"objective.document_regularizer_weight={WEIGHTS[1]}",
        f"objective.regularizer_warmup_steps={WARMUP}"])
    rank = dist.get_rank()
    alone = [dist.new_group([each]) for each in range(2)][rank]
    if layout == "data":
        half = QUERIES // 2
        embeddings, batch = batch_of(half * rank, half * rank + half)
        groups = (dist.group.WORLD, alone)
    else:
        embeddings, batch = batch_of(0, QUERIES)
        embeddings = embeddings.chunk(2, dim=1)[rank].contiguous()
        groups = (alone, dist.group.WORLD)
    kinds = {"info_nce": sparse.SparseContrastive}
    objective = kinds.get(loss, sparse.SparseDistillation)(config, *groups)
    objective.step = STEP
    before = maxsim.MAXSIM_TILE_ELEMENTS
    try:
        for module in (maxsim, document_tiles, multi_vector):
            module.MAXSIM_TILE_ELEMENTS = tile
        result = objective(embeddings, batch, total=objective.total(batch))
    finally:
        for module in (maxsim, document_tiles, multi_vector):
            module.MAXSIM_TILE_ELEMENTS = before
    return result.sums.metrics(), result.embeddings


def stock_loss(loss):
    """(loss of Sentence Transformers, its labels)."""
    model, scores = GivenVectors(), teacher()
    if loss == "info_nce":
        return SparseMultipleNegativesRankingLoss(model, scale=1.0 / TEMPERATURE), None
    if loss == "margin_mse":
        return SparseMarginMSELoss(model), scores[:, 0] - scores[:, 1]
    return SparseDistillKLDivLoss(model, temperature=TEMPERATURE), scores


class L1(torch.nn.Module):
    def compute_loss_from_embeddings(self, embeddings):
        return embeddings.abs().sum(dim=1).mean()


def stock(loss, kind):
    """({metric: value}, gradient of queries, gradient of documents) by SpladeLoss at STEP of its quadratic warm-up."""
    query, document = (part.clone().requires_grad_() for part in vectors())
    base, labels = stock_loss(loss)
    given = {} if kind == "flops" else {"document_regularizer": L1(), "query_regularizer": L1()}
    splade = SpladeLoss(GivenVectors(), base, query_regularizer_weight=WEIGHTS[0],
                        document_regularizer_weight=WEIGHTS[1], **given)
    schedule = SpladeRegularizerWeightSchedulerCallback(splade)
    schedule.warmup_steps = WARMUP
    splade.query_regularizer_weight, splade.document_regularizer_weight = (
        schedule._calculate_weight_value(STEP, weight) for weight in WEIGHTS)
    columns = [{"sentence_embedding": part} for part in (query, document[:, 0], document[:, 1])]
    losses = splade(columns, labels)
    total = torch.stack(list(losses.values())).sum()
    gradients = torch.autograd.grad(total, (query, document))
    weights = (splade.query_regularizer_weight, splade.document_regularizer_weight)
    values = {"loss": total, **{f"{role}_regularizer": losses[f"{role}_regularizer_loss"] / weight
                                for role, weight in zip(("query", "document"), weights, strict=True)},
              "query_nonzeros": (query > 0).sum() / QUERIES, "document_nonzeros": (document > 0).sum() / QUERIES / 2}
    return {name: float(value) for name, value in values.items()}, *gradients


@pytest.mark.parametrize("loss, kind, tile", [
    ("info_nce", "flops", 1 << 22), ("info_nce", "l1", 64), ("kl_distillation", "flops", 1 << 22),
    ("margin_mse", "flops", 1 << 22)])
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_losses_equal_sentence_transformers(layout, loss, kind, tile):
    values, of_query, of_document = stock(loss, kind)
    results = run_on_ranks(objective_on_ranks, 2, layout, loss, kind, tile)
    if layout == "tensor":
        gradients = torch.cat([gradient for _, gradient in results], dim=1)
        query, document = gradients[:QUERIES], gradients[QUERIES:]
    else:
        half = QUERIES // 2
        query = torch.cat([gradient[:half] for _, gradient in results])
        document = torch.cat([gradient[half:] for _, gradient in results])
    active = [part > 0 for part in vectors()]  # elsewhere log(1 + relu) has no gradient
    for own, expected, kept in zip((query, document.unflatten(0, (-1, 2))), (of_query, of_document), active,
                                   strict=True):
        assert expected[kept].abs().max() > 1e-3, "gradients that are 0 prove nothing"
        torch.testing.assert_close(own[kept], expected[kept], rtol=1e-5, atol=1e-9)
    for metrics, _ in results:
        for name, value in values.items():
            assert metrics[name] == pytest.approx(value, rel=1e-6), name
