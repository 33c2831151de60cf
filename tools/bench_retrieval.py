"""Seconds and peak memory of retrieval over a made-up corpus: `python tools/bench_retrieval.py --documents 200000`

The texts are read as `evaluate` reads them; their vectors are drawn, so that no model is in the way.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from megatron_embed.names import Role

QUERIES = 100


def resident_mib() -> float:
    """The most that this process has held so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def write_folder(folder: Path, documents: int, words: int) -> float:
    """A BEIR folder; gives the MiB of its corpus."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices("aeioubdgklmnprst", k=draw.randint(3, 10))) for _ in range(20_000)]
    (folder / "qrels").mkdir()
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(draw.choices(vocabulary, k=words))
            file.write(json.dumps({"_id": f"d{number}", "title": "a title", "text": text}) + "\n")
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{number}", "text": f"query {number}"}) + "\n" for number in range(QUERIES)),
        encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(
        "".join(f"q{number}\td{number % documents}\t1\n" for number in range(QUERIES)), encoding="utf-8")
    return (folder / "corpus.jsonl").stat().st_size / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=300, help="of a document")
    parser.add_argument("--dim", type=int, default=384)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(1)

    def embed(texts: Sequence[str], role: Role) -> Tensor:
        return torch.randn(len(list(texts)), args.dim, generator=generator)

    with tempfile.TemporaryDirectory() as name:
        corpus_mib = write_folder(Path(name), args.documents, args.words)
        torch.randn(64, 64) @ torch.randn(64, 64)  # libraries loaded
        before, start = resident_mib(), time.perf_counter()
        data = load_beir(name)
        loaded, seconds = resident_mib(), time.perf_counter() - start
        metrics = evaluate_retrieval(embed, data)
    print(json.dumps({
        "corpus_mib": round(corpus_mib), "load_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - start, 1), "load_peak_mib": round(loaded - before),
        "peak_mib": round(resident_mib() - before), "ndcg@10": metrics["ndcg@10"]}))


if __name__ == "__main__":
    main()
