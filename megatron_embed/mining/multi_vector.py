"""Mine hard negatives by MaxSim with a multi-vector model; documents' vectors stay on the rank that embeds them."""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist

from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.maxsim_search import MaxSimSearch, PairScores, for_each_document, queries_on_device
from megatron_embed.mining.dense import selected
from megatron_embed.mining.filters import MiningOptions
from megatron_embed.mining.task import MinedRows, MiningTask


def mine_maxsim(encoder: TextEncoder, task: MiningTask, options: MiningOptions) -> MinedRows | None:
    """Negatives of every query by largest MaxSim, by exact search; the result as of `mine_vectors`, over the world.

    Called by all ranks. Memory: the queries' vectors, one block of documents, and the best documents of every query.

    Raises:
        EmptyTextError: a query or a document without vectors, on every rank alike.
    """
    queries = queries_on_device(encoder, task.queries)
    search = MaxSimSearch(queries, options.last_rank(task.most_positives) + task.most_excluded)
    counts = [len(documents) for documents in task.positives]
    pairs = PairScores(queries, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
                       torch.tensor(list(chain.from_iterable(task.positives))))
    for_each_document(encoder, task.documents, [search.add, pairs.add], show_progress=encoder.topology.rank == 0)
    rank, size = dist.get_rank(), dist.get_world_size()
    scores, indices = (part[rank::size] for part in search.merged(encoder.topology, len(task.documents)))
    positive_scores: Sequence[torch.Tensor] = pairs.merged(encoder.topology).split(counts)
    return selected(scores, indices, [own.tolist() for own in positive_scores[rank::size]], task.positives, options,
                    excluded=task.excluded, group=dist.group.WORLD)
