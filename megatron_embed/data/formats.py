"""The formats of rows, the detection of a file's format from the keys of its first row, and rows to records."""

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from megatron_embed.config.data import TrainFile
from megatron_embed.data import foreign_formats
from megatron_embed.data.columns import COLUMNS_SETTING, Columns
from megatron_embed.data.corpus import Corpus
from megatron_embed.data.csv_rows import typed
from megatron_embed.data.jsonl import shortened
from megatron_embed.data.records import AnyRecord, Kind, Record, RerankRecord, as_kind, refuse_id_on_both_sides
from megatron_embed.data.row_fields import Fields, Row, check_keys
from megatron_embed.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Format:
    """The keys of one format's rows, and the function that reads them."""

    name: str
    """Used in the log and in messages."""
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    without_use: tuple[str, ...] = ()
    """Keys that belong to the format and that training does not use."""
    columns: bool = False
    """Whether a row may have columns negative, negative_1, ..."""
    needs_column: bool = False
    """Whether a row must have one of these columns or a label, and no `negatives`: otherwise it is one of ours."""
    names_documents: bool = False
    """The row names its documents by ids of a corpus."""
    read: Callable[[Fields], AnyRecord]

    @property
    def known(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    def has_required(self, row: Iterable[str]) -> bool:
        """Whether these are all the keys that a row needs."""
        return set(row).issuperset(self.required)

    def fits(self, row: Iterable[str]) -> bool:
        """Whether a row with these keys is of this format."""
        keys = set(row)
        if not self.has_required(keys):
            return False
        return not self.needs_column or ("negatives" not in keys and any(
            key in foreign_formats.LABEL_COLUMNS or foreign_formats.NEGATIVE_COLUMN.fullmatch(key) for key in keys))

    def ignored(self, row: Row) -> set[str]:
        """Keys of the row that are not read."""
        extra = row.keys() - {*self.known, *self.without_use}
        return {key for key in extra if not (self.columns and foreign_formats.NEGATIVE_COLUMN.fullmatch(key))}

    def check_keys(self, row: Row, source: str) -> None:
        """Refuse a row that lacks a key, or misspells one. Raises DataError, beginning with `source`."""
        if self.columns:
            row = {key: value for key, value in row.items() if key in self.required
                   or (value is not None and not foreign_formats.NEGATIVE_COLUMN.fullmatch(key))}
        check_keys(row, self.required, self.known, source)


def _read_ours(fields: Fields) -> Record:
    row, source = fields.row, fields.source
    positive, negatives = fields.some_texts("positive"), fields.optional_texts("negatives")
    scores = fields.optional_numbers("teacher_scores", len(positive) + len(negatives),
                                     "texts of positive and negatives")
    ids = None
    if row.get("positive_ids") is None and row.get("negative_ids"):
        raise DataError(f"{source}: negative_ids = {shortened(row['negative_ids'])} is given without positive_ids; "
                        "give both, one id for each text, or neither")
    if row.get("positive_ids") is not None:
        positive_ids, negative_ids = fields.optional_ids("positive_ids"), fields.optional_ids("negative_ids")
        for key, names, texts in (("positive", positive_ids, positive), ("negative", negative_ids, negatives)):
            if len(names) != len(texts):
                raise DataError(f"{source}: {key}_ids has {len(names)} ids for {len(texts)} texts; give one for each")
        ids = (*positive_ids, *negative_ids)
    return Record(query=fields.text("query"), positive=positive, negatives=negatives, source=source,
                  instruction=fields.optional_text("instruction"), teacher_scores=scores, document_ids=ids)


def _read_pair(fields: Fields) -> Record:
    return Record(query=fields.text("text_a"), positive=(fields.text("text_b"),), negatives=(), source=fields.source,
                  instruction=fields.optional_text("instruction"), score=fields.number("score"))


def _read_list(fields: Fields) -> RerankRecord:
    documents = fields.some_texts("documents")
    ids = None if fields.row.get("document_ids") is None else fields.ids("document_ids")
    if ids is not None and len(ids) != len(documents):
        raise DataError(f"{fields.source}: document_ids has {len(ids)} ids for {len(documents)} documents; give one "
                        "for each")
    return RerankRecord(
        query=fields.text("query"), documents=documents, source=fields.source, document_ids=ids,
        labels=fields.numbers("labels", len(documents), "documents"),
        instruction=fields.optional_text("instruction"),
        teacher_scores=fields.optional_numbers("teacher_scores", len(documents), "documents"))


def _columns(anchor: str, positive: str, *, needs_column: bool = False) -> Format:
    return Format(
        name=f"Sentence Transformers ({anchor}, {positive}; negatives, label or score)", required=(anchor, positive),
        optional=("instruction", "negative", *foreign_formats.LABEL_COLUMNS), columns=True, needs_column=needs_column,
        read=functools.partial(foreign_formats.read_columns, anchor=anchor, positive=positive))


OURS = Format(name="megatron_embed (query, positive, negatives)", required=("query", "positive"), read=_read_ours,
              optional=("negatives", "instruction", "teacher_scores", "positive_ids", "negative_ids"),
              without_use=("query_id",))
_NOT_PLAIN = {"instruction", "teacher_scores", "positive_ids", "negative_ids"}
FORMATS = (
    _columns("query", "positive", needs_column=True),
    OURS,
    Format(name="megatron_embed pairs (text_a, text_b, score)", required=("text_a", "text_b", "score"),
           optional=("instruction",), read=_read_pair),
    Format(name="megatron_embed lists (query, documents, labels)", required=("query", "documents", "labels"),
           optional=("instruction", "teacher_scores", "document_ids"), without_use=("query_id",), read=_read_list),
    Format(name="lists (query, docs)", required=("query", "docs"), read=foreign_formats.read_labelled_documents,
           optional=("labels", "instruction", "teacher_scores"), without_use=("query_id",)),
    Format(name="ms-swift (query, response)", required=("query", "response"), read=foreign_formats.read_swift_response,
           optional=("rejected_response", "label", "labels", "scores", "system", "history")),
    Format(name="ms-swift (messages, positive_messages)", required=("messages", "positive_messages"),
           optional=("negative_messages", "label"), read=foreign_formats.read_swift_messages),
    Format(name="FlagEmbedding (query, pos, neg)", required=("query", "pos"), read=foreign_formats.read_flag_embedding,
           optional=("neg", "pos_scores", "neg_scores", "prompt"), without_use=("type", "pos_id", "neg_id")),
    Format(name="Tevatron (query, positive_passages)", required=("query", "positive_passages"),
           optional=("negative_passages",), without_use=("query_id",), read=foreign_formats.read_tevatron_passages),
    Format(name="Tevatron (query, passages, scores)", required=("query", "passages", "scores"),
           without_use=("query_id",), read=foreign_formats.read_tevatron_scores),
    *(Format(name=f"Tevatron ({query}, positive_document_ids)", required=(query, "positive_document_ids"),
             optional=("negative_document_ids", "query_image", "query_video", "query_audio"),
             without_use=("query_id",), names_documents=True, read=foreign_formats.read_tevatron_ids)
      for query in ("query_text", "query")),
    Format(name="DPR (question, positive_ctxs)", required=("question", "positive_ctxs"), read=foreign_formats.read_dpr,
           optional=("hard_negative_ctxs", "negative_ctxs"), without_use=("dataset", "answers", "question_id")),
    *(Format(name=f"NeMo ({query}, pos_doc, neg_doc)", required=(query, "pos_doc"), optional=("neg_doc",),
             without_use=("question_id", "query_id"), read=foreign_formats.read_pos_doc)
      for query in ("query", "question")),
    _columns("anchor", "positive"),
    _columns("sentence1", "sentence2"),
    *(_columns(anchor, positive) for anchor, positive in (
        ("query", "answer"), ("question", "answer"), ("question", "positive"), ("question", "passage"),
        ("query", "passage"), ("query", "document"), ("prompt", "response"), ("question", "response"))),
)


def detect_format(row: Row, source: str, renaming: str = "") -> Format:
    """The format of a file whose first row this is.

    Args:
        renaming: see check_keys.
    Raises:
        DataError: it has none; the message is about the nearest format, or ours if none is near.
    """
    form = format_of([key for key, value in row.items() if value is not None]) or format_of(row)
    if form is not None:
        return form
    nearest = max((OURS, *FORMATS), key=lambda form: (sum(key in row for key in form.required) / len(form.required),
                                                      form is OURS or form.columns))
    if not any(key in row for key in nearest.required):
        nearest = OURS
    check_keys(row, nearest.required, nearest.known, source, renaming=renaming if row else "")
    raise DataError(f"{source}: not a row of the format {nearest.name}; docs/data.md lists the formats")


def format_of(keys: Iterable[str]) -> Format | None:
    """The first format that a row with these keys is of; None: there is none."""
    return next((form for form in FORMATS if form.fits(keys)), None)


class RowReader:
    """Rows of one `data.train` entry to records of one kind; the first row decides the format.

    Args:
        kind: None: records as the rows are written.
        holds_texts: see RawRows.
        columns_key: what sets the names of columns; None: nothing does.

    Attributes:
        format: None before the first row.
        ignored: keys of rows that are not read.
        columns: the names that the entry gives its columns, and those that were in a row.
    """

    def __init__(self, file: TrainFile, kind: Kind | None, *, holds_texts: bool = False,
                 columns_key: str | None = COLUMNS_SETTING) -> None:
        self.format: Format | None = None
        self.ignored: set[str] = set()
        self.columns = Columns(file.columns, columns_key)
        self._holds_texts = holds_texts
        self._file = file
        self._kind = kind
        self._corpus = None if file.corpus is None else Corpus(file.corpus, key="data.train.corpus")
        self._may_be_plain = kind in ("contrastive", None) and not (file.columns or file.score_range or holds_texts)
        self._plain_keys: set[tuple[str, ...]] = set()

    def read(self, row: Row, source: str, *, trusted: bool = False) -> AnyRecord:
        """The record of one row.

        Args:
            trusted: the row was read before and has not changed: it is converted, not checked again.
        Raises:
            DataError: beginning with `source`, naming the field, its value and the remedy.
        """
        written = row
        if self._file.columns:
            row = self.columns.renamed(row)
        if self._holds_texts:
            row = typed(row)
        if not trusted:
            if self._file.columns:
                self._check_columns(written, row, source)
            self._check(row, source)
        assert self.format is not None
        record = self.format.read(Fields(row, source, trusted))
        if self.format.names_documents:
            assert isinstance(record, Record) and self._corpus is not None
            record = replace(record, positive=self._corpus.texts_of(record.positive, source),
                             negatives=self._corpus.texts_of(record.negatives, source))
        if self._file.score_range:
            record = self._rescaled(record)
        if not trusted and self._may_be_plain and self.format is OURS and _NOT_PLAIN.isdisjoint(row):
            self._plain_keys.add(tuple(row))
        return self.apply_defaults(record, trusted=trusted)

    def plain_texts(self, row: Row) -> tuple[list[bytes], int] | None:
        """The texts (query, positives, negatives) of a row that is plainly right, and the number of its positives.

        None: `read` decides. This is the shorter way for the rows that most files consist of: a query with texts, and
        the keys of a row that `read` has accepted.
        """
        if tuple(row) not in self._plain_keys:
            return None
        positive, negatives = row["positive"], row.get("negatives")
        negatives = [] if negatives is None else negatives
        if isinstance(positive, str):
            positive = [positive]
        if not isinstance(positive, list) or not positive or not isinstance(negatives, list):
            return None
        encoded = []
        for text in (row["query"], *positive, *negatives):
            if not isinstance(text, str) or not text or text.isspace():
                return None
            try:
                encoded.append(text.encode())
            except UnicodeEncodeError:
                return None
        return encoded, len(positive)

    @property
    def default_instruction(self) -> str | None:
        """The instruction of a row without one."""
        return self._file.instruction

    def _check_columns(self, written: Row, renamed: Row, source: str) -> None:
        """Refuse a row that lacks a column whose field no row of the file's format may lack."""
        absent = self.columns.absent(written)
        form = self.format
        if absent and form is None and format_of(renamed) is None:
            form = format_of({*renamed, *absent.values()})
        for name, field in absent.items():
            is_field = any(field in form.known for form in FORMATS)
            is_swapped = self.format is None and field in written and not is_field
            if is_swapped or (form is not None and field in form.required and field not in renamed):
                raise self.columns.needed(name, written, source)
            if is_field and field in renamed:  # it would be read in some rows, and in others be replaced
                raise self.columns.ambiguous(name, written, source)

    def require_columns(self, present: Collection[str], first_row: Callable[[], tuple[Row, str]]) -> None:
        """Raise DataError for a column that no row has, or that is a field which rows of this format do not have; see
        Columns.require_found. Not before a row was read."""
        assert self.format is not None
        self.columns.require_found(present, first_row, self.format.known, self.format.ignored(
            dict.fromkeys(self._file.columns.values())))

    def _rescaled(self, record: AnyRecord) -> AnyRecord:
        """The pair with the lowest score of the entry's range as 0 and the highest as 1."""
        low, high = self._file.score_range
        score = record.score if isinstance(record, Record) else None
        if score is None:
            raise DataError(f"{record.source}: data.train.score_range = [{low:g}, {high:g}] is given, and the row is "
                            "not a pair with a score; remove it")
        if not low <= score <= high:
            raise DataError(f"{record.source}: score {score:g} lies outside data.train.score_range = [{low:g}, "
                            f"{high:g}]; correct one of them")
        assert isinstance(record, Record)
        return replace(record, score=(score - low) / (high - low))

    def _check(self, row: Row, source: str) -> None:
        """Refuse a row whose keys are not those of the file's format, which is that of its first row."""
        if self.format is None:
            self.format = detect_format(row, source, self.columns.remedy)
            self._check_corpus(self.format, source)
        form = self.format
        if not form.has_required(row) and (other := format_of(row)):
            raise DataError(f"{source}: a row of the format {other.name} in a file whose first row is "
                            f"{form.name}; give each format a file of its own")
        form.check_keys(row, source)
        self.ignored |= form.ignored(row)

    def apply_defaults(self, record: AnyRecord, *, trusted: bool = False) -> AnyRecord:
        """The record as the objective takes it, with the entry's prompts and instruction."""
        if self._kind is not None:
            if not trusted:
                refuse_id_on_both_sides(record)
            record = as_kind(record, self._kind)
        file = self._file
        if file.query_prompt is None and file.document_prompt is None and file.instruction is None:
            return record
        return replace(record, query_prompt=file.query_prompt, document_prompt=file.document_prompt,
                       instruction=file.instruction if record.instruction is None else record.instruction)

    def _check_corpus(self, form: Format, source: str) -> None:
        if form.names_documents and self._corpus is None:
            raise DataError(f"{source}: the row names documents by id ({form.name}); give its data.train entry the "
                            "file that holds them: {path: ..., corpus: FILE}")
        if not form.names_documents and self._corpus is not None:
            raise DataError(f"{source}: corpus = {shortened(self._file.corpus)} is given, but rows of the format "
                            f"{form.name} hold their texts themselves; remove it")
