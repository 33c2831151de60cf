"""Train with Sentence Transformers' model, tokenization and loss in a plain loop, for comparisons with our trainer.

Writes OUTPUT/metrics.jsonl with `step`, `loss`, `grad_norm` and `step_seconds` as our trainer does, and `tokens`
without padding; with --save OUTPUT/model. AdamW without decay of biases and norms, gradient clipping at 1, a constant
learning rate, no dropout, rows in the order of the file.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

ADAM = {"betas": (0.9, 0.999), "eps": 1.0e-8}
WEIGHT_DECAY = 0.01
CLIP_GRAD = 1.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="queries per step")
    parser.add_argument("--max-length", type=int, required=True, help="tokens")
    parser.add_argument("--num-negatives", type=int, default=0, help="hard negatives per query")
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: torch.autocast")
    parser.add_argument("--mini-batch-size", type=int, default=None,
                        help="use CachedMultipleNegativesRankingLoss with parts of so many rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true")
    return parser.parse_args()


def read_columns(path: str, num_rows: int, num_negatives: int) -> list[list[str]]:
    """The first rows as columns: queries, first positives, then each of the negatives."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(num_rows), strict=False)]
    if len(rows) < num_rows or any(len(row["negatives"]) < num_negatives for row in rows):
        sys.exit(f"{path}: {num_rows} rows with {num_negatives} negatives are needed; give fewer --steps or negatives")
    texts = ([row["query"], row["positive"][0], *row["negatives"][:num_negatives]] for row in rows)
    return [list(column) for column in zip(*texts, strict=True)]


def batches(columns: list[list[str]], batch_size: int) -> Iterator[list[list[str]]]:
    for start in range(0, len(columns[0]), batch_size):
        yield [column[start : start + batch_size] for column in columns]


def parameter_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Decay for matrices only, as our trainer groups them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def main() -> None:
    arguments = parse_arguments()
    columns = read_columns(arguments.data, arguments.steps * arguments.batch_size, arguments.num_negatives)
    model = SentenceTransformer(arguments.model, device=arguments.device, model_kwargs={"dtype": torch.float32},
                                config_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    model.max_seq_length = arguments.max_length
    model.train()
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        sys.exit(f"{arguments.model}: dropout could not be switched off by its configuration")
    scale = 1.0 / arguments.temperature
    loss_function = (MultipleNegativesRankingLoss(model, scale=scale) if arguments.mini_batch_size is None else
                     CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=arguments.mini_batch_size))
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=arguments.learning_rate, fused=True, **ADAM)
    bf16 = arguments.precision == "bf16"
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step, texts in enumerate(batches(columns, arguments.batch_size), 1):
            start = time.perf_counter()
            features = [model.preprocess(column) for column in texts]  # pads each column to its longest text
            tokens = sum(int(column["attention_mask"].sum()) for column in features)
            features = [{name: value.to(arguments.device) if isinstance(value, torch.Tensor) else value
                         for name, value in column.items()} for column in features]
            with torch.autocast(arguments.device, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss = loss_function(features, None)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            optimizer.step()
            optimizer.zero_grad()
            record = {"step": step, "loss": loss.item(), "grad_norm": grad_norm.item(),
                      "tokens": tokens, "step_seconds": time.perf_counter() - start}
            file.write(json.dumps(record) + "\n")
            file.flush()
    if arguments.save:
        model.save_pretrained(str(arguments.output / "model"))


if __name__ == "__main__":
    main()
