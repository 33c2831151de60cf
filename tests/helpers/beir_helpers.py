"""A small BEIR folder, written row by row."""

import json
from pathlib import Path

CORPUS = [{"_id": "d1", "title": "Tea", "text": "is hot"}, {"_id": "d2", "title": "", "text": "ice"}]
QUERIES = [{"_id": "q1", "text": "warm?"}, {"_id": "q2", "text": "cold?"}, {"_id": "q3", "text": "unjudged"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t2\nq1\td1\t1\nq1\td2\t0\n"

def write_folder(folder: Path, corpus=CORPUS, queries=QUERIES, qrels: str = QRELS) -> str:
    """A BEIR folder; rows that are strings are written as they are."""
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    return str(folder)
