"""The records that rows of training data become: the types that sampler, packing and objectives share."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.jsonl import shortened
from megatron_embed.data.number_checks import check_score, check_teacher
from megatron_embed.errors import DataError

logger = logging.getLogger(__name__)

Kind = Literal["contrastive", "pairs", "rerank"]
"""The records that an objective takes: a query with positives and hard negatives, a pair with a score, or a list with
labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One query with the documents it was given, or (`score` set) a pair of texts with its label."""

    query: str
    """`text_a` of a pair."""
    positive: tuple[str, ...]
    """At least one. A pair has `text_b` alone."""
    negatives: tuple[str, ...]
    """Hard negatives, best first; may be empty."""
    instruction: str | None
    """Replaces `{instruction}` in the query's prompt."""
    source: str
    """FILE:LINE (FILE:ROW of a table), for messages."""
    score: float | None = None
    """Score of a pair, as it stands in the row; None: not a pair."""
    teacher_scores: tuple[float, ...] | None = None
    """A teacher's score of each text of `positive`, then of `negatives`; None: the row has none."""
    document_ids: tuple[str, ...] | None = None
    """The row's own ids of `positive`, then of `negatives`, unique in its file; None: the row has none."""
    query_prompt: str | None = None
    """Prompt of the row's data set, in place of `data.query_prompt`."""
    document_prompt: str | None = None
    """Prompt of the row's data set, in place of `data.document_prompt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRecord:
    """One query with a list of labelled documents, a group for a reranker."""

    query: str
    documents: tuple[str, ...]
    """At least one, in the row's order."""
    labels: tuple[float, ...]
    """One per document, 0 or less: not relevant; may be graded."""
    instruction: str | None
    source: str
    """FILE:LINE (FILE:ROW of a table), for messages."""
    teacher_scores: tuple[float, ...] | None = None
    """A teacher's score of each document; None: the row has none."""
    document_ids: tuple[str, ...] | None = None
    """The row's own ids of the documents, unique in its file; None: the row has none."""
    query_prompt: str | None = None
    document_prompt: str | None = None


AnyRecord = Record | RerankRecord
Item = TypeVar("Item")


def text_id(text: str) -> int:
    """Signed 64-bit hash of a text: the same for equal texts, on every machine and in every run."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def id_from_text(text: str) -> str:
    """An id made from the text, for a document without one among others that have ids."""
    return f"text:{text_id(text) & ((1 << 64) - 1):016x}"


def id_on_both_sides(record: AnyRecord) -> str | None:
    """An id that a positive and a negative of the row share, None where there is none."""
    if record.document_ids is None:
        return None
    if isinstance(record, Record):
        is_positive = [True] * len(record.positive) + [False] * len(record.negatives)
    else:
        is_positive = [label > 0 for label in record.labels]
    sides: tuple[set[str], set[str]] = (set(), set())
    for name, side in zip(record.document_ids, is_positive, strict=True):
        sides[side].add(name)
    return min(sides[0] & sides[1], default=None)


def refuse_id_on_both_sides(record: AnyRecord) -> None:
    """Raises DataError if a positive and a negative of the row have one id."""
    if (name := id_on_both_sides(record)) is not None:
        raise DataError(f"{record.source}: id {shortened(name)} is that of a positive and of a negative; a document "
                        "cannot be both, so remove it from one of them")


def as_kind(record: AnyRecord, kind: Kind) -> AnyRecord:
    """The record as an objective of this kind takes it.

    A reranker takes positives as label 1 and negatives as 0, and a pair as a list of one. A contrastive objective takes
    the documents of a list with labels above 0 as positives, the highest first, and the others as negatives.

    Raises:
        DataError: the row cannot be read so.
    """
    if kind == "rerank":
        return record if isinstance(record, RerankRecord) else _as_list(record)
    if isinstance(record, Record) and (record.score is not None) == (kind == "pairs"):
        return record
    if kind == "pairs":
        raise DataError(f"{record.source}: the row is not a pair with a score, which this objective.loss needs; give "
                        "it rows such as {\"text_a\": ..., \"text_b\": ..., \"score\": 0.8}, or choose another loss, "
                        "such as info_nce")
    if isinstance(record, Record):
        raise DataError(f"{record.source}: the row is a pair with a score, and this objective.loss takes a query with "
                        "its positives; choose a loss of pairs, such as cosent, or other rows")
    return _as_contrastive(record)


def _as_list(record: Record) -> RerankRecord:
    documents = (*record.positive, *record.negatives)
    if record.score is None:
        labels = (1.0,) * len(record.positive) + (0.0,) * len(record.negatives)
    else:
        labels = (record.score,)
    return RerankRecord(query=record.query, documents=documents, labels=labels, instruction=record.instruction,
                        source=record.source, teacher_scores=record.teacher_scores, document_ids=record.document_ids)


def _as_contrastive(record: RerankRecord) -> Record:
    order = sorted(range(len(record.labels)), key=lambda index: -max(record.labels[index], 0.0))
    num_positive = sum(label > 0 for label in record.labels)
    if not num_positive:
        raise DataError(f"{record.source}: no document of the row has a label above 0, so it has no positive; remove "
                        "the row, or train a reranker with it")
    documents = tuple(record.documents[index] for index in order)
    scores, ids = record.teacher_scores, record.document_ids
    return Record(query=record.query, positive=documents[:num_positive], negatives=documents[num_positive:],
                  instruction=record.instruction, source=record.source,
                  teacher_scores=None if scores is None else tuple(scores[index] for index in order),
                  document_ids=None if ids is None else tuple(ids[index] for index in order))


def require_fields(records: Iterable[AnyRecord], loss: str, *, teacher_scores: bool, negatives: bool,
                   labels: bool = False, teacher_temperature: float = 1.0) -> None:
    """Refuse the first row that lacks what the loss needs, or has numbers that it cannot use. Reads every row, unless
    the loss needs nothing. Scores that a cosine cannot reach are warned of once.

    Args:
        teacher_scores, negatives, labels: what the loss needs of a row.
        teacher_temperature: divides a teacher's scores in kl_distillation.
    Raises:
        DataError: beginning `FILE:LINE: `.
    """
    unreachable, first = 0, ""
    for record in records if teacher_scores or negatives or labels else ():
        if teacher_scores and record.teacher_scores is None:
            raise DataError(f"{record.source}: teacher_scores is missing, which objective.loss = {loss!r} learns from; "
                            "give the row one number per text of positive, then of negatives, or choose another loss")
        if negatives and isinstance(record, Record) and not record.negatives:
            raise DataError(f"{record.source}: negatives is empty, and objective.loss = {loss!r} compares the positive "
                            "with hard negatives; add one (megatron-embed mine finds some), or remove the row")
        if teacher_scores and record.teacher_scores is not None:
            check_teacher(record.teacher_scores, loss, teacher_temperature, record.source)
        if labels and isinstance(record, Record) and record.score is not None:
            check_score(record.score, loss, record.source)
            if loss == "cosine_similarity" and abs(record.score) > 1:
                unreachable, first = unreachable + 1, first or f"{record.source}: score {record.score:g}"
    if unreachable:
        logger.warning("%s: a cosine is 1 at most, so objective.loss = cosine_similarity can never reach it (%d such "
                       "rows); give the entry of data.train its score_range, such as [0, 5]", first, unreachable)


ANY_NUMBER = 2**31 - 1
"""In place of a number of documents: as many as a row has."""
_DOCUMENT_SAMPLING = 0xD0C5
"""Part of the seed: keeps the sampling of documents apart from other uses of the run's seed."""


def sampled_documents(record: Record, seed: Sequence[int]) -> Record:
    """The record with its positives, and its negatives, in random order, with their scores and ids.

    The first ones of each are then a sample without replacement, and the others are still known as the row's own.

    Args:
        seed: the same seed gives the same order.
    """
    generator = np.random.Generator(np.random.PCG64([_DOCUMENT_SAMPLING, *seed]))
    split, documents = len(record.positive), (*record.positive, *record.negatives)
    order = [*generator.permutation(split).tolist(), *(generator.permutation(len(record.negatives)) + split).tolist()]
    scores, ids = record.teacher_scores, record.document_ids
    return replace(record, positive=tuple(documents[index] for index in order[:split]),
                   negatives=tuple(documents[index] for index in order[split:]),
                   teacher_scores=None if scores is None else tuple(scores[index] for index in order),
                   document_ids=None if ids is None else tuple(ids[index] for index in order))


def documents_in_use(record: AnyRecord, num_negatives: int, num_positives: int = 1) -> tuple[str, ...]:
    """The documents that a step embeds or scores: the first positives and the first negatives, or the whole list."""
    if isinstance(record, RerankRecord):
        return record.documents
    return (*record.positive[:num_positives], *record.negatives[:num_negatives])


def shared_keys(record: AnyRecord, num_negatives: int) -> set[str]:
    """Texts and ids that no two rows of a global batch should share: query, positives, negatives in use.

    For a list with labels only the query: a reranker compares only the documents of one list.
    """
    if isinstance(record, RerankRecord):
        return {record.query}
    keys = {record.query, *record.positive, *record.negatives[:num_negatives]}
    if record.document_ids is not None:
        file = record.source.rpartition(":")[0]
        keys.update(f"\0{file}\0{name}" for name in record.document_ids[:len(record.positive) + num_negatives])
    return keys


class Records(Sequence[Item]):
    """A sequence given by `__len__` and `_record`; hashes of the records' texts are known without reading them."""

    @abstractmethod
    def text_ids(self, rows: NDArray[np.int64], num_negatives: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hashes of texts and ids that no two rows of a global batch should share, and whose they are.

        Query, positives, the first `num_negatives` negatives, then the documents' ids; of a list with labels the query
        alone, as a reranker compares only the documents of one list.

        Args:
            rows: indices of records, in any order.
        Returns:
            [hashes] int64, and [hashes] int64: the position in `rows` of the row that each belongs to, ascending.
        """

    @abstractmethod
    def _record(self, index: int) -> Item:
        """Record `index`, 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._record(index % len(self))
