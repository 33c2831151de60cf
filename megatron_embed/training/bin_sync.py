"""What data-parallel ranks agree on before a step whose micro-batches are filled by tokens."""

from dataclasses import replace

from megatron_embed.batch import Capacity, EmbedBatch, RerankBatch
from megatron_embed.data.packing import fill_bins
from megatron_embed.data.rerank import fill_rerank_bins
from megatron_embed.parallel.collectives import largest, largest_of_each
from megatron_embed.parallel.topology import Topology


def agree_on_bins(batch: EmbedBatch, topology: Topology, *, whole_groups: bool) -> EmbedBatch:
    """The batch in as many micro-batches as the rank with the most has; a multiple of the pipeline size if interleaved.

    Called by all ranks, in the main thread; one small all-reduce over the data-parallel group.

    Args:
        batch: this rank's share of a step, in bins of one size on all ranks.
        whole_groups: a query stays with its documents.
    """
    count, *capacity = largest_of_each([len(batch.micro_batches), *batch.micro_capacity], topology.dp_group)
    return fill_bins(batch, _whole_rounds(count, topology), Capacity(*capacity), whole_groups=whole_groups)


def agree_on_shares(batch: EmbedBatch, topology: Topology, *, whole_groups: bool) -> EmbedBatch:
    """The same for shares that differ in their numbers of rows: one more small all-reduce over the group."""
    capacity = Capacity(*largest_of_each([*batch.capacity], topology.dp_group))
    return agree_on_bins(replace(batch, capacity=capacity), topology, whole_groups=whole_groups)


def agree_on_rerank_bins(batch: RerankBatch, topology: Topology) -> RerankBatch:
    """As `agree_on_bins` for a reranker's batch, whose queries always stay whole; its shares may differ."""
    count = largest(len(batch.micro_batches), topology.dp_group)
    return fill_rerank_bins(batch, _whole_rounds(count, topology))


def _whole_rounds(count: int, topology: Topology) -> int:
    """Micro-batches that an interleaved pipeline can run: a multiple of its size."""
    return count + -count % topology.pp_size if topology.num_model_chunks > 1 else count
