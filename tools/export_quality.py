"""Measure exports in an engine: nDCG@10 on a BEIR folder, texts per second of processor time, size.

    python tools/export_quality.py exported exported-int8 --engine onnxruntime --beir beir

The speed is that of the documents, sorted by length in batches of 8, loading the model not counted, once for each
directory in turn and then again; the better time is printed. It is processor time, of this process and its children,
since the clock's tells more about what else the machine does; an engine of several threads may also wait in them, so
OMP_NUM_THREADS=1 is what to compare with.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import psutil
from torch import Tensor

from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from megatron_embed.export.engines.base import Engine
from megatron_embed.export.engines.gate import ENGINES

SPEED_TEXTS = 400
ROUNDS = 2
FILES = {"onnxruntime": "onnx/*", "openvino": "openvino/*.bin", "llama.cpp": "*.gguf"}
"""What an engine reads of an export; any other: safetensors."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, help="exports; the first is what others are compared with")
    parser.add_argument("--engine", choices=ENGINES, default="onnxruntime")
    parser.add_argument("--beir", required=True, help="BEIR folder with a test split")
    return parser.parse_args()


def processor_seconds() -> float:
    """CPU seconds of this process and its children so far."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def seconds(engine: Engine, directory: Path, texts: list[str]) -> float:
    """Processor time of the texts, without that of loading the model, which the first batch takes."""
    times = []
    for part in (texts[:8], texts):
        started = processor_seconds()
        engine.vectors(directory, part, "document")
        times.append(processor_seconds() - started)
    return times[1] - times[0]


def main() -> int:
    arguments = parse_arguments()
    data, engine = load_beir(arguments.beir), ENGINES[arguments.engine]().engine
    texts = sorted(data.document_texts[:SPEED_TEXTS], key=len)
    times: dict[Path, list[float]] = {directory: [] for directory in arguments.directories}
    for _ in range(ROUNDS):
        for directory in arguments.directories:
            times[directory].append(seconds(engine, directory, texts))
    first: Tensor | None = None
    for directory in arguments.directories:
        vectors = engine.vectors(directory, texts, "document").double()
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        first = vectors if first is None else first
        cosine = (first * vectors).sum(dim=1)
        metrics = evaluate_retrieval(functools.partial(engine.vectors, directory), data)
        size = sum(file.stat().st_size for file in directory.glob(FILES.get(arguments.engine, "*.safetensors")))
        print(json.dumps({
            "directory": directory.name, "engine": engine.name, "mb": round(size / 1e6, 1),
            "ndcg@10": round(metrics["ndcg@10"], 4),
            "texts_per_cpu_second": round((len(texts) - 8) / min(times[directory]), 1),
            "minimum_cosine_to_first": round(float(cosine.min()), 5)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
