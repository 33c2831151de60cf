"""The loss of joint heads on two ranks, in many blocks and rounds, against one process by autograd."""

import pytest
import torch

from tests.helpers.joint_reference import joint_loss, scores_of_texts
from tests.helpers.ranks import run_on_ranks

DIM, HIDDEN, DENSE_ROWS, TEMPERATURE = 6, 11, 2, 0.6
GROUPS = ((1, 2), (2, 0), (1, 0), (2, 1), (1, 3), (1, 1), (2, 2), (1, 0))
"""(positives, hard negatives) of each query; the first half is on the first rank."""
SCORES, LOSSES = (1.0, 0.3, 0.7), (0.9, 0.4, 1.0)


def text(index, tokens):
    """(ids, leaves: dense vector, weights before ReLU, vectors) of a text."""
    generator = torch.Generator().manual_seed(index)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    ids = torch.randint(-1, 6, (tokens,), generator=generator).tolist()
    return ids, (normal(HIDDEN), normal(tokens), normal(tokens, DIM))


def texts():
    """(queries, documents of each query)."""
    queries = [text(index, 2 + index % 3) for index in range(len(GROUPS))]
    return queries, [[text(100 * query + index + 50, 2 + (query + 3 * index) % 4) for index in range(sum(group))]
                     for query, group in enumerate(GROUPS)]


def rows_of(ids, leaves):
    dense, weights, vectors = (leaf.detach() for leaf in leaves)
    padded = torch.cat([dense, dense.new_zeros(DENSE_ROWS * (DIM + 2) - HIDDEN)]).view(DENSE_ROWS, DIM + 2)
    tokens = torch.cat([vectors, weights.relu()[:, None], torch.tensor(ids)[:, None]], dim=1)
    return torch.cat([padded, tokens])


def batch_of(first, last):
    """(embeddings, batch) of queries `first` to `last - 1`."""
    from megatron_embed.batch import Capacity, EmbedBatch

    queries, documents = texts()
    own = [document for group in documents[first:last] for document in group]
    rows = [rows_of(*given) for given in (*queries[first:last], *own)]
    groups = GROUPS[first:last]
    is_positive = torch.tensor([index < positives for positives, negatives in groups
                                for index in range(positives + negatives)])
    document_query = torch.tensor([query for query, group in enumerate(groups) for _ in range(sum(group))])
    ids, sizes = torch.arange(len(rows)) + 100 * first, torch.tensor([sum(group) for group in groups])
    return torch.cat(rows), EmbedBatch(
        micro_batches=(), num_truncated=0, num_queries=len(groups), num_documents=len(own),
        positive_index=sizes.cumsum(0) - sizes, is_positive=is_positive, document_query=document_query,
        query_ids=ids[: len(groups)], positive_query=document_query[is_positive], document_ids=ids[len(groups) :],
        positive_ids=ids[len(groups) :][is_positive], vector_counts=torch.tensor([len(own) for own in rows]),
        dense_rows=DENSE_ROWS, query_token_ids=torch.tensor(sorted(
            {token for own, _ in queries[first:last] for token in own} - {-1})),
        capacity=Capacity(4, 20, 8), micro_capacity=Capacity(4, 20, 8))


def objective_on_ranks(tile, distils):
    """Called by all ranks: (metrics, gradient of this rank's rows)."""
    import torch.distributed as dist

    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.losses import maxsim
    from megatron_embed.objectives import document_tiles, multi_vector
    from megatron_embed.objectives.joint import JointContrastive

    config = config_of_overrides([
        "model.path=m", "embedding.head=joint", f"objective.temperature={TEMPERATURE}",
        "objective.learnable_temperature=true", "data.num_positives=2", "data.num_negatives=3",
        f"objective.score_weights={list(SCORES)}", f"objective.score_loss_weights={list(LOSSES)}",
        f"objective.self_distillation={str(distils).lower()}"])
    embeddings, batch = batch_of(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    before = maxsim.MAXSIM_TILE_ELEMENTS
    try:
        for module in (maxsim, document_tiles, multi_vector):
            module.MAXSIM_TILE_ELEMENTS = tile
        result = JointContrastive(config, dist.group.WORLD)(embeddings, batch, total=8.0)
    finally:
        for module in (maxsim, document_tiles, multi_vector):
            module.MAXSIM_TILE_ELEMENTS = before
    return result.sums.metrics(), result.embeddings


def as_rows(gradients, leaves):
    """Gradients of a text's leaves, where the rows of its outputs hold them."""
    dense, weights, vectors = gradients
    padded = torch.cat([dense, dense.new_zeros(DENSE_ROWS * (DIM + 2) - HIDDEN)]).view(DENSE_ROWS, DIM + 2)
    return torch.cat([padded, torch.cat([vectors, weights[:, None], torch.zeros(len(weights), 1)], dim=1)])


def reference(distils):
    """(loss, gradient of log(1 / temperature), gradients of each rank's rows)."""
    queries, documents = texts()
    columns = [(query, index, *given) for query, group in enumerate(documents) for index, given in enumerate(group)]
    scores = scores_of_texts(*zip(*queries, strict=True), [column[2] for column in columns],
                             [column[3] for column in columns])
    log_scale = torch.tensor(TEMPERATURE, dtype=torch.float64).log().neg().requires_grad_()
    losses = []
    for query, (positives, _) in enumerate(GROUPS):
        for positive in range(positives):
            kept = torch.tensor([owner != query or index == positive or index >= positives
                                 for owner, index, *_ in columns])
            target = next(column for column, (owner, index, *_) in enumerate(columns)
                          if (owner, index) == (query, positive))
            logits = [(score[query] * log_scale.exp()).masked_fill(~kept, -torch.inf)[None] for score in scores]
            losses.append(joint_loss(logits, torch.tensor([target]), SCORES, LOSSES, distils=distils) / positives)
    loss = torch.cat(losses).sum() / len(GROUPS)
    given = [leaves for _, leaves in (*queries, *((ids, leaves) for group in documents for ids, leaves in group))]
    scale, *gradients = torch.autograd.grad(loss, [log_scale, *(leaf for leaves in given for leaf in leaves)],
                                            materialize_grads=True)
    rows = [as_rows(gradients[3 * index : 3 * index + 3], leaves) for index, leaves in enumerate(given)]
    of_query, rest = rows[: len(GROUPS)], iter(rows[len(GROUPS) :])
    of_documents = [[next(rest) for _ in group] for group in documents]
    return float(loss.detach()), float(scale), [
        torch.cat([*of_query[part], *(row for group in of_documents[part] for row in group)])
        for part in (slice(0, 4), slice(4, 8))]


@pytest.mark.parametrize("tile, distils", [(1 << 22, False), (64, True)], ids=["one tile", "many blocks and rounds"])
def test_loss_and_gradients_equal_one_process(tile, distils):
    loss, scale_gradient, halves = reference(distils)
    for (metrics, gradient), expected in zip(run_on_ranks(objective_on_ranks, 2, tile, distils), halves, strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
        assert metrics["log_scale_gradient"] == pytest.approx(scale_gradient, rel=1e-9)
        assert ("distillation_loss" in metrics) == distils
        assert expected[:, -2].any(), "no weight has a gradient"
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
