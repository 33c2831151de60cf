"""Every factor between a loss and the parameters' gradients, with its derivation.

The contract: after Megatron has reduced them, gradients equal the gradient of the mean loss over the *global* batch.

What Megatron does to the value a loss function returns (2-tuple form, megatron/core/pipeline_parallel/schedules.py):
  * the schedule multiplies it by the context-parallel size and divides it by the number of micro-batches M;
  * DistributedDataParallel scales each rank's accumulated gradient by 1 / (dp * cp) and sums over those ranks.
With context parallelism each rank's graph reaches only its own tokens, so the sum over cp ranks completes the gradient
and needs no factor: cp cancels. Left over is 1 / (M * dp).

Let L be the mean loss over the Q queries of the global batch and g = dL/de the gradient of an embedding e of this rank,
complete over all ranks that used it (the objective's reduce-scatter sums a document's uses). By the chain rule dL/dw is
the sum over all embeddings of g . de/dw, so a micro-batch contributes the surrogate s = sum(g * e), and must be
multiplied by M * dp.
The objective divides by Q, not by the queries of a micro-batch or rank, in two passes as in one: micro-batches may hold
different numbers of queries, and each query counts 1 / Q. With `negatives: micro_batch` L is the mean over all queries
of the loss against the documents of the query's own micro-batch. A micro-batch that is run a second time has s = 0.
Tensor-parallel ranks compute the same embeddings from shards of the weights: no factor.
"""


def surrogate_factor(num_microbatches: int, dp_size: int) -> float:
    """The factor of a micro-batch's surrogate `sum(gradient * embedding)` before it goes to the schedule."""
    return float(num_microbatches * dp_size)
