"""BEIR folders: texts and relevance judgements, for training and evaluation, and their queries as training rows."""

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_embed.data.corpus import Corpus, read_named_text
from megatron_embed.data.jsonl import numbered_lines, parse_object, read_lines, shortened
from megatron_embed.data.number_checks import check_grade
from megatron_embed.data.records import Record
from megatron_embed.errors import DataError
from megatron_embed.names import Role

FILES: dict[Role, str] = {"document": "corpus.jsonl", "query": "queries.jsonl"}
HEADER = ["query-id", "corpus-id", "score"]


def is_beir_folder(path: str) -> bool:
    """Whether the directory holds the files of texts that every BEIR folder has."""
    return all((Path(path) / name).is_file() for name in FILES.values())


def read_texts_by_id(path: Path) -> dict[str, str]:
    """id -> text, with the title in front, of each row of a BEIR folder's file; all of them are held in memory.

    Raises:
        DataError: a row cannot be used, an id occurs twice, or there are no rows.
    """
    texts: dict[str, str] = {}
    for line in read_lines(str(path), "BEIR folder"):
        source = f"{path}:{line.line_number}"
        name, text = read_named_text(parse_object(line.raw, source), source)
        if name in texts:
            raise DataError(f"{source}: _id = {shortened(name)}: an earlier line has this id; ids are unique in a file")
        texts[name] = text
    if not texts:
        raise DataError(f"{path}:1: no rows; expected one JSON object per line")
    return texts


def _tsv_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(`FILE:LINE`, fields) of each line that is not blank; a byte order mark is dropped."""
    with path.open("rb") as file:
        for line_number, raw in numbered_lines(file, path):
            source = f"{path}:{line_number}"
            try:
                line = raw.decode("utf-8-sig" if line_number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{source}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
            if line.strip():
                yield source, line.rstrip("\r\n").split("\t")


def require_split(folder: Path, split: str) -> Path:
    """The file of a split's judgements.

    Raises:
        DataError: it is missing; names the splits that exist.
    """
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        splits = sorted(path.stem for path in path.parent.glob("*.tsv"))
        existing = f"splits that exist: {', '.join(splits)}" if splits else "the folder has no qrels/*.tsv at all"
        raise DataError(f"{path}: no such file; {existing}")
    return path


class QueryJudgements(NamedTuple):
    """The relevance judgements of one query."""

    source: str
    """FILE:LINE of the first one."""
    labels: dict[str, int]
    """Document id -> label, in the order of the file; 0 or less: not relevant."""


@dataclass(kw_only=True)
class MissingTexts:
    """Judgements of ids that the folder has no text for, as some published sets have them."""

    documents: list[str] = field(default_factory=list)
    """FILE:LINE of each judgement of a document that the corpus lacks; the query has a text."""
    queries: dict[str, str] = field(default_factory=dict)
    """Query id -> FILE:LINE of its first judgement."""


def read_qrels(path: Path, queries: Container[str], documents: Container[str],
               missing: MissingTexts | None = None) -> dict[str, QueryJudgements]:
    """Query id -> its judgements, in the order of the file.

    Args:
        queries: ids that have a text.
        documents: ids that have a text.
        missing: collects judgements of documents without a text, which are kept, and queries without a text, which are
            left out; None: both are refused.
    Raises:
        DataError: a line is not a judgement, names an id that has no text, or contradicts an earlier line; or there is
            no judgement.
    """
    qrels: dict[str, QueryJudgements] = {}
    for index, (source, fields) in enumerate(_tsv_lines(path)):
        if index == 0 and [name.strip() for name in fields] == HEADER:
            continue
        if len(fields) != 3:
            raise DataError(f"{source}: {len(fields)} fields between tabs, expected 3: {', '.join(HEADER)}")
        query, document = _id_in(fields[0], queries), _id_in(fields[1], documents)
        score = fields[2].strip()
        try:
            label = int(score)
        except ValueError:
            raise DataError(
                f"{source}: score = {shortened(score)}: must be an integer (0: not relevant)"
            ) from None
        check_grade(label, "score", source)
        if query not in queries and missing is not None:
            missing.queries.setdefault(query, source)
            continue
        if query not in queries:
            raise DataError(f"{source}: query-id = {shortened(query)}: not in queries.jsonl")
        if document not in documents and missing is not None:
            missing.documents.append(source)
        elif document not in documents:
            raise DataError(f"{source}: corpus-id = {shortened(document)}: not in corpus.jsonl")
        labels = qrels.setdefault(query, QueryJudgements(source, {})).labels
        if labels.setdefault(document, label) != label:
            raise DataError(
                f"{source}: query {shortened(query)}, document {shortened(document)}: score {label}, but "
                f"{labels[document]} on an earlier line; keep one"
            )
    if missing is not None and missing.queries and not qrels:
        raise DataError(f"{path}:1: none of its {len(missing.queries)} queries is in queries.jsonl; the files "
                        "belong to different sets, or spell their ids differently")
    if not qrels:
        raise DataError(f"{path}:1: no judgements; expected lines of {', '.join(HEADER)}")
    return qrels


def _id_in(name: str, ids: Container[str]) -> str:
    """The id as it is written if `ids` has it, else without blanks around it."""
    return name if name in ids else name.strip()


class _Row(NamedTuple):
    """A query with its documents, by their row indices in the two files."""

    source: str
    query: int
    documents: tuple[int, ...]
    num_positive: int


class BeirRows:
    """The queries of qrels/train.tsv that have a relevant document, in the order of the file, as records.

    Positives are the documents with a score above 0, the highest first; negatives are those with 0 or less. The
    source of a record is the line of the query's first judgement.

    Raises:
        ConfigError: a file cannot be opened.
        DataError: a file is missing or a line is wrong.
    """

    def __init__(self, path: str, key: str) -> None:
        folder = Path(path)
        qrels_path = require_split(folder, "train")
        self._documents = Corpus(str(folder / FILES["document"]), key)
        self._queries = Corpus(str(folder / FILES["query"]), key)
        digest = hashlib.blake2b(f"{self._documents.digest}{self._queries.digest}".encode(), digest_size=16)
        qrels = read_qrels(qrels_path, self._queries, self._documents)
        self._rows = []
        for query, (source, labels) in qrels.items():
            digest.update(repr((query, labels)).encode())
            order = sorted(labels, key=lambda name: -max(labels[name], 0))
            num_positive = sum(label > 0 for label in labels.values())
            if num_positive:
                self._rows.append(_Row(source, self._queries.row_of(query),
                                       tuple(map(self._documents.row_of, order)), num_positive))
        self.num_without_positive = len(qrels) - len(self._rows)
        self.digest = digest.hexdigest()
        if not self._rows:
            raise DataError(f"{qrels_path}:1: no query has a document with a score above 0; training needs positives")

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """Query `index`, from 0, with its documents.

        Raises:
            DataError: one of its texts is empty.
        """
        row = self._rows[index]
        query, documents = self._queries.read(row.query), [self._documents.read(index) for index in row.documents]
        for named, source in (query, *documents):
            if not named.text.strip():
                raise DataError(f"{source}: _id = {shortened(named.name)}: its text is empty, and {row.source} trains "
                                "on it; give it a text or remove the judgement")
        texts = tuple(document.text for document, _ in documents)
        return Record(query=query[0].text, positive=texts[:row.num_positive], negatives=texts[row.num_positive:],
                      instruction=None, source=row.source,
                      document_ids=tuple(document.name for document, _ in documents))
