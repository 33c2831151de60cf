"""Sparse vectors of texts: [texts, vocabulary] matrices of scipy in compressed rows (CSR), block by block."""

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import scipy.sparse
import torch
import torch.distributed as dist
from scipy.sparse import csr_array
from torch import Tensor
from tqdm import tqdm

from megatron_embed.batch import TextVectors
from megatron_embed.evaluation.encode import VECTOR_TEXTS_AT_ONCE, TextEncoder
from megatron_embed.losses.joint import NO_TOKEN, JointTexts, TokenWeights
from megatron_embed.names import Role
from megatron_embed.parallel.collectives import gather_padded, largest, send_from_last

SparseMatrix = csr_array
"""[texts, vocabulary] float32, the tokens of a text in ascending order."""
Entries = tuple[Tensor, Tensor]
"""([entries, 2] int64 text and token of the vocabulary, [entries] float32 weight) of a matrix, in any order."""


def own_matrix(encoder: TextEncoder, own: TextVectors) -> csr_array:
    """[this rank's texts, vocabulary] on the CPU, of `encoder.share`. Called by all tensor-parallel ranks of a last
    stage: the shares of the vocabulary are put together, by two all-gathers of their entries."""
    return _matrix(_own_entries(encoder, own), (len(own.counts), encoder.dim))


def sparse_blocks(encoder: TextEncoder, texts: Sequence[str], role: Role, *, instruction: str | None = None,
                  show_progress: bool = False) -> Iterator[csr_array]:
    """The vectors of all texts in order, block by block, on the CPU of every rank. Called by all ranks.

    A block is VECTOR_TEXTS_AT_ONCE texts of each data-parallel rank; its entries are gathered over the tensor- and the
    data-parallel ranks and broadcast over the pipeline.

    Raises: as TextEncoder's `encode`.
    """
    topology = encoder.topology
    size = VECTOR_TEXTS_AT_ONCE * topology.dp_size
    with tqdm(total=len(texts), unit="text", desc=f"encode {role}", disable=None if show_progress else True) as bar:
        for first in range(0, len(texts), size):
            part = texts[first : first + size]
            own = encoder.share(part, role, first, instruction=instruction)
            entries = None
            if topology.is_last_stage:
                places, weights = _own_entries(encoder, own)
                places = torch.stack([places[:, 0] * topology.dp_size + topology.dp_rank, places[:, 1]], dim=1)
                entries = _gathered((places, weights), topology.dp_group)
            yield _matrix(_from_last(entries, topology.groups.pp, topology.device), (len(part), encoder.dim))
            bar.update(len(part))


def sparse_vectors(encoder: TextEncoder, texts: Sequence[str], role: Role, *, instruction: str | None = None,
                   show_progress: bool = False) -> csr_array:
    """The vectors of a few texts, on the CPU of every rank; see `sparse_blocks`. Of a joint model the weights of the
    tokens that a text contains."""
    if encoder.tokenizer.joint is not None:
        dim, rows = encoder.shape.vocab_size, encoder.tokenizer.joint.dense_rows
        blocks = [_joint_matrix(JointTexts(block, rows).weights, dim) for block in encoder.blocks(
            texts, role, instruction=instruction, show_progress=show_progress)]
    else:
        dim = encoder.dim
        blocks = list(sparse_blocks(encoder, texts, role, instruction=instruction, show_progress=show_progress))
    return scipy.sparse.vstack(blocks, format="csr") if blocks else csr_array((0, dim), dtype=np.float32)


def _joint_matrix(own: TokenWeights, dim: int) -> csr_array:
    counts = own.ids != NO_TOKEN
    places = torch.stack([own.texts[counts], own.ids[counts]], dim=1)
    return _matrix((places, own.weights[counts]), (own.num_texts, dim))


def write_matrix(file: BinaryIO, matrix: csr_array) -> None:
    """A .npz file that `scipy.sparse.load_npz` reads."""
    scipy.sparse.save_npz(file, matrix, compressed=False)


def _own_entries(encoder: TextEncoder, own: TextVectors) -> Entries:
    """The entries of this data-parallel rank's texts, of the whole vocabulary."""
    places = own.vectors.nonzero()
    weights = own.vectors[places[:, 0], places[:, 1]]
    places = places + torch.tensor([0, encoder.width * encoder.topology.tp_rank], device=places.device)
    return _gathered((places, weights), encoder.topology.groups.tp)


def _gathered(entries: Entries, group: dist.ProcessGroup) -> Entries:
    """Those of all ranks of the group."""
    if group.size() == 1:
        return entries
    places, weights = entries
    capacity = largest(len(weights), group)
    counts = gather_padded(torch.tensor([len(weights)]), 1, group)[:, 0].tolist()
    parts = [gather_padded(values, capacity, group) for values in (places, weights)]
    kept_places, kept_weights = (torch.cat([rows[:count] for rows, count in zip(part, counts, strict=True)])
                                 for part in parts)
    return kept_places, kept_weights


def _from_last(entries: Entries | None, group: dist.ProcessGroup, device: torch.device) -> Entries:
    """The last stage's, on every stage."""
    if group.size() == 1:
        assert entries is not None
        return entries
    count = int(send_from_last(torch.tensor([0 if entries is None else len(entries[1])]), group))
    places, weights = entries or (torch.zeros(count, 2, dtype=torch.int64, device=device),
                                  torch.zeros(count, device=device))
    return send_from_last(places, group), send_from_last(weights, group)


def _matrix(entries: Entries, shape: tuple[int, int]) -> csr_array:
    places, weights = (part.cpu().numpy() for part in entries)
    matrix = csr_array((weights.astype(np.float32), (places[:, 0], places[:, 1])), shape=shape)
    matrix.sort_indices()
    return matrix
