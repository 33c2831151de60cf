"""Train the runs on which the rules of `doctor --run` are tested: faulty ones and good ones, small and on real rows.

    python tools/run_examples.py --output tests/run/examples [--only NAME ...]

Writes OUTPUT/NAME.jsonl for each run: its settings in the first line, then the rows of its metrics.jsonl with the
metrics that the rules read, in four digits. The model is the first layer of all-MiniLM-L6-v2, which knows words and
learns fast; one good run has all of it, another a small Qwen3 of random weights. One rank; some minutes in all.
"""

import argparse
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_models import TOKENIZER_FILES, packaged_model, save_random_model

import megatron_embed
from megatron_embed.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "examples" / "data" / "mini_en" / "train.jsonl"
CHINESE_ROWS = ROOT / "examples" / "data" / "mini_zh" / "train.jsonl"
Row = dict[str, Any]
Settings = dict[str, dict[str, Any]]
METRICS = ("step", "epoch", "loss", "in_batch_accuracy", "accuracy", "similarity", "positive_similarity",
           "negative_similarity", "positive_score", "negative_score", "margin_to_mean_negative",
           "margin_to_hardest_negative", "masked_fraction", "negatives_per_query", "grad_norm", "learning_rate",
           "padding_fraction", "truncated_fraction", "skipped_steps", "eval/ndcg@10", "eval/spearman",
           "eval/rerank/ndcg@10", "eval/loss")


def read_rows(count: int, path: Path = ROWS) -> list[Row]:
    """The first rows, with one negative each; the first sixty words of the documents."""
    def beginning(texts: list[str]) -> list[str]:
        return [" ".join(text.split()[:60]) for text in texts[:1]]

    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    return [{"query": row["query"], "positive": beginning(row["positive"]), "negatives": beginning(row["negatives"])}
            for row in map(json.loads, lines)]


def shuffled_positives(rows: list[Row]) -> list[Row]:
    """Each query with another one's positive."""
    positives = [row["positive"] for row in rows]
    random.Random(1).shuffle(positives)
    return [{**row, "positive": positive} for row, positive in zip(rows, positives, strict=True)]


def repeated_queries(rows: list[Row]) -> list[Row]:
    return [{**row, "positive": [row["query"]]} for row in rows]


def in_chinese(rows: list[Row]) -> list[Row]:
    """As many rows of a language that the model does not know."""
    return read_rows(len(rows), CHINESE_ROWS)


def swapped(rows: list[Row]) -> list[Row]:
    """Positives and negatives in each other's places."""
    return [{**row, "positive": row["negatives"], "negatives": row["positive"]} for row in rows if row["negatives"]]


def copied(rows: list[Row]) -> list[Row]:
    """Each row four times, one after the other."""
    return [row for row in rows for _ in range(4)]


def pairs(rows: list[Row], *, negatives: bool = True) -> list[Row]:
    """Scored pairs: query and positive 1, query and negative 0."""
    scored = [{"text_a": row["query"], "text_b": row["positive"][0], "score": 1.0} for row in rows]
    if negatives:
        scored += [{"text_a": row["query"], "text_b": text, "score": 0.0} for row in rows for text in row["negatives"]]
    random.Random(2).shuffle(scored)
    return scored


def positives_alone(rows: list[Row]) -> list[Row]:
    return pairs(rows, negatives=False)


def inverted_pairs(rows: list[Row]) -> list[Row]:
    """Each pair of query and positive, and of query and another one's positive, with the other's score."""
    right = [{"text_a": row["query"], "text_b": row["positive"][0], "score": 0.0} for row in rows]
    wrong = [{"text_a": row["query"], "text_b": row["positive"][0], "score": 1.0} for row in shuffled_positives(rows)]
    return [pair for couple in zip(right, wrong, strict=True) for pair in couple]


def damaged_batches(rows: list[Row]) -> list[Row]:
    """Every tenth batch of 16 rows has the positives of other queries."""
    return [row for start in range(0, len(rows), 16) for row in (
        shuffled_positives(rows[start:start + 16]) if start // 16 % 10 == 9 else rows[start:start + 16])]


BASE: Settings = {
    "model": {"dtype": "float32", "cpu_matmul": ["torch", "torch", "torch"]}, "embedding": {"pooling": "mean"},
    "objective": {"temperature": 0.05},
    "data": {"query_max_length": 64, "document_max_length": 160},
    "training": {"global_batch_size": 16, "micro_batch_size": 16, "train_steps": 30, "learning_rate": 2.0e-4,
                 "warmup_ratio": 0.1},
    "evaluation": {"at_start": False}, "logging": {"every_steps": 1, "tensorboard": False}}


BEIR = [str(ROOT / "examples" / "data" / "mini_en" / "beir")]


def run(change: Callable[[list[Row]], list[Row]] | None = None, *, rows: int = 320, model: str = "layer",
        **settings: Any) -> dict[str, Any]:
    """One run: what is done to its rows, their number before that, its model, and settings `section__key`."""
    return {"change": change, "rows": rows, "model": model, "settings": settings}


FAULTY = {
    "rate_too_small": run(training__learning_rate=1e-9),
    "temperature_too_large": run(objective__temperature=5.0),
    "temperature_too_small": run(objective__temperature=0.0005),
    "wrong_positives": run(shuffled_positives),
    "vectors_alike": run(training__learning_rate=1.0, training__warmup_ratio=0.0),
    "positive_repeats_query": run(repeated_queries),
    "copies_in_batch": run(copied, data__shuffle=False),
    "gradient_spikes": run(damaged_batches, rows=480, data__shuffle=False, objective__temperature=0.02),
    "padding": run(training__micro_batch_tokens=32768, training__train_steps=10),
    "cut_texts": run(data__query_max_length=8, data__document_max_length=16),
    "evaluation_falls": run(rows=32, training__train_steps=60, training__learning_rate=2e-3,
                            evaluation__every_steps=10, evaluation__retrieval=BEIR),
    "similarities_sink": run(objective__loss="sigmoid", objective__bias=5.0, objective__temperature=0.05,
                             training__learning_rate=1e-3),
    "labels_inverted": run(inverted_pairs, objective__loss="cosine_similarity"),
    "rate_too_high": run(training__learning_rate=2e-2),
    "entropy_of_labels": run(in_chinese, task="reranker", embedding__pooling=None, objective__loss="pointwise",
                             data__num_negatives=1),
    "endless_warmup": run(training__warmup_ratio=0.9),
    "few_negatives": run(training__global_batch_size=2, training__micro_batch_size=2),
    "labels_of_one_kind": run(positives_alone, objective__loss="cosine_similarity"),
    "not_finite": run(training__learning_rate=1e30, training__clip_grad=0.0, training__warmup_ratio=0.0),
    "swapped": run(swapped, objective__loss="triplet", objective__margin=0.3, data__num_negatives=1,
                   evaluation__at_start=True, evaluation__every_steps=10, evaluation__retrieval=BEIR)}
GOOD = {
    "info_nce": run(), "soft": run(objective__temperature=0.1), "sharp": run(objective__temperature=0.02),
    "hard_negatives": run(data__num_negatives=1),
    "qwen3": run(model="qwen3", embedding__pooling="lasttoken", training__learning_rate=1e-3),
    "sigmoid": run(objective__loss="sigmoid", objective__bias=-3.0, objective__temperature=0.1),
    "triplet": run(objective__loss="triplet", objective__margin=0.3, data__num_negatives=1),
    "pairs": run(pairs, objective__loss="cosine_similarity"), "cosent": run(pairs, objective__loss="cosent"),
    "reranker": run(task="reranker", embedding__pooling=None, objective__loss="pointwise", data__num_negatives=1),
    "listwise": run(task="reranker", embedding__pooling=None, objective__loss="listwise", data__num_negatives=1),
    "adapters": run(lora__rank=8, training__learning_rate=2e-3),
    "evaluated": run(rows=480, evaluation__at_start=True, evaluation__every_steps=10, evaluation__retrieval=BEIR),
    "held_out": run(rows=480, evaluation__at_start=True, evaluation__every_steps=10, data__validation_fraction=0.1),
    "pretrained": run(model="minilm", training__train_steps=8, training__learning_rate=5e-5)}


def save_first_layer(directory: Path) -> str:
    """all-MiniLM-L6-v2 without its other five layers."""
    import transformers

    model = transformers.AutoModel.from_pretrained(packaged_model(), num_hidden_layers=1)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(Path(packaged_model()) / name, directory)
    return str(directory)


def settings_of(example: dict[str, Any], folder: Path) -> Settings:
    """Settings of a run in a folder of its own, by section; a value of None takes a setting out."""
    values: Settings = json.loads(json.dumps(BASE))
    for key, value in example["settings"].items():
        section, _, name = key.partition("__")
        if not name:
            values[section] = value
        elif value is None:
            values[section].pop(name, None)
        else:
            values.setdefault(section, {})[name] = value
    if values["objective"].get("loss", "info_nce") not in ("info_nce", "sigmoid", "cosent"):
        del values["objective"]["temperature"]
    values["logging"]["directory"] = str(folder / "log")
    return values


def train(name: str, example: dict[str, Any], models: dict[str, str], output: Path) -> None:
    """Train one run and write what it logged."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = read_rows(example["rows"])
        if example["change"] is not None:
            rows = example["change"](rows)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = settings_of(example, folder)
        values["model"]["path"], values["data"]["train"] = models[example["model"]], [str(folder / "train.jsonl")]
        try:
            megatron_embed.train(values)
        except UserError as error:  # a run that ends by its mistake
            print(f"    ended: {error}")
        lines = (folder / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values["model"]["path"], values["data"]["train"] = example["model"], [{"path": "train.jsonl"}]
    del values["logging"]["directory"]
    for section in ("evaluation", "embedding", "data"):
        values[section].pop("retrieval", None)
    kept = [{key: value if not isinstance(value, float) else float(f"{value:.4g}")
             for key, value in json.loads(line).items() if key in METRICS} for line in lines]
    text = "\n".join(json.dumps(row) for row in [{"settings": values}, *kept])
    (output / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--only", nargs="+", help="names of runs")
    arguments = parser.parse_args()
    logging.getLogger("megatron_embed").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        models = {"layer": save_first_layer(Path(folder) / "layer"), "minilm": packaged_model(),
                  "qwen3": save_random_model(Path(folder) / "qwen3", "Qwen3Config", hidden_size=64, num_hidden_layers=2,
                                             num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                             intermediate_size=96, max_position_embeddings=512, initializer_range=0.2)}
        for kind, examples in (("faulty", FAULTY), ("good", GOOD)):
            (arguments.output / kind).mkdir(parents=True, exist_ok=True)
            for name, example in examples.items():
                if arguments.only is None or name in arguments.only:
                    print(f"{kind}/{name}", flush=True)
                    train(name, example, models, arguments.output / kind)


if __name__ == "__main__":
    main()
