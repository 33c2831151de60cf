"""Forward passes over Megatron's stock schedules, for training's first pass and for inference alike."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_embed.models.encoder import DeviceMicroBatch, EmbeddingModel
from megatron_embed.models.heads import HeadSpec, PairHead, fetch_tied_rows
from megatron_embed.parallel.topology import Topology, virtual_size
from megatron_embed.platform.compat import DistributedDataParallel, forget_router_losses, get_forward_backward_func

LossFunction = Callable[..., Any]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[DeviceMicroBatch],
    topology: Topology,
    loss_of: Callable[[int], LossFunction],
    *,
    forward_only: bool,
) -> list[Any]:
    """Every micro-batch through the pipeline, once.

    Args:
        chunks: this rank's model chunks, wrapped by Megatron's DDP or not.
        batches: the step's micro-batches, equally long where there is a pipeline.
        loss_of: micro-batch number -> the schedule's loss function for it, called on the last stage.
        forward_only: collect `loss(output, non_loss_data=True)` and leave the gradients alone.
    Returns:
        What the loss functions handed back, in micro-batch order; empty before the last stage.
        Communicates over the pipeline, tensor-, context- and expert-parallel groups and, with backward, data-parallel.
        A reranker's head that is tied to the word embeddings gets their rows first.
    """

    def forward_step(numbered: Iterator[tuple[int, DeviceMicroBatch]],
                     model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        number, batch = next(numbered)
        return model(batch), loss_of(number)

    tied = tied_parts(chunks)
    if tied is not None:
        fetch_tied_rows(*tied, topology)
    forget_router_losses()
    iterators = [iter(list(enumerate(batches))) for _ in chunks]
    schedule = get_forward_backward_func(topology.pp_size, virtual_size(topology.sizes))
    return schedule(
        forward_step_func=forward_step, data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks), num_microbatches=len(batches), seq_length=batches[0].num_tokens, micro_batch_size=1,
        forward_only=forward_only, collect_non_loss_data=forward_only)


@contextlib.contextmanager
def evaluation_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Context in which dropout is off; each chunk's training mode is restored at the end."""
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


def unwrapped(chunk: torch.nn.Module) -> EmbeddingModel:
    """The model chunk itself, out of Megatron's DistributedDataParallel if it is wrapped."""
    model = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
    assert isinstance(model, EmbeddingModel)
    return model


def tied_parts(
        chunks: Sequence[torch.nn.Module]) -> tuple[torch.nn.Module | None, PairHead | None, HeadSpec, int] | None:
    """What `fetch_tied_rows` asks for of this rank's chunks; null if there is no head tied to the word embeddings."""
    first, last = unwrapped(chunks[0]), unwrapped(chunks[-1])
    spec = first.head_spec
    if spec is None or not spec.is_tied(first.shape):
        return None
    word_embeddings = first.embedding.word_embeddings if first.pre_process else None
    return word_embeddings, last.head, spec, first.shape.hidden_size


def embed(chunks: Sequence[torch.nn.Module], batches: Sequence[DeviceMicroBatch], topology: Topology) -> Tensor | None:
    """Embeddings of all rows of `batches`, without a graph.

    Returns:
        [rows, dim] float32 on the last pipeline stage, ordered by row number; null on the others.
    """

    def collect(number: int) -> LossFunction:
        return lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = run_schedule(chunks, batches, topology, collect, forward_only=True)
    if not topology.is_last_stage:
        return None
    kept = [batch.valid_rows for batch in batches]
    embeddings = torch.cat([output[: len(rows)] for output, rows in zip(outputs, kept, strict=True)])
    rows = torch.cat(kept).to(embeddings.device)
    # Inference repeats micro-batches whose rows it keeps: they count once.
    return embeddings.new_empty(int(rows.max()) + 1, embeddings.shape[1]).index_copy_(0, rows, embeddings)


__all__ = ["EmbeddingModel", "embed", "run_schedule"]
