"""Forward and backward passes through Megatron's pipeline schedules: training's two passes, and inference."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_embed.models.encoder import DeviceMicroBatch, EmbeddingModel
from megatron_embed.models.heads import HeadSpec, RerankerHead, fetch_tied_rows
from megatron_embed.models.model_shape import ModelShape
from megatron_embed.models.vocabulary_head import VocabularyHead, fetch_tied_weight
from megatron_embed.parallel.topology import Topology, virtual_size
from megatron_embed.platform.compat import DistributedDataParallel, get_forward_backward_func

LossFunction = Callable[..., Any]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[DeviceMicroBatch],
    topology: Topology,
    loss_of: Callable[[int], LossFunction],
    *,
    forward_only: bool,
    computed: deque[Tensor] | None = None,
) -> list[Any]:
    """Run every micro-batch once through the pipeline.

    Args:
        chunks: this rank's model chunks, wrapped by Megatron's DDP or not.
        batches: the step's micro-batches, of equal length with pipeline parallelism.
        loss_of: micro-batch index -> the schedule's loss function for it, called on the last stage.
        forward_only: collect `loss(output, non_loss_data=True)` without gradients.
        computed: outputs of the first micro-batches, with their graphs, which are not run again; each is taken out when
            its turn comes. Not with pipeline parallelism.
    Returns:
        The loss functions' results, in micro-batch order; empty before the last stage.
        Communicates over the pipeline, tensor-, context- and expert-parallel groups and, with backward, data-parallel.
        First, a head that is tied to the word embeddings gets their rows.
    """

    def forward_step(enumerated: Iterator[tuple[int, DeviceMicroBatch]],
                     model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        index, batch = next(enumerated)
        return computed.popleft() if computed else model(batch), loss_of(index)

    tied = tied_parts(chunks)
    if tied is not None:
        fetch_tied_rows(*tied, topology)
    vocabulary = tied_vocabulary(chunks)
    if vocabulary is not None:
        fetch_tied_weight(*vocabulary, topology)
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
    """The model chunk inside Megatron's DistributedDataParallel, or the chunk itself if it is not wrapped."""
    model = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
    assert isinstance(model, EmbeddingModel)
    return model


def tied_parts(
        chunks: Sequence[torch.nn.Module]) -> tuple[torch.nn.Module | None, RerankerHead | None, HeadSpec, int] | None:
    """This rank's first arguments of `fetch_tied_rows`; None without a head that is tied to the word embeddings."""
    first, last = unwrapped(chunks[0]), unwrapped(chunks[-1])
    spec = first.head_spec
    if spec is None or not spec.is_tied(first.shape):
        return None
    word_embeddings = first.embedding.word_embeddings if first.pre_process else None
    head = last.head
    assert not isinstance(head, VocabularyHead)
    return word_embeddings, head, spec, first.shape.hidden_size


def tied_vocabulary(
        chunks: Sequence[torch.nn.Module]) -> tuple[Tensor | None, VocabularyHead | None, ModelShape] | None:
    """This rank's first arguments of `fetch_tied_weight`; None without a sparse model's head that is tied to the word
    embeddings of another pipeline stage."""
    first, last = unwrapped(chunks[0]), unwrapped(chunks[-1])
    if first.pooling != "splade" or not first.shape.tie_word_embeddings or first.topology.pp_size == 1:
        return None
    head = last.head
    assert not isinstance(head, RerankerHead)
    return first.embedding.word_embeddings.weight if first.pre_process else None, head, first.shape


def embed(chunks: Sequence[torch.nn.Module], batches: Sequence[DeviceMicroBatch], topology: Topology,
          before: Sequence[tuple[DeviceMicroBatch, Tensor]] = ()) -> Tensor | None:
    """Embeddings of all rows of `batches`, without a graph.

    Args:
        before: further micro-batches with their outputs, which are not run again.
    Returns:
        [rows, dim] float32 on the last pipeline stage, ordered by row id; None on the others.
    """
    with torch.no_grad():
        outputs = [output for _, output in before] + forward(chunks, batches, topology)
    if not topology.is_last_stage:
        return None
    batches = [*(batch for batch, _ in before), *batches]
    row_ids = [batch.valid_rows for batch in batches]
    embeddings = torch.cat([output[: len(rows)] for output, rows in zip(outputs, row_ids, strict=True)]).detach()
    num_rows = max(batch.num_rows for batch in batches)
    # Inference may repeat micro-batches; repeated rows are written once.
    return embeddings.new_empty(num_rows, embeddings.shape[1]).index_copy_(0, torch.cat(row_ids), embeddings)


def forward(chunks: Sequence[torch.nn.Module], batches: Sequence[DeviceMicroBatch],
            topology: Topology) -> list[Tensor]:
    """[rows, dim] float32 of each micro-batch, in order, with its graph unless gradients are off; empty before the last
    pipeline stage."""

    def collect(index: int) -> LossFunction:
        return lambda output, non_loss_data: output

    return run_schedule(chunks, batches, topology, collect, forward_only=True) if batches else []
