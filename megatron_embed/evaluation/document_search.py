"""Exact search with models whose documents' vectors stay on the rank that embeds them: multi-vector and sparse ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor
from tqdm import tqdm

from megatron_embed.batch import TextVectors
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.evaluation.encode import VECTOR_TEXTS_AT_ONCE, TextEncoder
from megatron_embed.evaluation.joint_search import JointPairs, JointSearch
from megatron_embed.evaluation.maxsim_search import BlockPairs, BlockSearch, MaxSimSearch, PairScores
from megatron_embed.evaluation.sparse_search import SparsePairs, SparseSearch
from megatron_embed.evaluation.sparse_vectors import own_matrix, sparse_vectors

Vectors = TextVectors | csr_array
"""Vectors of texts: those of a multi-vector model, or of a sparse one."""
OnBlock = Callable[[Any, Tensor], None]
"""(vectors of some documents on their rank, [documents] int64 their indices)."""


def searches_of(encoder: TextEncoder, queries: Vectors, k: int, *,
                excluded: Tensor | None = None) -> tuple[OnBlock, dict[str, BlockSearch]]:
    """(what takes documents, the searches by the prefix of their metrics) that fit the model; see BlockSearch."""
    joint = encoder.tokenizer.joint
    if joint is not None:
        assert isinstance(queries, TextVectors)
        of_joint = JointSearch(queries, joint, k, excluded=excluded)
        return of_joint.add, of_joint.searches
    search = search_of(queries, k, excluded=excluded)
    return search.add, {"": search}


def search_of(queries: Vectors, k: int, *, excluded: Tensor | None = None) -> MaxSimSearch | SparseSearch:
    """The search that fits the queries of a multi-vector or sparse model; see BlockSearch."""
    if isinstance(queries, TextVectors):
        return MaxSimSearch(queries, k, excluded=excluded)
    return SparseSearch(queries, k, excluded=excluded)


def pairs_of(queries: Vectors, query_of: Tensor, document_of: Tensor, joint: JointFormat | None = None) -> BlockPairs:
    """The scores of pairs that fit the queries, of a joint model if `joint` is given; see BlockPairs."""
    if joint is not None:
        assert isinstance(queries, TextVectors)
        return JointPairs(queries, joint, query_of, document_of)
    if isinstance(queries, TextVectors):
        return PairScores(queries, query_of, document_of)
    return SparsePairs(queries, query_of, document_of)


def for_each_document(encoder: TextEncoder, texts: Sequence[str], on_blocks: Sequence[OnBlock], *,
                      instruction: str | None = None, show_progress: bool = False) -> None:
    """Hand the vectors of this rank's share of the documents to each function, block by block; they are not kept.

    Called by all ranks; `texts` may read each text on access, and is read on the rank that embeds it.

    Raises:
        EmptyTextError: a text without vectors, on every rank alike; its `row` counts through all texts.
    """
    topology = encoder.topology
    size = VECTOR_TEXTS_AT_ONCE * topology.dp_size
    with tqdm(total=len(texts), unit="text", desc="encode and search", disable=None if show_progress else True) as bar:
        for first in range(0, len(texts), size):
            block = texts[first : first + size]
            own = encoder.share(block, "document", first, instruction=instruction)
            if topology.is_last_stage and len(own.counts):
                indices = first + torch.arange(topology.dp_rank, len(block), topology.dp_size)
                vectors: Vectors = own_matrix(encoder, own) if encoder.pooling == "splade" else own
                for function in on_blocks:
                    function(vectors, indices)
            bar.update(len(block))


def vectors_of_queries(encoder: TextEncoder, texts: Sequence[str], *, instruction: str | None = None) -> Vectors:
    """The vectors of all queries, on every rank: a multi-vector model's on its device. Called by all ranks."""
    if encoder.pooling == "splade":
        return sparse_vectors(encoder, texts, "query", instruction=instruction)
    queries = encoder.vectors(texts, "query", instruction=instruction)
    return TextVectors(vectors=queries.vectors.to(encoder.topology.device), counts=queries.counts)


def scores_of_lists(encoder: TextEncoder, pairs: Sequence[Pair]) -> Tensor:
    """[pairs] MaxSim, dot product or a joint model's sum of scores of query and document, on every rank's CPU, so that
    such a model can rank lists. Encodes each text once. Called by all ranks."""
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    documents = list(dict.fromkeys(pair.document for pair in pairs))
    row_of_query = {text: row for row, text in enumerate(queries)}
    row_of_document = {text: row for row, text in enumerate(documents)}
    scores = pairs_of(vectors_of_queries(encoder, queries), torch.tensor([row_of_query[pair.query] for pair in pairs]),
                      torch.tensor([row_of_document[pair.document] for pair in pairs]), encoder.tokenizer.joint)
    for_each_document(encoder, documents, [scores.add])
    return scores.merged(encoder.topology)
