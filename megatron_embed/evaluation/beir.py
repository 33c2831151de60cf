"""A BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) -> BeirData, validated whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_embed.data.jsonl import check_text, parse_object, read_lines, shortened
from megatron_embed.data.prompts import Role, RoleTokenizer
from megatron_embed.data.tokenless import first_tokenless
from megatron_embed.errors import DataError, TokenlessTextError

HEADER = ["query-id", "corpus-id", "score"]
FILES: dict[Role, str] = {"document": "corpus.jsonl", "query": "queries.jsonl"}


@dataclass(frozen=True, kw_only=True)
class BeirData:
    """A retrieval test set: every document of the corpus, and the queries that the split judges."""

    directory: str
    name: str
    """Of the folder; of the folder above it where it is just called `beir`."""
    document_ids: list[str]
    document_texts: list[str]
    """`title + " " + text` where the title is not empty; in the order of the file, as the ids."""
    query_ids: list[str]
    query_texts: list[str]
    """In the order of the file, as the ids."""
    qrels: dict[str, dict[str, int]]
    """query id -> document id -> label; labels are graded, 0 (or less) is judged not relevant. One entry per query."""

    def place_of(self, role: Role, row_id: str) -> str:
        """FILE:LINE of a query or document; reads the file again."""
        path = str(Path(self.directory) / FILES[role])
        for line in read_lines(path, "BEIR folder"):
            if str(parse_object(line.raw, f"{path}:{line.number}").get("_id")) == row_id:
                return f"{path}:{line.number}"
        raise DataError(f"{path}: _id = {shortened(row_id)} is gone; keep the file until the run ends")


def load_beir(directory: str, split: str = "test") -> BeirData:
    """The corpus, the queries and the relevance labels of one split.

    Args:
        directory: holds corpus.jsonl and queries.jsonl, rows `{"_id", "text", "title"?}`, and qrels/SPLIT.tsv, lines
            `query-id TAB corpus-id TAB score` below an optional header of these words.
        split: train, dev, test or another name of a file in qrels/.
    Raises:
        DataError: a file is missing, or a line is wrong (then it begins `FILE:LINE: `).
    """
    folder = Path(directory)
    qrels_path = folder / "qrels" / f"{split}.tsv"
    _require_files(folder, qrels_path)
    documents = _read_texts(folder / FILES["document"])
    queries = _read_texts(folder / FILES["query"])
    qrels = _read_qrels(qrels_path, queries, documents)
    query_ids = [query for query in queries if query in qrels]
    path = folder.resolve()
    return BeirData(
        directory=directory,
        name=path.parent.name if path.name == "beir" else path.name,
        document_ids=list(documents),
        document_texts=list(documents.values()),
        query_ids=query_ids,
        query_texts=[queries[query] for query in query_ids],
        qrels=qrels,
    )


def refuse_tokenless_texts(data: BeirData, tokenizer: RoleTokenizer) -> None:
    """Raises TokenlessTextError, beginning `FILE:LINE: `, where that can be found before the set is embedded."""
    texts: dict[Role, Iterator[tuple[str, str]]] = {
        "query": zip(data.query_ids, data.query_texts, strict=True),
        "document": zip(data.document_ids, data.document_texts, strict=True)}
    for role, labelled in texts.items():
        if (found := first_tokenless(labelled, role, tokenizer)) is not None:
            row_id, text = found
            raise TokenlessTextError(0, data.place_of(role, row_id), text)


def _require_files(folder: Path, qrels_path: Path) -> None:
    """Raises for the first file that is not there."""
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl"):
        if not path.is_file():
            raise DataError(f"{path}: no such file; a BEIR folder holds corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
    if not qrels_path.is_file():
        splits = sorted(path.stem for path in qrels_path.parent.glob("*.tsv"))
        there = f"splits that exist: {', '.join(splits)}" if splits else "the folder has no qrels/*.tsv at all"
        raise DataError(f"{qrels_path}: no such file; {there}")


def _read_texts(path: Path) -> dict[str, str]:
    """id -> text, with the title in front, of each row."""
    texts: dict[str, str] = {}
    for line in read_lines(str(path), "BEIR folder"):
        source = f"{path}:{line.number}"
        row = parse_object(line.raw, source)
        if missing := {"_id", "text"} - row.keys():
            raise DataError(f"{source}: the row lacks {' and '.join(sorted(missing))}; it needs _id and text")
        row_id = row["_id"]
        if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
            raise DataError(f"{source}: _id = {shortened(row_id)}: must be a non-empty string or an integer")
        key = check_text(str(row_id), "_id", source)
        if key in texts:
            raise DataError(
                f"{source}: _id = {shortened(row_id)}: an earlier line has this id; ids are unique in a file"
            )
        title = _text(row["title"], "title", source) if row.get("title") is not None else ""
        text = _text(row["text"], "text", source)
        texts[key] = f"{title} {text}" if title else text
    if not texts:
        raise DataError(f"{path}:1: no rows; expected one JSON object per line")
    return texts


def _text(value: object, name: str, source: str) -> str:
    """A string; it may be empty, because public corpora hold documents that are."""
    return value if isinstance(value, str) and not value.strip() else check_text(value, name, source)


def _tsv_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(`FILE:LINE`, fields) of each line that is not blank; a byte order mark is dropped."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            source = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{source}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
            if line.strip():
                yield source, [field.strip() for field in line.split("\t")]


def _read_qrels(path: Path, queries: dict[str, str], documents: dict[str, str]) -> dict[str, dict[str, int]]:
    """query id -> document id -> label."""
    qrels: dict[str, dict[str, int]] = {}
    for number, (source, fields) in enumerate(_tsv_lines(path)):
        if number == 0 and fields == HEADER:
            continue
        if len(fields) != 3:
            raise DataError(f"{source}: {len(fields)} fields between tabs, expected 3: {', '.join(HEADER)}")
        query, document, score = fields
        try:
            label = int(score)
        except ValueError:
            raise DataError(
                f"{source}: score = {shortened(score)}: must be an integer (0 is judged not relevant)"
            ) from None
        if query not in queries:
            raise DataError(f"{source}: query-id = {shortened(query)}: not in queries.jsonl")
        if document not in documents:
            raise DataError(f"{source}: corpus-id = {shortened(document)}: not in corpus.jsonl")
        if qrels.setdefault(query, {}).setdefault(document, label) != label:
            raise DataError(
                f"{source}: query {shortened(query)}, document {shortened(document)}: judged {label}, but "
                f"{qrels[query][document]} on an earlier line; keep one"
            )
    if not qrels:
        raise DataError(f"{path}:1: no judgements; expected lines of {', '.join(HEADER)}")
    return qrels
