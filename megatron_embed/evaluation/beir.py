"""Load and validate a BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) for evaluation."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_embed.data.beir import MissingTexts, read_qrels, require_split
from megatron_embed.data.corpus import DocumentsOnDisk, read_named_text
from megatron_embed.data.empty_texts import first_empty_text
from megatron_embed.data.jsonl import parse_object, read_lines, shortened
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import DataError, EmptyTextError
from megatron_embed.names import Role

logger = logging.getLogger(__name__)

FILES: dict[Role, str] = {"document": "corpus.jsonl", "query": "queries.jsonl"}


@dataclass(frozen=True, kw_only=True)
class BeirData:
    """A retrieval test set: every document of the corpus, and the queries that have labels in the split."""

    directory: str
    name: str
    """The folder's name, or its parent's where the folder is called `beir`."""
    document_ids: list[str]
    document_texts: Sequence[str]
    """`title + " " + text` where the title is not empty, in the order of the ids. Each text is read from the file on
    access, so the file must not change."""
    query_ids: list[str]
    query_texts: list[str]
    """In the order of the ids."""
    qrels: dict[str, dict[str, int]]
    """query id -> document id -> label. Labels are graded; 0 or less means not relevant. One entry per query. Labelled
    documents that the corpus lacks are never retrieved, but count in the ideal ranking and in recall."""
    instruction: str | None = None
    """Instruction in the queries' prompt; None: the tokenizer's own."""
    drop_own_id: bool = False
    """Whether a document with the query's own id is removed from the query's rankings."""

    def source_of(self, role: Role, row_id: str) -> str:
        """FILE:LINE of a query or document. Reads the file again."""
        path = str(Path(self.directory) / FILES[role])
        for line in read_lines(path, "BEIR folder"):
            source = f"{path}:{line.number}"
            if read_named_text(parse_object(line.raw, source), source).name == row_id:
                return source
        raise DataError(f"{path}: _id = {shortened(row_id)} was removed; do not change the file during the run")


def load_beir(directory: str, split: str = "test", *, drop_own_id: bool = False) -> BeirData:
    """Load the corpus, the queries and the relevance labels of one split.

    Args:
        directory: contains corpus.jsonl and queries.jsonl, rows `{"_id", "text", "title"?}`, and qrels/SPLIT.tsv, lines
            `query-id TAB corpus-id TAB score` below an optional header line.
        split: train, dev, test or another file name in qrels/.
        drop_own_id: for sets whose queries are also documents, such as ArguAna and Quora: remove each query's own
            document from its rankings, as BEIR and MTEB do.
    Raises:
        DataError: a file is missing, a line is invalid (the message begins `FILE:LINE: `), or the corpus has no
            document with a label above 0.

    Labels of documents that the corpus lacks are kept. Queries without a text are ignored, as pytrec_eval ignores a
    query without a ranking. A warning counts both.
    Memory: the queries and the labels; for each document its id and 16 bytes.
    """
    folder = Path(directory)
    for path in (folder / name for name in FILES.values()):
        if not path.is_file():
            raise DataError(f"{path}: no such file; a BEIR folder contains corpus.jsonl, queries.jsonl and "
                            "qrels/SPLIT.tsv")
    qrels_path = require_split(folder, split)
    texts = DocumentsOnDisk(str(folder / FILES["document"]), "BEIR folder")
    queries = _read_texts(folder / FILES["query"])
    missing, known = MissingTexts(), frozenset(texts.names)
    qrels = {query: labelled.labels for query, labelled in read_qrels(qrels_path, queries, known, missing).items()}
    query_ids = [query for query in queries if query in qrels]
    _report_missing(qrels_path, qrels, known, missing)
    if drop_own_id:
        logger.info("%s: %d of %d queries have a document with their own id, which is removed from their rankings",
                    directory, len(known.intersection(query_ids)), len(query_ids))
    resolved = folder.resolve()
    return BeirData(
        directory=directory,
        name=resolved.parent.name if resolved.name == "beir" else resolved.name,
        document_ids=texts.names,
        document_texts=texts,
        query_ids=query_ids,
        query_texts=[queries[query] for query in query_ids],
        qrels=qrels,
        drop_own_id=drop_own_id,
    )


def _report_missing(path: Path, qrels: dict[str, dict[str, int]], documents: frozenset[str],
                    missing: MissingTexts) -> None:
    """Log how many labels lack a text. Raises DataError if the corpus has none of the relevant documents."""
    if missing.documents:
        relevant = {name for labels in qrels.values() for name, label in labels.items() if label > 0}
        if relevant and relevant.isdisjoint(documents):
            raise DataError(f"{path}:1: none of the {len(relevant)} documents with a label above 0 is in "
                            f"{FILES['document']}; the files belong to different sets, or spell their ids differently")
        logger.warning("%s: %d judgements name a document that %s lacks, the first at line %s; they count as never "
                       "found", path, len(missing.documents), FILES["document"], _line(missing.documents[0]))
    if missing.queries:
        logger.warning("%s: left out %d queries that %s lacks, the first at line %s", path, len(missing.queries),
                       FILES["query"], _line(next(iter(missing.queries.values()))))


def _line(source: str) -> str:
    return source.rpartition(":")[2]


def refuse_empty_texts(data: BeirData, tokenizer: RoleTokenizer) -> None:
    """Raise EmptyTextError, beginning `FILE:LINE: `, for a text without tokens that is detectable before embedding."""
    texts: dict[Role, Iterator[tuple[str, str]]] = {
        "query": zip(data.query_ids, data.query_texts, strict=True),
        "document": zip(data.document_ids, data.document_texts, strict=True)}
    for role, labelled in texts.items():
        if (empty := first_empty_text(labelled, role, tokenizer)) is not None:
            row_id, text = empty
            raise EmptyTextError(0, data.source_of(role, row_id), text)


def _read_texts(path: Path) -> dict[str, str]:
    """id -> title and text of each row, all in memory."""
    texts: dict[str, str] = {}
    for line in read_lines(str(path), "BEIR folder"):
        source = f"{path}:{line.number}"
        name, text = read_named_text(parse_object(line.raw, source), source)
        if name in texts:
            raise DataError(f"{source}: _id = {shortened(name)}: an earlier line has this id; ids must be unique")
        texts[name] = text
    if not texts:
        raise DataError(f"{path}:1: no rows; expected one JSON object per line")
    return texts
