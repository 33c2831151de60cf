"""Which format a file's rows have, told by the keys of its first row, and rows to records."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from megatron_embed.config.data import TrainFile
from megatron_embed.data import foreign_formats as peers
from megatron_embed.data.corpus import Corpus
from megatron_embed.data.jsonl import check_text, shortened
from megatron_embed.data.records import AnyRecord, Kind, Record, RerankRecord, as_kind
from megatron_embed.data.row_fields import (
    Row,
    check_keys,
    names,
    number,
    numbers,
    optional_numbers,
    optional_text,
    optional_texts,
    some_texts,
)
from megatron_embed.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the rows of one format look."""

    name: str
    """For the log and messages."""
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    without_use: tuple[str, ...] = ()
    """Keys that belong to the format and that training has no use for."""
    columns: bool = False
    """Whether there may be columns negative, negative_1, ..."""
    needs_column: bool = False
    """Whether there must be one of these or a label, and no `negatives`: else the row is one of ours."""
    of_ids: bool = False
    """The row names its documents by ids of a corpus."""
    read: Callable[[Row, str], AnyRecord]

    @property
    def known(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    def has_required(self, row: Iterable[str]) -> bool:
        """Whether these keys hold all that a row needs."""
        return set(row).issuperset(self.required)

    def fits(self, row: Iterable[str]) -> bool:
        """Whether a row with these keys is one."""
        keys = set(row)
        if not self.has_required(keys):
            return False
        return not self.needs_column or ("negatives" not in keys and any(
            key in peers.LABEL_COLUMNS or peers.NEGATIVE_COLUMN.fullmatch(key) for key in keys))

    def ignored(self, row: Row) -> set[str]:
        """Keys of the row that nobody looks at."""
        extra = row.keys() - {*self.known, *self.without_use}
        return {key for key in extra if not (self.columns and peers.NEGATIVE_COLUMN.fullmatch(key))}

    def checked(self, row: Row, source: str) -> AnyRecord:
        """The record of one row of this format.

        Raises:
            DataError: beginning with `source`, naming the field, its value and the remedy.
        """
        if self.columns:
            row = {key: value for key, value in row.items() if value is not None or key in self.required}
            plain = {key: value for key, value in row.items() if not peers.NEGATIVE_COLUMN.fullmatch(key)}
        else:
            plain = row
        check_keys(plain, self.required, self.known, source)
        return self.read(row, source)


def _read_ours(row: Row, source: str) -> Record:
    positive = some_texts(row["positive"], "positive", source)
    negatives = optional_texts(row, "negatives", source)
    scores = optional_numbers(row, "teacher_scores", source, len(positive) + len(negatives),
                              "texts of positive and negatives")
    ids = None
    if row.get("positive_ids") is None and row.get("negative_ids"):
        raise DataError(f"{source}: negative_ids = {shortened(row['negative_ids'])} is given without positive_ids; "
                        "give both, one id for each text, or neither")
    if row.get("positive_ids") is not None:
        found = [names(row.get(key) or [], key, source) for key in ("positive_ids", "negative_ids")]
        for key, given, of in zip(("positive", "negative"), found, (positive, negatives), strict=True):
            if len(given) != len(of):
                raise DataError(f"{source}: {key}_ids has {len(given)} ids for {len(of)} texts; give one for each")
        ids = (*found[0], *found[1])
    return Record(query=check_text(row["query"], "query", source), positive=positive, negatives=negatives,
                  instruction=optional_text(row, "instruction", source), source=source, teacher_scores=scores,
                  document_ids=ids)


def _read_pair(row: Row, source: str) -> Record:
    return Record(query=check_text(row["text_a"], "text_a", source), negatives=(), source=source,
                  positive=(check_text(row["text_b"], "text_b", source),),
                  instruction=optional_text(row, "instruction", source), score=number(row["score"], "score", source))


def _read_list(row: Row, source: str) -> RerankRecord:
    documents = some_texts(row["documents"], "documents", source)
    ids = None if row.get("document_ids") is None else names(row["document_ids"], "document_ids", source)
    if ids is not None and len(ids) != len(documents):
        raise DataError(f"{source}: document_ids has {len(ids)} ids for {len(documents)} documents; give one for each")
    return RerankRecord(
        query=check_text(row["query"], "query", source), documents=documents, source=source, document_ids=ids,
        labels=numbers(row["labels"], "labels", source, len(documents), "documents"),
        instruction=optional_text(row, "instruction", source),
        teacher_scores=optional_numbers(row, "teacher_scores", source, len(documents), "documents"))


def _columns(anchor: str, positive: str, *, needs_column: bool = False) -> Format:
    return Format(
        name=f"Sentence Transformers ({anchor}, {positive}, negative or label)", required=(anchor, positive),
        optional=("instruction", "negative", *peers.LABEL_COLUMNS), columns=True, needs_column=needs_column,
        read=functools.partial(peers.read_columns, anchor=anchor, positive=positive))


OURS = Format(name="megatron_embed (query, positive, negatives)", required=("query", "positive"), read=_read_ours,
              optional=("negatives", "instruction", "teacher_scores", "positive_ids", "negative_ids"),
              without_use=("query_id",))
FORMATS = (
    _columns("query", "positive", needs_column=True),
    OURS,
    Format(name="megatron_embed pairs (text_a, text_b, score)", required=("text_a", "text_b", "score"),
           optional=("instruction",), read=_read_pair),
    Format(name="megatron_embed lists (query, documents, labels)", required=("query", "documents", "labels"),
           optional=("instruction", "teacher_scores", "document_ids"), without_use=("query_id",), read=_read_list),
    Format(name="lists (query, docs)", required=("query", "docs"), read=peers.read_labelled_documents,
           optional=("labels", "instruction", "teacher_scores"), without_use=("query_id",)),
    Format(name="ms-swift (query, response)", required=("query", "response"), read=peers.read_swift_response,
           optional=("rejected_response", "label", "system", "history")),
    Format(name="ms-swift (messages, positive_messages)", required=("messages", "positive_messages"),
           optional=("negative_messages", "label"), read=peers.read_swift_messages),
    Format(name="FlagEmbedding (query, pos, neg)", required=("query", "pos"), read=peers.read_flag_embedding,
           optional=("neg", "pos_scores", "neg_scores", "prompt"), without_use=("type", "pos_id", "neg_id")),
    Format(name="Tevatron (query, positive_passages)", required=("query", "positive_passages"),
           optional=("negative_passages",), without_use=("query_id",), read=peers.read_tevatron_passages),
    Format(name="Tevatron (query, passages, scores)", required=("query", "passages", "scores"),
           without_use=("query_id",), read=peers.read_tevatron_scores),
    *(Format(name=f"Tevatron ({query}, positive_document_ids)", required=(query, "positive_document_ids"),
             optional=("negative_document_ids", "query_image", "query_video", "query_audio"),
             without_use=("query_id",), of_ids=True, read=peers.read_tevatron_ids)
      for query in ("query_text", "query")),
    Format(name="DPR (question, positive_ctxs)", required=("question", "positive_ctxs"), read=peers.read_dpr,
           optional=("hard_negative_ctxs", "negative_ctxs"), without_use=("dataset", "answers", "question_id")),
    *(Format(name=f"NeMo ({query}, pos_doc, neg_doc)", required=(query, "pos_doc"), optional=("neg_doc",),
             without_use=("question_id", "query_id"), read=peers.read_pos_doc)
      for query in ("query", "question")),
    _columns("anchor", "positive"),
    _columns("sentence1", "sentence2"),
    _columns("query", "answer"),
    _columns("question", "answer"),
)


def detect_format(row: Row, source: str) -> Format:
    """The format of a file whose first row this is.

    Raises:
        DataError: it has none; in the words of the nearest, of ours if none is near.
    """
    for keys in ([key for key, value in row.items() if value is not None], row):
        for form in FORMATS:
            if form.fits(keys):
                return form
    nearest = max((OURS, *FORMATS), key=lambda form: sum(key in row for key in form.required) / len(form.required))
    if not any(key in row for key in nearest.required):
        nearest = OURS
    check_keys(row, nearest.required, nearest.known, source)
    raise DataError(f"{source}: not a row of the format {nearest.name}; docs/data.md lists the formats")


class RowReader:
    """Rows of one `data.train` entry to records of one kind (null: as they come); the first row decides the format.

    Attributes:
        format: null before the first row.
        ignored: keys met that no one looks at.
    """

    def __init__(self, file: TrainFile, kind: Kind | None) -> None:
        self.format: Format | None = None
        self.ignored: set[str] = set()
        self._file = file
        self._kind = kind
        self._corpus = None if file.corpus is None else Corpus(file.corpus, key="data.train.corpus")

    def read(self, row: Row, source: str) -> AnyRecord:
        """The record of one row.

        Raises:
            DataError: beginning with `source`, naming the field, its value and the remedy.
        """
        if self.format is None:
            self.format = detect_format(row, source)
            self._check_corpus(self.format, source)
        form = self.format
        if not form.has_required(row) and (other := next((other for other in FORMATS if other.fits(row)), None)):
            raise DataError(f"{source}: a row of the format {other.name} in a file whose first row is "
                            f"{form.name}; give each format a file of its own")
        record = form.checked(row, source)
        if form.of_ids:
            assert isinstance(record, Record) and self._corpus is not None
            record = replace(record, positive=self._corpus.texts_of(record.positive, source),
                             negatives=self._corpus.texts_of(record.negatives, source))
        self.ignored |= form.ignored(row)
        return self.finished(record)

    def finished(self, record: AnyRecord) -> AnyRecord:
        """The record as the objective takes it, with what the entry says of all of its rows."""
        file = self._file
        if self._kind is not None:
            record = as_kind(record, self._kind)
        if file.query_prompt is None and file.document_prompt is None and file.instruction is None:
            return record
        return replace(record, query_prompt=file.query_prompt, document_prompt=file.document_prompt,
                       instruction=file.instruction if record.instruction is None else record.instruction)

    def _check_corpus(self, form: Format, source: str) -> None:
        if form.of_ids and self._corpus is None:
            raise DataError(f"{source}: the row names documents by id ({form.name}); give its data.train entry the "
                            "file that holds them: {path: ..., corpus: FILE}")
        if not form.of_ids and self._corpus is not None:
            raise DataError(f"{source}: corpus = {shortened(self._file.corpus)} is given, but rows of the format "
                            f"{form.name} hold their texts themselves; remove it")
