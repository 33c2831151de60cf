"""A BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) -> BeirData, validated whole."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_embed.data.beir import FILES, MissingTexts, read_qrels, read_texts_by_id, require_split
from megatron_embed.data.corpus import DocumentsOnDisk, read_named_text
from megatron_embed.data.empty_texts import first_empty_text
from megatron_embed.data.jsonl import parse_object, read_lines, shortened
from megatron_embed.data.tokenizer import Role, RoleTokenizer
from megatron_embed.errors import DataError, EmptyTextError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BeirData:
    """A retrieval test set: every document of the corpus, and the queries that the split judges."""

    directory: str
    name: str
    """Of the folder; of the folder above it where it is just called `beir`."""
    document_ids: list[str]
    document_texts: Sequence[str]
    """`title + " " + text` where the title is not empty; in the order of the file, as the ids. Read from the file,
    which must stay as it is, when they are asked for."""
    query_ids: list[str]
    query_texts: list[str]
    """In the order of the file, as the ids."""
    qrels: dict[str, dict[str, int]]
    """query id -> document id -> label; labels are graded, 0 (or less) is judged not relevant. One entry per query. May
    name documents that the corpus lacks, which no search finds: they count in the ideal ranking and in recall."""
    instruction: str | None = None
    """For the queries' prompt; null: the tokenizer's."""
    drop_own_id: bool = False
    """Whether the document with a query's own id is left out of the query's rankings."""

    def place_of(self, role: Role, row_id: str) -> str:
        """FILE:LINE of a query or document; reads the file again."""
        path = str(Path(self.directory) / FILES[role])
        for line in read_lines(path, "BEIR folder"):
            source = f"{path}:{line.line_number}"
            if read_named_text(parse_object(line.raw, source), source).name == row_id:
                return source
        raise DataError(f"{path}: _id = {shortened(row_id)} is gone; keep the file until the run ends")


def load_beir(directory: str, split: str = "test", *, drop_own_id: bool = False) -> BeirData:
    """The corpus, the queries and the relevance labels of one split.

    Args:
        directory: holds corpus.jsonl and queries.jsonl, rows `{"_id", "text", "title"?}`, and qrels/SPLIT.tsv, lines
            `query-id TAB corpus-id TAB score` below an optional header of these words.
        split: train, dev, test or another name of a file in qrels/.
        drop_own_id: for sets whose queries are documents themselves, such as ArguAna and Quora: each query's own is
            left out of its rankings, as BEIR and MTEB do.
    Raises:
        DataError: a file is missing, a line is wrong (then it begins `FILE:LINE: `), or no document with a label above
            0 is in the corpus.

    Judgements of documents that the corpus lacks are kept; queries without a text are left out, as pytrec_eval leaves
    out a query that no ranking answers. A warning counts both.
    Memory: the queries and the judgements; of a document its id and 16 bytes.
    """
    folder = Path(directory)
    for path in (folder / name for name in FILES.values()):
        if not path.is_file():
            raise DataError(f"{path}: no such file; a BEIR folder holds corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
    qrels_path = require_split(folder, split)
    texts = DocumentsOnDisk(str(folder / FILES["document"]), "BEIR folder")
    queries = read_texts_by_id(folder / FILES["query"])
    missing, known = MissingTexts(), frozenset(texts.names)
    judged = read_qrels(qrels_path, queries, known, missing)
    qrels = {query: found.labels for query, found in judged.items()}
    query_ids = [query for query in queries if query in qrels]
    _report_missing(qrels_path, qrels, known, missing)
    if drop_own_id:
        logger.info("%s: %d of %d queries have a document of their own id, which is left out of their rankings",
                    directory, len(known.intersection(query_ids)), len(query_ids))
    place = folder.resolve()
    return BeirData(
        directory=directory,
        name=place.parent.name if place.name == "beir" else place.name,
        document_ids=texts.names,
        document_texts=texts,
        query_ids=query_ids,
        query_texts=[queries[query] for query in query_ids],
        qrels=qrels,
        drop_own_id=drop_own_id,
    )


def _report_missing(path: Path, qrels: dict[str, dict[str, int]], documents: frozenset[str],
                    missing: MissingTexts) -> None:
    """Counts in the log what the folder lacks. Raises DataError if no relevant document is there to be found."""
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
    """Raises EmptyTextError, beginning `FILE:LINE: `, where that can be found before the set is embedded."""
    texts: dict[Role, Iterator[tuple[str, str]]] = {
        "query": zip(data.query_ids, data.query_texts, strict=True),
        "document": zip(data.document_ids, data.document_texts, strict=True)}
    for role, labelled in texts.items():
        if (found := first_empty_text(labelled, role, tokenizer)) is not None:
            row_id, text = found
            raise EmptyTextError(0, data.place_of(role, row_id), text)
