"""The mining task: unique queries and documents of the training rows, and the rows written with mined negatives."""

import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TextIO, overload

from megatron_embed.data.records import Record, id_from_text
from megatron_embed.mining.documents import CorpusFile, Documents
from megatron_embed.mining.exclusions import Forms, NamedDocument, never_negatives
from megatron_embed.mining.filters import Candidate


@dataclass(frozen=True, kw_only=True)
class MiningTask:
    """Unique queries and documents, referred to by their indices."""

    queries: list[str]
    """With their prompts, ready to embed or to tokenize for BM25."""
    query_of_row: list[int]
    row_of_query: list[int]
    """The first row with the query."""
    documents: Documents
    """The corpus, then every positive that it lacks."""
    positives: list[list[int]]
    """By query: documents that are a positive of any row with its text; at least one."""
    excluded: list[list[int]]
    """By query: its positives, then other documents that are never its negatives."""

    @property
    def most_positives(self) -> int:
        """Largest number of positives of a query."""
        return max(map(len, self.positives))

    @property
    def most_excluded(self) -> int:
        """Largest number of excluded documents of a query."""
        return max(map(len, self.excluded))


@dataclass(frozen=True, kw_only=True)
class Mined:
    """Scores of a query's positives, and its negatives."""

    positive_scores: list[float]
    """In the order of the task's positives."""
    negatives: list[Candidate]
    skipped: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Numbers of candidates that were skipped, by the reason; of MinedRows only their sum is known."""


class MinedRows(Sequence[Mined]):
    """Results by query in 12 bytes per negative; as Python objects they would take about a hundred.

    Attributes:
        skipped: sum over the queries of the numbers of candidates that were skipped, by the reason.
    """

    def __init__(self) -> None:
        self._documents, self._scores, self._positive_scores = array("q"), array("f"), array("f")
        self._ends = [array("q"), array("q")]
        self.skipped: Counter[str] = Counter()

    def append(self, mined: Mined) -> None:
        """Append the next query's result; its scores are float32 values."""
        self._documents.extend(document for document, _ in mined.negatives)
        self._scores.extend(score for _, score in mined.negatives)
        self._positive_scores.extend(mined.positive_scores)
        self.skipped.update(mined.skipped)
        for ends, values in zip(self._ends, (self._scores, self._positive_scores), strict=True):
            ends.append(len(values))

    def __len__(self) -> int:
        return len(self._ends[0])

    @overload
    def __getitem__(self, query: int) -> Mined: ...

    @overload
    def __getitem__(self, query: slice) -> list[Mined]: ...

    def __getitem__(self, query: int | slice) -> Mined | list[Mined]:
        if isinstance(query, slice):
            return [self[index] for index in range(*query.indices(len(self)))]
        if not -len(self) <= query < len(self):
            raise IndexError(query)
        query %= len(self)
        own, positive = (slice(ends[query - 1] if query else 0, ends[query]) for ends in self._ends)
        return Mined(positive_scores=list(self._positive_scores[positive]),
                     negatives=list(zip(self._documents[own], self._scores[own], strict=True)))


def build_task(records: Sequence[Record], prompts: Sequence[str], corpus: CorpusFile | None, *,
               mine_query_text: bool = False) -> MiningTask:
    """Collect the queries, documents and positives of the rows.

    Args:
        records: the rows.
        prompts: each row's query prompt. Rows with equal query texts share their positives, whatever their prompts.
        corpus: documents to search; None: every positive and negative of the rows.
        mine_query_text: whether a document equal to the query's text may be a negative.
    """
    documents = Documents(records, corpus)
    positives_of: dict[str, dict[int, None]] = {}
    forms_of: dict[str, Forms] = {}
    for record in records:
        positives_of.setdefault(record.query, {}).update(dict.fromkeys(map(documents.index, record.positive)))
        forms = forms_of.setdefault(record.query, Forms())
        for text, name in zip_longest(record.positive, (record.document_ids or ())[:len(record.positive)]):
            forms.add(NamedDocument(documents.index(text), text, 0, name))
    excluded_of = never_negatives(documents.named, positives_of, forms_of, query_too=not mine_query_text)
    queries: dict[tuple[str, str, str | None], int] = {}
    query_of_row = [queries.setdefault((prompt, record.query, record.instruction), len(queries))
                    for prompt, record in zip(prompts, records, strict=True)]
    first_row: dict[int, int] = {}
    for row, query in enumerate(query_of_row):
        first_row.setdefault(query, row)
    return MiningTask(queries=[prompt + text for prompt, text, _ in queries], query_of_row=query_of_row,
                      row_of_query=list(first_row.values()), documents=documents,
                      positives=[list(positives_of[text]) for _, text, _ in queries],
                      excluded=[excluded_of[text] for _, text, _ in queries])


def write_rows(file: TextIO, records: Sequence[Record], task: MiningTask, mined: Sequence[Mined],
               least_negatives: int = 0) -> None:
    """Write each row, in order, with the mined negatives instead of its own and the scores of its documents; not those
    with fewer negatives than `least_negatives`.

    `teacher_scores` contains the scores of the row's positives, then of the negatives. A row with an id for any of its
    documents gets `positive_ids` and `negative_ids`: the row's own ids, those of other rows and the corpus, and for a
    document without an id a hash of its text, which is equal only for equal texts.
    """
    index_of = task.documents.index
    for record, query in zip(records, task.query_of_row, strict=True):
        result = mined[query]
        if len(result.negatives) < least_negatives:
            continue
        score_of = dict(zip(task.positives[query], result.positive_scores, strict=True))
        row: dict[str, object] = {"query": record.query, "positive": list(record.positive),
                                  "negatives": [task.documents[document] for document, _ in result.negatives]}
        if record.instruction is not None:
            row["instruction"] = record.instruction
        row["teacher_scores"] = [*(score_of[index_of(text)] for text in record.positive),
                                 *(score for _, score in result.negatives)]
        ids = _ids_of(record, [index_of(text) for text in record.positive], result, task)
        if ids is not None:
            row["positive_ids"], row["negative_ids"] = ids[:len(record.positive)], ids[len(record.positive):]
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _ids_of(record: Record, positives: Sequence[int], mined: Mined, task: MiningTask) -> list[str] | None:
    """Ids of the row's positives, then of its mined negatives; None if none of them has one."""
    documents = [*positives, *(document for document, _ in mined.negatives)]
    known: list[str | None] = [task.documents.name(document) for document in documents]
    if record.document_ids is not None:
        known[:len(positives)] = record.document_ids[:len(positives)]
    if not any(name is not None for name in known):
        return None
    return [id_from_text(task.documents[document]) if name is None else name
            for document, name in zip(documents, known, strict=True)]
