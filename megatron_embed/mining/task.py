"""The mining task: unique queries and documents of the training rows, and the rows written with mined negatives."""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import NamedTuple, TextIO, overload

from megatron_embed.data.corpus import ID_KEYS
from megatron_embed.data.jsonl import parse_object, read_lines
from megatron_embed.data.records import Record, id_from_text
from megatron_embed.data.row_fields import Row, name_of, titled
from megatron_embed.errors import DataError
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
    documents: list[str]
    """The corpus, then every positive that it lacks."""
    positives: list[list[int]]
    """By query: documents that are a positive of any row with its text; at least one."""
    excluded: list[list[int]]
    """By query: its positives, then other documents that are never its negatives."""
    names: dict[int, str] = field(default_factory=dict)
    """By document: its id, if a row or the corpus has one."""

    @property
    def most_positives(self) -> int:
        """Largest number of positives of a query."""
        return max(map(len, self.positives))

    @property
    def most_excluded(self) -> int:
        """Largest number of excluded documents of a query."""
        return max(map(len, self.excluded))


class CorpusTexts(NamedTuple):
    """The documents of a file."""

    texts: list[str]
    """`title + " " + text` where the title is not empty."""
    names: Sequence[str | None] = ()
    """Their ids."""
    title_lengths: Sequence[int] = ()
    """Characters of each leading title and the space after it."""


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


def build_task(records: Sequence[Record], prompts: Sequence[str], corpus: CorpusTexts | None, *,
               mine_query_text: bool = False) -> MiningTask:
    """Collect the queries, documents and positives of the rows.

    Args:
        records: the rows.
        prompts: each row's query prompt. Rows with equal query texts share their positives, whatever their prompts.
        corpus: documents to search; None: every positive and negative of the rows.
        mine_query_text: whether a document equal to the query's text may be a negative.
    """
    own = chain.from_iterable(record.positive for record in records)
    if corpus is None:
        own = chain(own, chain.from_iterable(record.negatives for record in records))
    documents = list(dict.fromkeys(chain(() if corpus is None else corpus.texts, own)))
    index_of = {text: index for index, text in enumerate(documents)}
    positives_of: dict[str, dict[int, None]] = {}
    forms_of: dict[str, Forms] = {}
    for record in records:
        positives_of.setdefault(record.query, {}).update(dict.fromkeys(index_of[text] for text in record.positive))
        forms = forms_of.setdefault(record.query, Forms())
        for text, name in zip_longest(record.positive, (record.document_ids or ())[:len(record.positive)]):
            forms.add(NamedDocument(index_of[text], text, 0, name))
    excluded_of = never_negatives(lambda: _named_documents(records, corpus, index_of), positives_of, forms_of,
                                  query_too=not mine_query_text)
    queries: dict[tuple[str, str, str | None], int] = {}
    query_of_row = [queries.setdefault((prompt, record.query, record.instruction), len(queries))
                    for prompt, record in zip(prompts, records, strict=True)]
    first_row: dict[int, int] = {}
    for row, query in enumerate(query_of_row):
        first_row.setdefault(query, row)
    return MiningTask(queries=[prompt + text for prompt, text, _ in queries], query_of_row=query_of_row,
                      row_of_query=list(first_row.values()), documents=documents,
                      positives=[list(positives_of[text]) for _, text, _ in queries],
                      excluded=[excluded_of[text] for _, text, _ in queries],
                      names=_names(_named_documents(records, corpus, index_of)))


def _named_documents(records: Sequence[Record], corpus: CorpusTexts | None,
                     index_of: Mapping[str, int]) -> Iterator[NamedDocument]:
    """The task's documents as in the rows, then as in the corpus."""
    for record in records:
        for text, name in zip_longest((*record.positive, *record.negatives), record.document_ids or ()):
            if text in index_of:
                yield NamedDocument(index_of[text], text, 0, name)
    for text, name, length in () if corpus is None else zip_longest(*corpus):
        yield NamedDocument(index_of[text], text, length or 0, name)


def _names(documents: Iterable[NamedDocument]) -> dict[int, str]:
    """Each document's first id."""
    names: dict[int, str] = {}
    for document in documents:
        if document.name is not None:
            names.setdefault(document.document, document.name)
    return names


def read_corpus(path: str, key: str = "--corpus") -> CorpusTexts:
    """Read the documents of rows `{"text": str, "title"?: str, "_id"?: str}`.

    A document is `title + " " + text` where the title is not empty. Its id may also have the key `docid` or `id`, and
    may be an integer or absent.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row is invalid, or the file has no rows.
    """
    texts: list[str] = []
    names: list[str | None] = []
    title_lengths = array("q")
    for line in read_lines(path, key):
        source = f"{path}:{line.line_number}"
        row = parse_object(line.raw, source)
        texts.append(titled(row, "", source))
        names.append(_optional_name(row, source))
        title_lengths.append(len(texts[-1]) - len(str(row["text"])))
    if not texts:
        raise DataError(f'{path}:1: no rows; a row is one line such as {{"text": "..."}}')
    return CorpusTexts(texts, names, title_lengths)


def _optional_name(row: Row, source: str) -> str | None:
    """The id of a row, or None."""
    for key in ID_KEYS:
        value = row.get(key)
        if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.strip()):
            return name_of(value, key, source)
    return None


def write_rows(file: TextIO, records: Sequence[Record], task: MiningTask, mined: Sequence[Mined],
               least_negatives: int = 0) -> None:
    """Write each row, in order, with the mined negatives instead of its own and the scores of its documents; not those
    with fewer negatives than `least_negatives`.

    `teacher_scores` contains the scores of the row's positives, then of the negatives. A row with an id for any of its
    documents gets `positive_ids` and `negative_ids`: the row's own ids, those of other rows and the corpus, and for a
    document without an id a hash of its text, which is equal only for equal texts.
    """
    index_of = {text: index for index, text in enumerate(task.documents)}
    for record, query in zip(records, task.query_of_row, strict=True):
        result = mined[query]
        if len(result.negatives) < least_negatives:
            continue
        score_of = dict(zip(task.positives[query], result.positive_scores, strict=True))
        row: dict[str, object] = {"query": record.query, "positive": list(record.positive),
                                  "negatives": [task.documents[document] for document, _ in result.negatives]}
        if record.instruction is not None:
            row["instruction"] = record.instruction
        row["teacher_scores"] = [*(score_of[index_of[text]] for text in record.positive),
                                 *(score for _, score in result.negatives)]
        ids = _ids_of(record, [index_of[text] for text in record.positive], result, task)
        if ids is not None:
            row["positive_ids"], row["negative_ids"] = ids[:len(record.positive)], ids[len(record.positive):]
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _ids_of(record: Record, positives: Sequence[int], mined: Mined, task: MiningTask) -> list[str] | None:
    """Ids of the row's positives, then of its mined negatives; None if none of them has one."""
    documents = [*positives, *(document for document, _ in mined.negatives)]
    known: list[str | None] = [task.names.get(document) for document in documents]
    if record.document_ids is not None:
        known[:len(positives)] = record.document_ids[:len(positives)]
    if not any(name is not None for name in known):
        return None
    return [id_from_text(task.documents[document]) if name is None else name
            for document, name in zip(documents, known, strict=True)]
