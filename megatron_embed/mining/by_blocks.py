"""Mine hard negatives with a multi-vector or sparse model; documents' vectors stay on the rank that embeds them."""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist

from megatron_embed.evaluation.document_search import for_each_document, pairs_of, search_of, vectors_of_queries
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.mining.dense import selected
from megatron_embed.mining.filters import MiningOptions
from megatron_embed.mining.task import MinedRows, MiningTask


def mine_by_blocks(encoder: TextEncoder, task: MiningTask, options: MiningOptions) -> MinedRows | None:
    """Negatives of every query by largest MaxSim or dot product, by exact search; the result as of `mine_vectors`, over
    the world.

    Called by all ranks. Memory: the queries' vectors, one block of documents, and the best documents of every query.

    Raises:
        EmptyTextError: a query or a document without vectors, on every rank alike.
    """
    queries = vectors_of_queries(encoder, task.queries)
    search = search_of(queries, options.last_rank(task.most_positives) + task.most_excluded)
    counts = [len(documents) for documents in task.positives]
    pairs = pairs_of(queries, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
                     torch.tensor(list(chain.from_iterable(task.positives))))
    for_each_document(encoder, task.documents, [search.add, pairs.add], show_progress=encoder.topology.rank == 0)
    rank, size = dist.get_rank(), dist.get_world_size()
    scores, indices = (part[rank::size] for part in search.merged(encoder.topology, len(task.documents)))
    positive_scores: Sequence[torch.Tensor] = pairs.merged(encoder.topology).split(counts)
    return selected(scores, indices, [own.tolist() for own in positive_scores[rank::size]], task.positives, options,
                    excluded=task.excluded, group=dist.group.WORLD)
