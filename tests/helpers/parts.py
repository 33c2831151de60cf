"""What the reference knows of micro-batches and masks, from the texts of the rows."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec, build_embed_batch, split_to_count
from megatron_embed.data.records import Record
from megatron_embed.data.tokenizer import RoleTokenizer
from tests.helpers.cases import NUM_NEGATIVES, Case


@dataclass(frozen=True, kw_only=True)
class Part:
    """One micro-batch of one data-parallel rank."""

    texts: tuple[int, ...]
    """Indices of its texts; all texts are counted row by row: a query, then its documents."""
    repeated: bool
    """Run again only to keep the ranks in step."""


def documents_of(record: Record) -> list[str]:
    return [record.positive[0], *record.negatives[:NUM_NEGATIVES]]


def micro_batches_of(case: Case, records: Sequence[Record], tokenizer: RoleTokenizer) -> list[list[Part]]:
    """Micro-batches of each data-parallel rank. Under a token budget they are those of `data`, of which nothing else is
    used."""
    texts = list(itertools.accumulate((1 + len(documents_of(record)) for record in records), initial=0))
    share = len(records) // case.layout.dp
    rows = [range(rank * share, (rank + 1) * share) for rank in range(case.layout.dp)]
    if case.tokens is None:
        size = share // case.micro_batches
        return [[Part(texts=tuple(range(texts[first], texts[first + size])), repeated=False)
                 for first in mine[::size]] for mine in rows]
    keep_groups_together = case.negatives == "micro_batch"
    batches = [build_embed_batch([records[row] for row in mine], tokenizer,
                                 PackingSpec(micro_batch_tokens=case.tokens, keep_groups_together=keep_groups_together),
                                 DocumentsPerQuery(negatives=NUM_NEGATIVES)) for mine in rows]
    count = max(len(batch.micro_batches) for batch in batches)
    count += -count % (case.layout.pp if case.layout.vpp > 1 else 1)
    parts = []
    for mine, batch in zip(rows, batches, strict=True):
        indices = [texts[row] for row in mine]
        indices += [texts[row] + position for row in mine for position in range(1, texts[row + 1] - texts[row])]
        filled = split_to_count(batch, count, batch.micro_capacity, keep_groups_together=keep_groups_together)
        parts.append([Part(texts=tuple(indices[row] for row in micro.rows.tolist()), repeated=micro.repeated)
                      for micro in filled.micro_batches])
    return parts


def pools_of(case: Case, micro_batches: Sequence[Sequence[Part]],
             records: Sequence[Record]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(indices of queries, indices of the documents that they are compared with), each query once, ascending."""
    kinds = [position == 0 for record in records for position in range(1 + len(documents_of(record)))]
    queries = {text: index for index, text in enumerate(text for text, query in enumerate(kinds) if query)}
    documents = {text: index for index, text in enumerate(text for text, query in enumerate(kinds) if not query)}
    together = [set(queries) | set(documents)]
    if case.negatives == "micro_batch":
        together = [{text for part in parts if not part.repeated for text in part.texts}
                    for parts in zip(*micro_batches, strict=True)]
    pools = [tuple(torch.tensor(sorted(indices[text] for text in texts & indices.keys()))
                   for indices in (queries, documents)) for texts in together if texts]
    assert sum(len(pool) for pool, _ in pools) == len(queries)
    return pools


def excluded_pairs(records: Sequence[Record]) -> torch.Tensor:
    """[queries, documents] bool: documents whose text some row with the same query has as a positive, except a row's
    own first positive."""
    documents = [(row, position, text) for row, record in enumerate(records)
                 for position, text in enumerate(documents_of(record))]
    return torch.tensor([[
        any(other.query == record.query and text in other.positive for other in records)
        and (owner, position) != (row, 0) for owner, position, text in documents]
        for row, record in enumerate(records)])
