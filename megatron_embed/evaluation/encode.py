"""Texts to embeddings over all ranks: each data-parallel rank takes a share, every rank gets the whole result."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_embed.batch import MicroBatch
from megatron_embed.data.packing import PackingSpec, build_encode_batches
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import DataError, EmptyTextError, UserError
from megatron_embed.models.encoder import AttentionKernel, DeviceMicroBatch, to_device
from megatron_embed.models.passes import embed, unwrapped
from megatron_embed.names import Pooling, Role
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

Item = TypeVar("Item")

Pack = Callable[[Sequence[Item]], tuple[tuple[MicroBatch, ...], int | None]]

BATCHES_AT_ONCE = 8
"""Times the pipeline's size: batches between two looks at a request to stop."""
TEXTS_AT_ONCE = 4096
"""Texts tokenized and packed together; bounds memory for large corpora while lengths still sort well."""


def require_finite(rows: Tensor, what: str) -> Tensor:
    """The rows, [rows, dim]. Raises UserError if a number in them is not finite: it would win every comparison."""
    bad = int((~torch.isfinite(rows).all(dim=-1)).sum())
    if bad:
        raise UserError(f"{bad} of {len(rows)} {what} are not finite; the model has diverged or overflowed: take an "
                        "earlier checkpoint, or a wider dtype")
    return rows


class RowRunner:
    """A loaded model on all ranks, whatever its rows are: each data-parallel rank takes a share of them."""

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology, *, pooling: Pooling, dim: int,
                 kernel: AttentionKernel, causal: bool) -> None:
        """`dim`: of what the model gives for a row."""
        self.chunks = chunks
        self.topology = topology
        self.pooling = pooling
        self.dim = dim
        self.kernel = kernel
        self.causal = causal
        self.shape = unwrapped(chunks[0]).shape

    def rows_of(self, items: Sequence[Item], pack: Pack[Item],
                bar: "tqdm[Any]") -> Tensor:
        """What the model gives for each item, [items, dim] float32 on the CPU of every rank, in order.

        Called by all ranks. Each data-parallel rank runs every dp_size-th item; one all-gather over the data-parallel
        group and one broadcast over the pipeline per 4096 items of a rank, and one all-reduce of an integer over the
        world. Dropout is off meanwhile. A training run's evaluation is broken off between two batches if some rank is
        asked to stop: what is left is skipped, and the ranks agree before anything of it is used.

        Args:
            items: a sequence that reads its items from a file is asked for this rank's share alone.
            pack: some items -> their bins (rows are numbered as the items), and the first of them without tokens.
            bar: counts items; closed at the end.
        Raises:
            EmptyTextError: for the first item without tokens of these 4096, on every rank alike.
            DataError: an item cannot be read from its file any more, on every rank alike.
            PreemptedError: some rank was asked to stop, on every rank alike.
        """
        size, rank = self.topology.dp_size, self.topology.dp_rank
        result = torch.empty(len(items), self.dim)
        block = TEXTS_AT_ONCE * size
        with bar, _evaluation_mode(self.chunks):
            for first in range(0, len(items), block):
                leave_if_asked()
                part = items[first : first + block]
                capacity = -(-len(part) // size)
                share = part[rank::size]
                # A rank without items runs the first one for nothing: the experts it holds are asked by others.
                bins, bad, error = _packed(pack, share or part[:1])
                wrong = len(part) if bad is None else bad * size + rank
                row = smallest(wrong if error is None else -1)
                if row < 0:
                    raise_on_all_ranks(error)
                if row < len(part):
                    raise EmptyTextError(first + row, f"text number {first + row + 1}", str(part[row]))
                rows = self._run_share(bins, len(share))
                if self.topology.is_last_stage:
                    gathered = gather_padded(rows, capacity, self.topology.dp_group)
                else:
                    gathered = torch.zeros(size, capacity, self.dim, device=self.topology.device)
                gathered = send_from_last(gathered, self.topology.groups.pp)
                result[first : first + len(part)] = gathered.transpose(0, 1).reshape(-1, self.dim)[: len(part)].cpu()
                bar.update(len(part))
            leave_if_asked()
        return result

    def _run_share(self, bins: Sequence[MicroBatch], num_items: int) -> Tensor:
        """[num_items, dim] of this rank's items; empty before the last stage."""
        # Where experts lie on several ranks, all of these run as many bins as the busiest, or an exchange of tokens
        # would wait for ever. Ranks of one replica have the same bins; the data-parallel group joins the replicas.
        batches = [to_device(micro, self.topology, self.pooling, kernel=self.kernel, causal=self.causal,
                             shape=self.shape)
                   for micro in bins]
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
            return torch.zeros(0, self.dim, device=self.topology.device)
        return rows[:num_items]

    def _run_until_asked(self, batches: Sequence[DeviceMicroBatch], num_items: int) -> Tensor:
        """The same a few batches at a time, until somebody is asked to stop; zeros from there on.

        Where a model lies on several ranks, these agree before each time: one small all-reduce over the world.
        """
        topology = self.topology
        alone = topology.world_size == topology.dp_size and topology.sizes.expert_model_parallel_size == 1 and (
            topology.sizes.expert_tensor_parallel_size == 1)
        at_once = 1 if topology.pp_size == 1 else BATCHES_AT_ONCE * topology.pp_size
        times = -(-len(batches) // at_once)
        result = torch.zeros(max(num_items, 1), self.dim, device=topology.device)
        for start in range(0, at_once * (times if alone else largest(times, dist.group.WORLD)), at_once):
            if stop.asked() if alone else smallest(-int(stop.asked())) < 0:
                break
            some = batches[start : start + at_once]
            rows = embed(self.chunks, some, topology) if some else None
            if rows is not None:
                kept = torch.cat([batch.valid_rows for batch in some]).to(rows.device)
                result.index_copy_(0, kept, rows[kept])
        return result[:num_items] if topology.is_last_stage else result[:0]


def _packed(pack: Pack[Item], items: Sequence[Item]) -> tuple[tuple[MicroBatch, ...], int | None, DataError | None]:
    """What `pack` gives, and what kept it from reading the items: the other ranks would wait."""
    try:
        return *pack(items), None
    except DataError as error:
        return (), None, error


class TextEncoder(RowRunner):
    """A loaded embedding model with its tokenizer. Every method is called by all ranks together."""

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology, tokenizer: RoleTokenizer, *,
                 pooling: Pooling, dim: int, kernel: AttentionKernel, causal: bool,
                 micro_batch_tokens: int = 8192) -> None:
        """`micro_batch_tokens`: of one packed bin, padding included; a longer text gets a bin of its own."""
        super().__init__(chunks, topology, pooling=pooling, dim=dim, kernel=kernel, causal=causal)
        self.tokenizer = tokenizer
        self.micro_batch_tokens = micro_batch_tokens

    def encode(self, texts: Sequence[str], role: Role, *, instruction: str | None = None,
               show_progress: bool = False) -> Tensor:
        """[texts, dim] float32 on the CPU of every rank, in the order of `texts`. Communicates as `rows_of` does.

        `instruction`: for a prompt with a place for it; null: the tokenizer's.

        Raises:
            EmptyTextError: for a text without tokens, on every rank alike.
            UserError: a vector that is not finite, on every rank alike.
        """

        def pack(part: Sequence[str]) -> tuple[tuple[MicroBatch, ...], int | None]:
            return self._pack_share(list(part), role, instruction)

        bar = tqdm(total=len(texts), unit="text", desc=f"encode {role}", disable=None if show_progress else True)
        try:
            return require_finite(self.rows_of(texts, pack, bar), f"{role} embeddings")
        except EmptyTextError as error:
            raise EmptyTextError(error.row, f"{role} text number {error.row + 1}", error.text) from None

    def _pack_share(self, texts: Sequence[str], role: Role,
                    instruction: str | None) -> tuple[tuple[MicroBatch, ...], int | None]:
        """This rank's bins, and the number of its first text without tokens if there is one."""
        packing = PackingSpec(micro_batch_tokens=self.micro_batch_tokens,
                              alignment=token_alignment(self.topology.sizes), uniform_size=self.topology.pp_size > 1)
        try:
            return build_encode_batches(texts, role, self.tokenizer, packing, instruction=instruction), None
        except EmptyTextError as error:
            return (), error.row


@contextlib.contextmanager
def _evaluation_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)
