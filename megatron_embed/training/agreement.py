"""What data-parallel ranks agree on before a step whose micro-batches are filled by tokens."""

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.data.packing import fill_bins
from megatron_embed.parallel.collectives import largest_of_each
from megatron_embed.parallel.topology import Topology


def agree_on_bins(batch: EmbedBatch, topology: Topology, *, whole_groups: bool) -> EmbedBatch:
    """The batch in as many micro-batches as the rank with the most has; a multiple of the pipeline size if interleaved.

    Called by all ranks, in the main thread; one small all-reduce over the data-parallel group.

    Args:
        batch: this rank's share of a step, in bins of one size on all ranks.
        whole_groups: a query stays with its documents.
    """
    count, *capacity = largest_of_each([len(batch.micro_batches), *batch.micro_capacity], topology.dp_group)
    if topology.num_model_chunks > 1:
        count += -count % topology.pp_size
    return fill_bins(batch, count, Capacity(*capacity), whole_groups=whole_groups)
