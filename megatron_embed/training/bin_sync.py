"""Agreement of data-parallel ranks on the number of micro-batches of a step that are filled by a token budget."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_embed.batch import Capacity, EmbedBatch, MicroBatch, RerankBatch
from megatron_embed.data.bins import bin_sizes, pad_to_sizes
from megatron_embed.data.packing import split_to_count
from megatron_embed.data.pair_batches import split_rerank_to_count
from megatron_embed.parallel.collectives import largest, largest_of_each
from megatron_embed.parallel.topology import Topology, token_alignment


def agree_on_bins(batch: EmbedBatch, topology: Topology, *, budget: int | None,
                  keep_groups_together: bool) -> EmbedBatch:
    """The batch in as many micro-batches as the rank with the most has; a multiple of the pipeline size if interleaved.

    Under a token budget each one then gets the next of its sizes (`bin_sizes`); in a pipeline, all get that of the
    largest.

    Called by all ranks, in the main thread; one small all-reduce over the data-parallel group.

    Args:
        batch: this rank's share of a step, in bins of one size on all ranks.
        budget: tokens of a micro-batch; None: as many queries each.
        keep_groups_together: a query stays with its documents.
    """
    count, *capacity = largest_of_each([len(batch.micro_batches), *batch.micro_capacity], topology.dp_group)
    agreed = split_to_count(batch, _whole_rounds(count, topology), Capacity(*capacity),
                            keep_groups_together=keep_groups_together)
    return replace(agreed, micro_batches=_in_sizes(agreed.micro_batches, budget, topology))


def agree_on_shares(batch: EmbedBatch, topology: Topology, *, budget: int | None,
                    keep_groups_together: bool) -> EmbedBatch:
    """The same for shares that differ in their numbers of rows: one more small all-reduce over the group."""
    capacity = Capacity(*largest_of_each([*batch.capacity], topology.dp_group))
    return agree_on_bins(replace(batch, capacity=capacity), topology, budget=budget,
                         keep_groups_together=keep_groups_together)


def agree_on_rerank_bins(batch: RerankBatch, topology: Topology, *, budget: int | None) -> RerankBatch:
    """The same for a reranker's batch, whose queries always stay whole; its shares may differ."""
    count = largest(len(batch.micro_batches), topology.dp_group)
    agreed = split_rerank_to_count(batch, _whole_rounds(count, topology))
    return replace(agreed, micro_batches=_in_sizes(agreed.micro_batches, budget, topology))


def _in_sizes(micro_batches: Sequence[MicroBatch], budget: int | None, topology: Topology) -> tuple[MicroBatch, ...]:
    """Micro-batches of a budget in the smallest of its sizes that holds them; without a budget, as they are."""
    if budget is None:
        return tuple(micro_batches)
    sizes = bin_sizes(budget, token_alignment(topology.sizes))
    return pad_to_sizes(micro_batches, sizes, uniform=topology.pp_size > 1)


def _whole_rounds(count: int, topology: Topology) -> int:
    """Micro-batches that an interleaved pipeline can run: a multiple of its size."""
    return count + -count % topology.pp_size if topology.num_model_chunks > 1 else count
