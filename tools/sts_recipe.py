"""Train a new encoder on STS pairs with this package and with Sentence Transformers; compare Spearman on dev pairs.

    python tools/sts_recipe.py --train train.jsonl --dev dev.jsonl --loss cosent

Rows are {"text_a", "text_b", "score"}, as in the STS benchmark (scores 0 to 5; --scale divides them). The encoder is a
small BERT with random weights and the tokenizer of all-MiniLM-L6-v2. Both trainers start from the same weights and use
the same pairs in the same order, shuffled again for each epoch: AdamW, linear warm-up and decay, clipping at 1, no
weight decay, no dropout, float32, mean pooling. The score "before" is that of the random weights, whose mean pooling
already counts shared words. Exit status 1 if training does not raise the Spearman correlation on the dev pairs, or if
the two results differ by more than 0.01.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import children
import torch
import yaml
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, CosineSimilarityLoss
from small_models import save_random_model
from transformers import get_linear_schedule_with_warmup

BOUND = 0.01
CLIP_GRAD = 1.0
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="JSONL file of pairs")
    parser.add_argument("--dev", required=True, help="JSONL file of pairs")
    parser.add_argument("--loss", choices=("cosent", "cosine_similarity"), default="cosent")
    parser.add_argument("--scale", type=float, default=5.0, help="scores are divided by this")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8, help="of our trainer: pairs per micro-batch")
    parser.add_argument("--learning-rate", type=float, default=2.0e-4)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--temperature", type=float, default=0.05, help="temperature of cosent")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    return parser.parse_args()


def read_pairs(path: str, scale: float) -> list[Row]:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [{"text_a": row["text_a"], "text_b": row["text_b"], "score": row["score"] / scale} for row in rows]


def in_order(pairs: list[Row], epochs: int, batch_size: int) -> list[Row]:
    """The pairs in training order: a permutation per epoch, whole batches."""
    generator = random.Random(0)
    rows = [row for _ in range(epochs) for row in generator.sample(pairs, len(pairs))]
    return rows[: len(rows) // batch_size * batch_size]


def spearman(model: SentenceTransformer, pairs: list[Row]) -> float:
    """Spearman correlation of cosine similarities and scores."""
    first, second = (model.encode([row[name] for row in pairs], convert_to_tensor=True)
                     for name in ("text_a", "text_b"))
    similarity = torch.cosine_similarity(first, second, dim=1)
    return float(spearmanr(similarity.tolist(), [row["score"] for row in pairs]).statistic)


def train_peer(start: Path, rows: list[Row], warmup: int, arguments: argparse.Namespace) -> SentenceTransformer:
    """Train Sentence Transformers' model and loss in a plain loop."""
    model = SentenceTransformer(str(start), device="cpu")
    loss = CoSENTLoss(model, scale=1 / arguments.temperature) if arguments.loss == "cosent" else CosineSimilarityLoss(
        model)
    steps = len(rows) // arguments.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    model.train()
    for step in range(steps):
        batch = rows[step * arguments.batch_size : (step + 1) * arguments.batch_size]
        features = [model.preprocess([row[name] for row in batch]) for name in ("text_a", "text_b")]
        value = loss(features, torch.tensor([row["score"] for row in batch]))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        scheduler.step()
    return model.eval()


def train_ours(start: Path, rows: list[Row], warmup: int, arguments: argparse.Namespace,
               folder: Path) -> SentenceTransformer:
    """Train with this package. Returns its export in Sentence Transformers."""
    data, config = folder / "pairs.jsonl", folder / "run.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    objective = {"loss": arguments.loss}
    if arguments.loss == "cosent":
        objective["temperature"] = arguments.temperature
    config.write_text(yaml.safe_dump({
        "model": {"path": str(start), "dtype": "float32"}, "embedding": {"pooling": "mean"}, "objective": objective,
        "data": {"train": [str(data)], "shuffle": False},
        "training": {"global_batch_size": arguments.batch_size, "micro_batch_size": arguments.micro_batch_size,
                     "train_steps": len(rows) // arguments.batch_size, "learning_rate": arguments.learning_rate,
                     "warmup_steps": warmup, "lr_decay_style": "linear", "weight_decay": 0.0, "clip_grad": CLIP_GRAD},
        "checkpoint": {"directory": str(folder / "run"), "export_at_end": str(folder / "export")}}), encoding="utf-8")
    children.run([sys.executable, "-m", "megatron_embed", "train", str(config)])
    return SentenceTransformer(str(folder / "export"), device="cpu")


def main() -> None:
    arguments = parse_arguments()
    pairs, dev = read_pairs(arguments.train, arguments.scale), read_pairs(arguments.dev, arguments.scale)
    rows = in_order(pairs, arguments.epochs, arguments.batch_size)
    steps = len(rows) // arguments.batch_size
    warmup = round(arguments.warmup * steps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_random_model(folder / "start", seed=0, hidden_size=arguments.hidden_size,
                          num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden_size // 32,
                          intermediate_size=4 * arguments.hidden_size, hidden_dropout_prob=0.0,
                          attention_probs_dropout_prob=0.0)
        before = spearman(SentenceTransformer(str(folder / "start"), device="cpu"), dev)
        started = time.perf_counter()
        ours = spearman(train_ours(folder / "start", rows, warmup, arguments, folder), dev)
        between = time.perf_counter()
        peer = spearman(train_peer(folder / "start", rows, warmup, arguments), dev)
        ended = time.perf_counter()
    print(json.dumps({
        "loss": arguments.loss, "pairs": len(pairs), "dev_pairs": len(dev), "steps": steps,
        "before": round(before, 4), "ours": round(ours, 4), "sentence_transformers": round(peer, 4),
        "seconds": [round(between - started), round(ended - between)]}))
    sys.exit(0 if ours > before and abs(ours - peer) <= BOUND else 1)


if __name__ == "__main__":
    main()
