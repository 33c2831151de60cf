"""Seconds and peak memory of retrieval over a random corpus: `python tools/bench_retrieval.py --documents 200000`

The texts are read as `evaluate` reads them; their vectors are random, so that no model is measured.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measurement import peak_memory_mib
from torch import Tensor

from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from megatron_embed.names import Role

QUERIES = 100


def write_folder(folder: Path, documents: int, words: int) -> float:
    """Write a BEIR folder. Returns the size of its corpus in MiB."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices("aeioubdgklmnprst", k=draw.randint(3, 10))) for _ in range(20_000)]
    (folder / "qrels").mkdir()
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for index in range(documents):
            text = " ".join(draw.choices(vocabulary, k=words))
            file.write(json.dumps({"_id": f"d{index}", "title": "a title", "text": text}) + "\n")
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{index}", "text": f"query {index}"}) + "\n" for index in range(QUERIES)),
        encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(
        "".join(f"q{index}\td{index % documents}\t1\n" for index in range(QUERIES)), encoding="utf-8")
    return (folder / "corpus.jsonl").stat().st_size / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=300, help="words per document")
    parser.add_argument("--dim", type=int, default=384)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(1)

    def embed(texts: Sequence[str], role: Role) -> Tensor:
        return torch.randn(len(list(texts)), args.dim, generator=generator)

    with tempfile.TemporaryDirectory() as name:
        corpus_mib = write_folder(Path(name), args.documents, args.words)
        torch.randn(64, 64) @ torch.randn(64, 64)  # loads the libraries
        before, start = peak_memory_mib(), time.perf_counter()
        data = load_beir(name)
        loaded, seconds = peak_memory_mib(), time.perf_counter() - start
        metrics = evaluate_retrieval(embed, data)
    print(json.dumps({
        "corpus_mib": round(corpus_mib), "load_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - start, 1), "load_peak_mib": round(loaded - before),
        "peak_mib": round(peak_memory_mib() - before), "ndcg@10": metrics["ndcg@10"]}))


if __name__ == "__main__":
    main()
