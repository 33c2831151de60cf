"""A part of a BEIR folder, so that a measurement takes minutes."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """--queries and --documents."""
    parser.add_argument("--queries", type=int, default=0, help="test queries, evenly spread; 0: all")
    parser.add_argument("--documents", type=int, default=0, help="documents to search, the relevant ones and "
                        "others, evenly spread; 0: all")


def spread(items: Sequence[str], count: int) -> list[str]:
    """So many of the items, evenly spread; all for 0."""
    count = min(count or len(items), len(items))
    return [items[index * len(items) // count] for index in range(count)]


def part_of(beir: Path, folder: Path, queries: int, documents: int) -> Path:
    """A BEIR folder with some queries of the test split, their relevant documents and others, evenly spread."""
    if not queries and not documents:
        return beir
    header, *lines = (beir / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    labels = [line.split("\t") for line in lines]
    asked = set(spread(list(dict.fromkeys(query for query, *_ in labels)), queries))
    labels = [label for label in labels if label[0] in asked]
    lines = (beir / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    corpus = [(json.loads(line)["_id"], line) for line in lines]
    relevant = {document for _, document, _ in labels}
    others = [name for name, _ in corpus if name not in relevant]
    kept = relevant | set(spread(others, max(1, documents - len(relevant)) if documents else 0))
    (folder / "qrels").mkdir(parents=True)
    (folder / "qrels" / "test.tsv").write_text("\n".join([header, *map("\t".join, labels)]) + "\n", encoding="utf-8")
    (folder / "corpus.jsonl").write_text("".join(line + "\n" for name, line in corpus if name in kept),
                                         encoding="utf-8")
    (folder / "queries.jsonl").write_text((beir / "queries.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    return folder
