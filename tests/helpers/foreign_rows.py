"""Real rows of the English sample written in the format of every trainer that is recognised."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron_embed.config.schema import TrainFile
from tests.data.conftest import MINI_EN

Rows = list[dict[str, object]]
INSTRUCTION = "Given a question, find the passage that answers it"


def our_rows(count: int = 12) -> Rows:
    """The first rows that have a hard negative, a query and a positive each of their own; with an instruction."""
    rows: Rows = []
    seen: set[str] = set()
    for line in MINI_EN.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts = {row["query"], row["positive"][0], *row["negatives"][:1]}
        if len(texts) == 3 and not texts & seen:
            seen |= texts
            rows.append({"query": row["query"], "positive": row["positive"][:1], "negatives": row["negatives"][:1],
                          "instruction": INSTRUCTION})
        if len(rows) == count:
            return rows
    raise AssertionError("the sample has too few rows")


def lines(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def message(text: object, role: str = "user") -> dict[str, object]:
    return {"role": role, "content": text}


def passage(text: str, index: int) -> dict[str, object]:
    """Title and text that together are `text`."""
    title, _, rest = text.partition(" ")
    parts = {"title": title, "text": rest} if index % 2 else {"title": "", "text": text}
    return {"docid": str(index), **parts}


def texts(row: dict[str, object]) -> tuple[str, str, str]:
    return row["query"], row["positive"][0], row["negatives"][0]


def as_lines(make: Callable[[int, str, str, str], dict[str, object]]) -> Callable[[Path, Rows], TrainFile]:
    """A JSONL file of the rows that `make` makes of (index, query, positive, negative)."""
    def write(folder: Path, rows: Rows) -> TrainFile:
        path = folder / "rows.jsonl"
        path.write_bytes(lines([make(index, *texts(row)) for index, row in enumerate(rows)]))
        return TrainFile(path=str(path))
    return write


def tevatron_ids(folder: Path, rows: Rows) -> TrainFile:
    corpus = [passage(text, 2 * index + position) for index, row in enumerate(rows)
              for position, text in enumerate(texts(row)[1:])]
    (folder / "corpus.jsonl").write_bytes(lines(corpus[::-1]))
    file = as_lines(lambda i, q, p, n: {"query_id": str(i), "query_text": q, "query_image": None,
                                        "positive_document_ids": [str(2 * i)],
                                        "negative_document_ids": [str(2 * i + 1)]})(folder, rows)
    return TrainFile(path=file.path, corpus=str(folder / "corpus.jsonl"))


def beir(folder: Path, rows: Rows) -> TrainFile:
    (folder / "qrels").mkdir()
    documents, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
    for index, row in enumerate(rows):
        query, positive, negative = texts(row)
        queries.append({"_id": f"q{index}", "text": query})
        documents += [{**passage(text, index + position), "_id": f"d{index}{position}"}
                      for position, text in enumerate((negative, positive))]
        judgements += [f"q{index}\td{index}0\t0", f"q{index}\td{index}1\t2"]
    for document in documents:
        del document["docid"]
    (folder / "corpus.jsonl").write_bytes(lines(documents[::-1]))
    (folder / "queries.jsonl").write_bytes(lines([*queries[::-1], {"_id": "without judgement", "text": "x"}]))
    (folder / "qrels" / "train.tsv").write_text("\n".join(judgements) + "\n", encoding="utf-8")
    return TrainFile(path=str(folder))


def columns(rows: Rows) -> Rows:
    return [dict(zip(("anchor", "positive", "negative_1"), texts(row), strict=True)) for row in rows]


def parquet(folder: Path, rows: Rows) -> TrainFile:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return TrainFile(path=str(folder / "rows.parquet"))


def saved_arrow(folder: Path, rows: Rows) -> TrainFile:
    import datasets

    datasets.Dataset.from_list(columns(rows)).save_to_disk(folder / "saved")
    return TrainFile(path=str(folder / "saved"))


def arrow_file(folder: Path, rows: Rows) -> TrainFile:
    file = saved_arrow(folder, rows)
    (path,) = Path(file.path).glob("*.arrow")
    return TrainFile(path=str(path))


def hub_copy(folder: Path, rows: Rows) -> TrainFile:
    """A directory as the hub holds data sets: two configurations, one of two files, one without a split to train on."""
    import datasets

    repository = folder / "repository"
    for name in ("data", "de"):
        (repository / name).mkdir(parents=True)
    half = len(rows) // 2
    for index, part in enumerate((rows[:half], rows[half:])):
        file = repository / "data" / f"train-{index:05d}-of-00002.parquet"
        datasets.Dataset.from_list(columns(part)).to_parquet(file)
    datasets.Dataset.from_list(columns(rows[half:])).to_parquet(repository / "de" / "rows.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n"
        "- config_name: de\n  data_files:\n  - split: dev\n    path: de/rows.parquet\n---\n# Rows\n", encoding="utf-8")
    return TrainFile(path=str(repository))


def streamed(folder: Path, rows: Rows) -> TrainFile:
    return TrainFile(path=hub_copy(folder, rows).path, streaming=True)


def packed(ending: str) -> Callable[[Path, Rows], TrainFile]:
    def write(folder: Path, rows: Rows) -> TrainFile:
        import pyarrow

        path = str(folder / f"rows.jsonl{ending}")
        with pyarrow.output_stream(path, compression={".gz": "gzip", ".zst": "zstd"}[ending]) as stream:
            stream.write(lines(rows))
        return TrainFile(path=path)
    return write


SYSTEM = message(INSTRUCTION, "system")
FORMATS: dict[str, Callable[[Path, Rows], TrainFile]] = {
    "swift-response": as_lines(lambda i, q, p, n: {"query": q, "response": p, "rejected_response": [n]}),
    "swift-system": as_lines(lambda i, q, p, n: {"system": INSTRUCTION, "query": q, "response": p,
                                                 "rejected_response": n}),
    "swift-messages": as_lines(lambda i, q, p, n: {
        "messages": [SYSTEM, message(q)], "positive_messages": [[message(p)]], "negative_messages": [[message(n)]]}),
    "swift-reranker": as_lines(lambda i, q, p, n: {
        "messages": [message(q)], "positive_messages": [[message(p, "assistant")]],
        "negative_messages": [[message(n, "assistant")]], "label": None}),
    "flag-embedding": as_lines(lambda i, q, p, n: {
        "query": q, "pos": [p], "neg": [n], "pos_scores": [0.9], "neg_scores": [0.1], "prompt": INSTRUCTION,
        "type": "normal"}),
    "tevatron-passages": as_lines(lambda i, q, p, n: {
        "query_id": str(i), "query": q, "positive_passages": [passage(p, 2 * i)],
        "negative_passages": [passage(n, 2 * i + 1)]}),
    "tevatron-ids": tevatron_ids,
    "tevatron-scores": as_lines(lambda i, q, p, n: {
        "query_id": i, "query": q, "passages": [passage(p, 2 * i), passage(n, 2 * i + 1)], "scores": [7.5, -1]}),
    "st-anchor": as_lines(lambda i, q, p, n: {"anchor": q, "positive": p, "negative": n}),
    "st-query": as_lines(lambda i, q, p, n: {"query": q, "positive": p, "negative_1": n, "negative_2": None}),
    "st-question": as_lines(lambda i, q, p, n: {"question": q, "answer": p, "negative": n}),
    "mteb-reranking": as_lines(lambda i, q, p, n: {"query": q, "positive": [p], "negative": [n]}),
    "dpr": as_lines(lambda i, q, p, n: {
        "question": q, "answers": ["x"], "dataset": "nq", "positive_ctxs": [{**passage(p, i), "passage_id": f"p{i}"}],
        "negative_ctxs": [], "hard_negative_ctxs": [{**passage(n, i), "passage_id": f"n{i}"}]}),
    "nemo": as_lines(lambda i, q, p, n: {"query": q, "pos_doc": p, "neg_doc": [n]}),
    "nemo-question": as_lines(lambda i, q, p, n: {"question": q, "pos_doc": [{"text": p}], "neg_doc": [{"text": n}]}),
    "labelled": as_lines(lambda i, q, p, n: {"query": q, "documents": [n, p], "labels": [0, 1.5]}),
    "docs": as_lines(lambda i, q, p, n: {"query": q, "docs": [{"text": p, "label": 1}, {"text": n, "label": 0}]}),
    "st-list": as_lines(lambda i, q, p, n: {"query": q, "docs": [n, p], "labels": [0, 1]}),
    "beir": beir, "parquet": parquet, "saved": saved_arrow, "arrow": arrow_file, "gz": packed(".gz"),
    "zst": packed(".zst"), "hub-copy": hub_copy, "streamed": streamed}
WITH_INSTRUCTION = {"swift-system", "swift-messages", "flag-embedding", "parquet", "gz", "zst"}
