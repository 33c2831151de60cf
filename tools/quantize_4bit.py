"""Quantize the weights of an export to 4 bits with llm-compressor (GPTQ or AWQ), and compare the vectors.

    quant-env/bin/python tools/quantize_4bit.py exported exported-4bit --calibration train.jsonl --method gptq

Runs in an environment of its own, without this package (docs/quantization.md). Reads a Sentence
Transformers directory and rows {"query", "positive": [...]}, calibrates on three quarters of the rows and compares on
the rest. The result has
the same layout, with weights in compressed-tensors' format, which vLLM reads. Exit status 2, and nothing is
left behind, if a text's cosine is below --minimum-cosine.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader
from transformers import CompressedTensorsConfig

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "onnx", "openvino", "*.gguf")
"""Files of the export that are not copied."""
SCHEME = "W4A16"
"""4-bit integers with a scale for every 128 weights of a row; activations stay as they are."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Sentence Transformers directory")
    parser.add_argument("destination", type=Path, help="directory to create")
    parser.add_argument("--calibration", type=Path, required=True, help="JSONL file of training rows")
    parser.add_argument("--rows", type=int, default=256, help="rows that are taken, from the beginning")
    parser.add_argument("--method", choices=("gptq", "awq"), default="gptq",
                        help="awq: decoders such as Qwen3 and Llama; gptq: encoders too")
    parser.add_argument("--minimum-cosine", type=float, default=0.9, help="of every text that is compared")
    return parser.parse_args()


def read_texts(file: Path, count: int) -> list[tuple[str, str]]:
    """(role, text) of the first rows: their queries and first positives."""
    texts: list[tuple[str, str]] = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip() and len(texts) < 2 * count:
                row = json.loads(line)
                texts += [("query", row["query"]), ("document", row["positive"][0])]
    return texts


def calibration_batches(model: SentenceTransformer, texts: Sequence[tuple[str, str]]) -> DataLoader[Any]:
    """One text a batch, with its prompt, as the model tokenizes it."""
    prompts = model.prompts or {}
    rows = [model.preprocess([text], prompt=prompts.get(role) or None) for role, text in texts]
    tensors = [{name: value for name, value in row.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
               for row in rows]
    return DataLoader(tensors, batch_size=None)  # type: ignore[arg-type]


def recipe_of(method: str) -> list[Any]:
    """The modifiers of llm-compressor; linear layers alone, not embedding tables."""
    if method == "gptq":
        return [GPTQModifier(targets="Linear", scheme=SCHEME)]
    return [AWQModifier(), QuantizationModifier(targets="Linear", scheme=SCHEME)]


def encode(directory: Path, texts: Sequence[tuple[str, str]], **settings: Any) -> torch.Tensor:
    """[texts, dim] unit vectors in float32, with prompts; `settings`: how Transformers loads the model."""
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True, model_kwargs=settings)
    vectors = []
    for role in ("query", "document"):
        encoder = model.encode_query if role == "query" else model.encode_document
        vectors.append(encoder([text for name, text in texts if name == role], convert_to_tensor=True,
                               show_progress_bar=False).float())
    return torch.nn.functional.normalize(torch.cat(vectors), dim=1)


def main() -> int:
    arguments = parse_arguments()
    if arguments.destination.exists():
        print(f"{arguments.destination}: exists already; choose another name", file=sys.stderr)
        return 2
    texts = read_texts(arguments.calibration, arguments.rows)
    held, calibration = texts[: len(texts) // 4], texts[len(texts) // 4:]
    exact = encode(arguments.source, held)
    with tempfile.TemporaryDirectory(prefix=".4bit-", dir=arguments.destination.absolute().parent) as folder:
        result = Path(folder) / "export"
        shutil.copytree(arguments.source, result, ignore=shutil.ignore_patterns(*WEIGHTS))
        model = SentenceTransformer(str(arguments.source), device="cpu", local_files_only=True)
        network = model[0].auto_model
        oneshot(model=network, dataset=calibration_batches(model, calibration), recipe=recipe_of(arguments.method))
        network.save_pretrained(str(result), save_compressed=True)
        packed = encode(result, held, quantization_config=CompressedTensorsConfig(dequantize=True))
        cosine = (exact * packed).sum(dim=1)
        line = f"cosine >= {cosine.min():.4f} (mean {cosine.mean():.4f}) for {len(held)} texts"
        if not cosine.min() >= arguments.minimum_cosine:
            print(f"{arguments.destination}: not written: {line}, below {arguments.minimum_cosine}", file=sys.stderr)
            return 2
        result.rename(arguments.destination)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors"))
             for folder in (arguments.source, arguments.destination)]
    print(f"{arguments.method}, {SCHEME}: {line}; weights {sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
