"""Embed texts on all ranks: each data-parallel rank runs a share, every rank gets the whole result."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_embed.batch import MicroBatch, TextVectors
from megatron_embed.data.packing import PackingSpec, build_encode_batches
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import DataError, EmptyTextError, UserError
from megatron_embed.evaluation.finite import require_finite
from megatron_embed.models.encoder import AttentionKernel, DeviceMicroBatch, to_device
from megatron_embed.models.passes import embed, evaluation_mode, unwrapped
from megatron_embed.models.vocabulary_shape import padded_vocabulary
from megatron_embed.names import JOINT_POOLINGS, ModelPooling, Role
from megatron_embed.parallel.collectives import (
    gather_padded,
    largest,
    leave_if_asked,
    raise_on_all_ranks,
    send_from_last,
    smallest,
)
from megatron_embed.parallel.topology import Topology, token_alignment
from megatron_embed.platform import stop_signal as stop
from megatron_embed.platform.cpu_linear import Libraries, libraries_used

Item = TypeVar("Item")

Pack = Callable[[Sequence[Item]], tuple[tuple[MicroBatch, ...], int | None]]
"""Items -> their micro-batches, and the index of the first item without tokens, if any."""

BATCHES_AT_ONCE = 8
"""Times the pipeline's size: micro-batches between two checks for a stop request."""
TEXTS_AT_ONCE = 4096
"""Texts tokenized and packed together: few enough for memory, enough to sort well by length."""
VECTOR_TEXTS_AT_ONCE = 256
"""The same of a multi-vector model, which gives about a hundred vectors for a text."""
MICRO_BATCH_TOKENS = 8192
"""Token budget of a packed micro-batch, padding included; a longer text gets a micro-batch of its own."""


class ModelRunner:
    """A loaded model on all ranks that turns items (texts or pairs) into rows; each data-parallel rank runs a share."""

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology, *, pooling: ModelPooling, dim: int,
                 kernel: AttentionKernel, causal: bool, libraries: Libraries | None = None) -> None:
        """
        Args:
            dim: output width, 1 for scores, of a sparse model the vocabulary's.
            libraries: of float32 products on CPU ranks; None: those of the process, as in a training run.
        """
        self.chunks = chunks
        self.topology = topology
        self.pooling = pooling
        self.dim = dim
        self.kernel = kernel
        self.causal = causal
        self.libraries = libraries
        self.shape = unwrapped(chunks[0]).shape
        # A sparse model's tensor-parallel ranks have a share of the vocabulary each.
        self.width = padded_vocabulary(dim, topology.tp_size) // topology.tp_size if pooling == "splade" else dim
        self.packing = PackingSpec(micro_batch_tokens=MICRO_BATCH_TOKENS, alignment=token_alignment(topology.sizes),
                                   uniform_size=topology.pp_size > 1)

    @property
    def gives_several(self) -> bool:
        """Whether a text gives more than one vector that fits into a matrix of all texts: those of its tokens, or a
        weight for every token of the vocabulary."""
        return self.pooling in ("tokens", "splade", *JOINT_POOLINGS.values())

    def run(self, items: Sequence[Item], pack: Pack[Item], bar: "tqdm[Any]") -> Tensor:
        """Model outputs for the items, [items, dim] float32 on the CPU of every rank, in order.

        Called by all ranks. Each data-parallel rank runs every dp_size-th item; one all-gather over the data-parallel
        group and one broadcast over the pipeline per 4096 items of a rank, and one all-reduce of an integer over the
        world. Dropout is off. A training run's evaluation stops between two batches when a rank is asked to stop: the
        remaining batches are skipped, and the ranks agree before any result is used.

        Args:
            items: a sequence that reads its items from a file reads only this rank's share.
            pack: items -> their micro-batches (row ids are positions in the items), and the first item without tokens.
            bar: counts items; closed at the end.
        Raises:
            EmptyTextError: for the first item without tokens among these 4096, on every rank alike.
            DataError: an item can no longer be read from its file, on every rank alike.
            PreemptedError: some rank was asked to stop, on every rank alike.
        """
        block = TEXTS_AT_ONCE * self.topology.dp_size
        result = torch.empty(len(items), self.dim)
        with bar, evaluation_mode(self.chunks), libraries_used(self.libraries):
            for first in range(0, len(items), block):
                leave_if_asked()
                part = items[first : first + block]
                result[first : first + len(part)] = self._run_block(part, pack, first)
                bar.update(len(part))
            leave_if_asked()
        return result

    def _run_block(self, items: Sequence[Item], pack: Pack[Item], first: int) -> Tensor:
        """[items, dim] on the CPU of every rank. `first`: index of the first of these items among all."""
        topology, size = self.topology, self.topology.dp_size
        capacity, share = -(-len(items) // size), items[topology.dp_rank :: size]
        rows = self._run_share(self._pack_block(items, pack, first), len(share))
        if topology.is_last_stage:
            gathered = gather_padded(rows, capacity, topology.dp_group)
        else:
            gathered = torch.zeros(size, capacity, self.dim, device=topology.device)
        gathered = send_from_last(gathered, topology.groups.pp)
        return gathered.transpose(0, 1).reshape(-1, self.dim)[: len(items)].cpu()

    def _pack_block(self, items: Sequence[Item], pack: Pack[Item], first: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of this rank's share of the items; see `run` for what is raised."""
        size = self.topology.dp_size
        # A rank without items runs the first one and discards it: other ranks need the experts that it holds.
        micro_batches, empty, error = _packed(pack, items[self.topology.dp_rank :: size] or items[:1])
        wrong = len(items) if empty is None else empty * size + self.topology.dp_rank
        index = smallest(wrong if error is None else -1)
        if index < 0:
            raise_on_all_ranks(error)
        if index < len(items):
            raise EmptyTextError(first + index, f"text number {first + index + 1}", str(items[index]))
        return micro_batches

    def run_share(self, items: Sequence[Item], pack: Pack[Item], first: int) -> TextVectors:
        """The vectors of this rank's share of a few items, every dp_size-th; those of a multi-vector model, or one for
        each item, of a sparse one [items, vocabulary/tp]. They stay where they are. Called by all ranks; no vectors
        before the last stage of a pipeline. Dropout is off.

        `first`: index of the first of these items among all.

        Raises: as `run`.
        """
        leave_if_asked()
        num_items = len(items[self.topology.dp_rank :: self.topology.dp_size])
        micro_batches = self._pack_block(items, pack, first)
        counts = torch.ones(num_items, dtype=torch.int64)
        if self.pooling != "splade" and self.gives_several:
            counts = vector_counts(micro_batches)[:num_items]
        with evaluation_mode(self.chunks), libraries_used(self.libraries):
            vectors = self._run_share(micro_batches, int(counts.sum()))
        leave_if_asked()
        return TextVectors(vectors=vectors, counts=counts)

    def _run_share(self, micro_batches: Sequence[MicroBatch], num_items: int) -> Tensor:
        """[num_items, dim] of this rank's outputs; empty before the last stage."""
        # With experts on several ranks, each of these ranks runs as many micro-batches as the busiest one, or an
        # exchange of tokens would never finish. Ranks of one replica have the same micro-batches; the data-parallel
        # group joins the replicas.
        batches = [to_device(micro, self.topology, self.pooling, kernel=self.kernel, causal=self.causal,
                             shape=self.shape)
                   for micro in micro_batches]
        sizes = self.topology.sizes
        if sizes.expert_model_parallel_size * sizes.expert_tensor_parallel_size > 1:
            needed = largest(len(batches), self.topology.dp_group)
            batches += [batches[0]] * (needed - len(batches))
        if len(self.chunks) > 1:  # the interleaved schedule runs whole rounds of the pipeline
            batches += [batches[0]] * (-len(batches) % self.topology.pp_size)
        if stop.held():
            return self._run_until_asked(batches, num_items)
        rows = embed(self.chunks, batches, self.topology)
        if rows is None:
            return torch.zeros(0, self.width, device=self.topology.device)
        return rows[:num_items]

    def _run_until_asked(self, batches: Sequence[DeviceMicroBatch], num_items: int) -> Tensor:
        """`_run_share` a few micro-batches at a time until a rank is asked to stop; the remaining rows are zero.

        Ranks that share a model agree before each time: one small all-reduce over the world.
        """
        topology = self.topology
        sizes = topology.sizes
        one_rank_model = topology.world_size == topology.dp_size and (
            sizes.expert_model_parallel_size == sizes.expert_tensor_parallel_size == 1)
        at_once = 1 if topology.pp_size == 1 else BATCHES_AT_ONCE * topology.pp_size
        times = -(-len(batches) // at_once)
        result = torch.zeros(max(num_items, 1), self.width, device=topology.device)
        for start in range(0, at_once * (times if one_rank_model else largest(times, dist.group.WORLD)), at_once):
            if stop.asked() if one_rank_model else smallest(-int(stop.asked())) < 0:
                break
            part = batches[start : start + at_once]
            rows = embed(self.chunks, part, topology) if part else None
            if rows is not None:
                kept = torch.cat([batch.valid_rows for batch in part])
                result.index_copy_(0, kept, rows[kept])
        return result[:num_items] if topology.is_last_stage else result[:0]


def vector_counts(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """[rows] int64, vectors of each row of a multi-vector model; rows of each text of a joint model."""
    rows, counts = [], []
    for micro in micro_batches:
        assert micro.vectors is not None
        kept = torch.nn.functional.pad((micro.vectors >= 0).cumsum(0), (1, 0))
        rows.append(micro.rows)
        counts.append(kept[micro.cu_seqlens.long()].diff() + (micro.joint.dense_rows if micro.joint else 0))
    return torch.cat(counts)[torch.cat(rows).argsort()]


def _packed(pack: Pack[Item], items: Sequence[Item]) -> tuple[tuple[MicroBatch, ...], int | None, DataError | None]:
    """`pack(items)` and the error of reading the items, which is not raised because the other ranks would wait."""
    try:
        return *pack(items), None
    except DataError as error:
        return (), None, error


class TextEncoder(ModelRunner):
    """A loaded embedding model with its tokenizer. Every method is called by all ranks together."""

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology, tokenizer: RoleTokenizer, *,
                 pooling: ModelPooling, dim: int, kernel: AttentionKernel, causal: bool,
                 libraries: Libraries | None = None) -> None:
        super().__init__(chunks, topology, pooling=pooling, dim=dim, kernel=kernel, causal=causal, libraries=libraries)
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str], role: Role, *, instruction: str | None = None,
               show_progress: bool = False) -> Tensor:
        """Embeddings [texts, dim] float32 on the CPU of every rank, in order. Communicates as `run` does.

        `instruction`: for a prompt that contains `{instruction}`; None: the tokenizer's own.

        Raises:
            EmptyTextError: for a text without tokens, on every rank alike.
            UserError: an embedding that is not finite, on every rank alike.
        """
        assert not self.gives_several, "see `blocks`, or sparse_vectors.py"

        def pack(part: Sequence[str]) -> tuple[tuple[MicroBatch, ...], int | None]:
            return self._pack_share(list(part), role, instruction)

        bar = tqdm(total=len(texts), unit="text", desc=f"encode {role}", disable=None if show_progress else True)
        try:
            return require_finite(self.run(texts, pack, bar), f"{role} embeddings")
        except EmptyTextError as error:
            raise EmptyTextError(error.row, f"{role} text number {error.row + 1}", error.text) from None

    def share(self, texts: Sequence[str], role: Role, first: int = 0, *, instruction: str | None = None) -> TextVectors:
        """The vectors of this rank's share of these texts by a multi-vector or sparse model; see `run_share`."""
        def pack(part: Sequence[str]) -> tuple[tuple[MicroBatch, ...], int | None]:
            return self._pack_share(list(part), role, instruction)

        try:
            own = self.run_share(texts, pack, first)
        except EmptyTextError as error:
            raise EmptyTextError(error.row, f"{role} text number {error.row + 1}", error.text) from None
        finite = bool(torch.isfinite(own.vectors).all())
        if smallest(int(finite)) == 0:  # on every rank alike, also those that have other texts
            require_finite(own.vectors, f"{role} vectors")
            raise UserError(f"{role} vectors of another rank are not finite; the model has diverged or overflowed; use "
                            "an earlier checkpoint or a wider dtype")
        return own

    def blocks(self, texts: Sequence[str], role: Role, *, instruction: str | None = None,
               show_progress: bool = False) -> Iterator[TextVectors]:
        """The vectors of all texts in order by a multi-vector model, block by block, on the CPU of every rank.

        Called by all ranks. Per block, which is VECTOR_TEXTS_AT_ONCE texts of each rank, one all-gather of vectors and
        a small one over the data-parallel group, and one broadcast over the pipeline.

        Raises: as `encode`.
        """
        size = VECTOR_TEXTS_AT_ONCE * self.topology.dp_size
        with tqdm(total=len(texts), unit="text", desc=f"encode {role}",
                  disable=None if show_progress else True) as bar:
            for first in range(0, len(texts), size):
                part = texts[first : first + size]
                yield self._gathered(self.share(part, role, first, instruction=instruction), len(part))
                bar.update(len(part))

    def vectors(self, texts: Sequence[str], role: Role, *, instruction: str | None = None,
                show_progress: bool = False) -> TextVectors:
        """The vectors of a few texts by a multi-vector model, on the CPU of every rank; see `blocks`."""
        blocks = list(self.blocks(texts, role, instruction=instruction, show_progress=show_progress))
        if not blocks:
            return TextVectors(vectors=torch.empty(0, self.dim), counts=torch.empty(0, dtype=torch.int64))
        return TextVectors(vectors=torch.cat([block.vectors for block in blocks]),
                           counts=torch.cat([block.counts for block in blocks]))

    def _gathered(self, own: TextVectors, num_texts: int) -> TextVectors:
        """The vectors of all ranks' texts in their order, on the CPU of every rank."""
        topology, size = self.topology, self.topology.dp_size
        counts = gather_padded(own.counts, -(-num_texts // size), topology.dp_group)
        capacity = int(counts.sum(dim=1).max())
        if topology.is_last_stage:
            gathered = gather_padded(own.vectors, capacity, topology.dp_group)
        else:
            gathered = torch.zeros(size, capacity, self.dim, device=topology.device)
        gathered = send_from_last(gathered, topology.groups.pp).cpu()
        if size == 1:
            return TextVectors(vectors=gathered[0], counts=counts[0])
        parts = [torch.split(rank[: int(own_counts.sum())], own_counts.tolist())
                 for rank, own_counts in zip(gathered, counts, strict=True)]
        in_order = [parts[index % size][index // size] for index in range(num_texts)]
        return TextVectors(vectors=torch.cat(in_order), counts=counts.T.flatten()[:num_texts])

    def _pack_share(self, texts: Sequence[str], role: Role,
                    instruction: str | None) -> tuple[tuple[MicroBatch, ...], int | None]:
        """This rank's micro-batches, and the index of its first text without tokens, if any."""
        try:
            return build_encode_batches(texts, role, self.tokenizer, self.packing, instruction=instruction), None
        except EmptyTextError as error:
            return (), error.row
