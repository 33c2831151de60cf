"""What is asked, of which documents, and where the answers go: rows of training data before and after mining."""

import json
from array import array
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
    """Each query and each document once."""

    queries: list[str]
    """With their prompts in front: what is embedded, or tokenized for BM25."""
    query_of_row: list[int]
    row_of_query: list[int]
    """The first row that asks it."""
    documents: list[str]
    """The corpus, and every positive that it lacks."""
    positives: list[list[int]]
    """By query: numbers of the documents that are a positive of any row with its text; at least one."""
    excluded: list[list[int]]
    """By query: its positives, then other documents that are never its negatives."""
    names: dict[int, str] = field(default_factory=dict)
    """By document: its id, where a row or the corpus has one."""

    @property
    def most_positives(self) -> int:
        """Positives of the query that has the most."""
        return max(len(numbers) for numbers in self.positives)

    @property
    def most_excluded(self) -> int:
        """Documents that are left out for the query with most of these."""
        return max(len(numbers) for numbers in self.excluded)


class CorpusTexts(NamedTuple):
    """The documents of a file."""

    texts: list[str]
    """`title + " " + text` where the title is not empty."""
    names: Sequence[str | None] = ()
    """Their ids."""
    title_lengths: Sequence[int] = ()
    """Characters of the title in front, with the blank behind it."""


@dataclass(frozen=True, kw_only=True)
class Mined:
    """What was found for one query, with its scores."""

    positive_scores: list[float]
    """In the order of the task's positives."""
    negatives: list[Candidate]


class MinedRows(Sequence[Mined]):
    """What was found, by query, in 12 bytes for each negative: as Python objects it would be a hundred."""

    def __init__(self) -> None:
        self._documents, self._scores, self._positive_scores = array("q"), array("f"), array("f")
        self._ends = [array("q"), array("q")]

    def append(self, mined: Mined) -> None:
        """The next query's; scores are kept as float32, which they are."""
        self._documents.extend(document for document, _ in mined.negatives)
        self._scores.extend(score for _, score in mined.negatives)
        self._positive_scores.extend(mined.positive_scores)
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
            return [self[number] for number in range(*query.indices(len(self)))]
        if not -len(self) <= query < len(self):
            raise IndexError(query)
        query %= len(self)
        own, positive = (slice(ends[query - 1] if query else 0, ends[query]) for ends in self._ends)
        return Mined(positive_scores=list(self._positive_scores[positive]),
                     negatives=list(zip(self._documents[own], self._scores[own], strict=True)))


def build_task(records: Sequence[Record], prompts: Sequence[str], corpus: CorpusTexts | None, *,
               mine_query_text: bool = False) -> MiningTask:
    """Queries, documents and positives of the rows.

    Args:
        records: the rows.
        prompts: of each row's query. Rows with one query text share their positives, whatever their prompts.
        corpus: what is searched; None: every positive and negative of the rows.
        mine_query_text: whether a document that equals the query's text may be a negative.
    """
    own = chain.from_iterable(record.positive for record in records)
    if corpus is None:
        own = chain(own, chain.from_iterable(record.negatives for record in records))
    documents = list(dict.fromkeys(chain(() if corpus is None else corpus.texts, own)))
    number_of = {text: number for number, text in enumerate(documents)}
    positives_of: dict[str, dict[int, None]] = {}
    forms_of: dict[str, Forms] = {}
    for record in records:
        positives_of.setdefault(record.query, {}).update(dict.fromkeys(number_of[text] for text in record.positive))
        forms = forms_of.setdefault(record.query, Forms())
        for text, name in zip_longest(record.positive, (record.document_ids or ())[:len(record.positive)]):
            forms.add(NamedDocument(number_of[text], text, 0, name))
    excluded_of = never_negatives(lambda: _named_documents(records, corpus, number_of), positives_of, forms_of,
                                  query_too=not mine_query_text)
    asked: dict[tuple[str, str, str | None], int] = {}
    query_of_row = [asked.setdefault((prompt, record.query, record.instruction), len(asked))
                    for prompt, record in zip(prompts, records, strict=True)]
    first_row: dict[int, int] = {}
    for row, query in enumerate(query_of_row):
        first_row.setdefault(query, row)
    return MiningTask(queries=[prompt + text for prompt, text, _ in asked], query_of_row=query_of_row,
                      row_of_query=list(first_row.values()), documents=documents,
                      positives=[list(positives_of[text]) for _, text, _ in asked],
                      excluded=[excluded_of[text] for _, text, _ in asked],
                      names=_names(_named_documents(records, corpus, number_of)))


def _named_documents(records: Sequence[Record], corpus: CorpusTexts | None,
                     number_of: Mapping[str, int]) -> Iterator[NamedDocument]:
    """The documents of the task as the rows have them, then as the corpus has them."""
    for record in records:
        for text, name in zip_longest((*record.positive, *record.negatives), record.document_ids or ()):
            if text in number_of:
                yield NamedDocument(number_of[text], text, 0, name)
    for text, name, length in () if corpus is None else zip_longest(*corpus):
        yield NamedDocument(number_of[text], text, length or 0, name)


def _names(documents: Iterable[NamedDocument]) -> dict[int, str]:
    """Each document's first id."""
    names: dict[int, str] = {}
    for document in documents:
        if document.name is not None:
            names.setdefault(document.number, document.name)
    return names


def read_corpus(path: str, key: str = "--corpus") -> CorpusTexts:
    """The documents of rows `{"text": str, "title"?: str, "_id"?: str}`.

    A document is `title + " " + text` where the title is not empty. Its id may also be called `docid` or `id`, and be
    an integer; null where there is none.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used, or there is no row.
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
    """The id of a row, null where it has none."""
    for key in ID_KEYS:
        value = row.get(key)
        if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.strip()):
            return name_of(value, key, source)
    return None


def write_rows(file: TextIO, records: Sequence[Record], task: MiningTask, mined: Sequence[Mined]) -> None:
    """One row for each row, in order: the mined negatives in place of its own, and the scores of both kinds.

    `teacher_scores` holds the row's positives first, then the negatives. A row of whose documents any has an id gets
    `positive_ids` and `negative_ids`: the row's own, those of the rows and the corpus, and for a document without one
    a hash of its text, which keeps apart what equal texts do anyway.
    """
    number_of = {text: number for number, text in enumerate(task.documents)}
    for record, query in zip(records, task.query_of_row, strict=True):
        found = mined[query]
        score_of = dict(zip(task.positives[query], found.positive_scores, strict=True))
        row: dict[str, object] = {"query": record.query, "positive": list(record.positive),
                                  "negatives": [task.documents[number] for number, _ in found.negatives]}
        if record.instruction is not None:
            row["instruction"] = record.instruction
        row["teacher_scores"] = [*(score_of[number_of[text]] for text in record.positive),
                                 *(score for _, score in found.negatives)]
        ids = _ids_of(record, [number_of[text] for text in record.positive], found, task)
        if ids is not None:
            row["positive_ids"], row["negative_ids"] = ids[:len(record.positive)], ids[len(record.positive):]
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _ids_of(record: Record, positives: Sequence[int], found: Mined, task: MiningTask) -> list[str] | None:
    """Of the row's positives, then of its mined negatives; null where none has one."""
    numbers = [*positives, *(number for number, _ in found.negatives)]
    known: list[str | None] = [task.names.get(number) for number in numbers]
    if record.document_ids is not None:
        known[:len(positives)] = record.document_ids[:len(positives)]
    if not any(name is not None for name in known):
        return None
    return [id_from_text(task.documents[number]) if name is None else name
            for number, name in zip(numbers, known, strict=True)]
