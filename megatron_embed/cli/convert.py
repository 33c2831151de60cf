"""`convert hf-to-megatron SRC DST` and `convert megatron-to-hf SRC DST [--format ...]`"""

import argparse
import shutil
from pathlib import Path

from megatron_embed.cli.common import path, positive_int, write_output
from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.names import GGUF_TYPES

HELP = "Convert a model between Hugging Face directories and checkpoints of megatron-embed"
EXAMPLES = ("megatron-embed convert megatron-to-hf runs/a/best out --format sentence-transformers",
            "megatron-embed convert hf-to-megatron Qwen3-Embedding-0.6B out")
PAGE = "docs/conversion.md"

FORMATS = {
    "hf": "weights, configuration and tokenizer in the model's original architecture",
    "sentence-transformers": "the same with pooling, normalization and prompts, in the layout that servers read",
    "pylate": "a multi-vector model in the layout of PyLate",
    "cross-encoder": "a reranker for CrossEncoder and servers",
    "peft": "only the LoRA adapters",
    "onnx": "sentence-transformers or cross-encoder with onnx/model.onnx, which pools and normalizes or scores",
    "openvino": "the same with openvino/openvino_model.xml",
    "gguf": "an embedding model for llama.cpp",
}
"""Formats that a checkpoint can be exported to, the last three a Hugging Face directory as well; each has its function
in export/formats.py."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_megatron = directions.add_parser("hf-to-megatron", help="Convert a Hugging Face directory to a checkpoint")
    to_hf = directions.add_parser("megatron-to-hf", help="Convert a checkpoint to a Hugging Face directory")
    verify = directions.add_parser("verify", help="Compare an engine's vectors or scores of a directory with ours")
    for direction in (to_megatron, to_hf, verify):
        direction.add_argument("source", metavar="SRC", type=path, help="Directory to read")
    for direction in (to_hf, verify):
        direction.add_argument("--verify-with", metavar="ENGINE,...", default="" if direction is to_hf else None,
                               required=direction is verify, help="Engines that run the written directory on real "
                               "texts: sentence-transformers, transformers, onnxruntime, openvino, vllm, llama.cpp; "
                               "or whose source is asked, by rules: tei, sglang, infinity; exit status 2 if one gives "
                               "other vectors or scores")
    verify.add_argument("--against", metavar="MODEL", type=path,
                        help="Run, checkpoint or directory that SRC was made of, whose vectors or scores are the right "
                             "ones (default: SRC, as this program reads it)")
    for direction in (to_megatron, to_hf):
        direction.add_argument("destination", metavar="DST", type=path, help="Directory to create")
    to_hf.add_argument("--format", choices=FORMATS, default="hf",
                       help="; ".join(f"{name}: {text}" for name, text in FORMATS.items()) + " (default: hf)")
    to_hf.add_argument("--max-shard-size", metavar="SIZE", default="5GB",
                       help="Maximum size of a weight file, such as 5GB or 512MiB (default: 5GB)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="Dtype of the written weights (default: the checkpoint's, bit for bit)")
    to_hf.add_argument("--gguf-type", choices=GGUF_TYPES, default="f32",
                       help="Weights of --format gguf (default: f32)")
    for direction in (to_hf, verify):
        direction.add_argument("--dim", type=positive_int, metavar="N",
                               help="Components of the vectors of an ONNX or OpenVINO graph, as matryoshka training "
                                    "allows (default: all)")
    to_hf.add_argument("--quantize", choices=("int8",),
                       help="Multiply in 8-bit integers in the graph of --format onnx and openvino, if vectors stay "
                            "within cosine 0.99 (default: float32)")
    to_hf.add_argument("--calibration", metavar="FILE", type=path,
                       help="Rows of training data to calibrate --quantize on (default: data.train of the run that SRC "
                            "is)")
    to_hf.add_argument("--no-compare", action="store_true",
                       help="Do not load the result with the stock library and compare it with the checkpoint on "
                            "texts; the tensors are always read back and compared")
    to_hf.add_argument("--merge-lora", action="store_true",
                       help="Merge the checkpoint's LoRA adapters into the weights")


def run(args: argparse.Namespace) -> int:
    """Convert in this one process and print the report."""
    if args.direction == "hf-to-megatron":
        from megatron_embed.convert.convert import hf_to_megatron
        from megatron_embed.convert.peft import is_peft_directory

        if is_peft_directory(args.source):
            raise CheckpointError(f"{args.source}: a PEFT adapter, not a model; give it as model.path or --model, "
                                  "which accept adapters, or convert its base model")
        write_output(str(hf_to_megatron(args.source, args.destination)))
        return 0
    if args.direction == "verify":
        _verify(args.source, args.verify_with, args.against, args.dim)
        return 0
    if args.verify_with:
        from megatron_embed.export.engines.gate import check_engines, engine_names

        check_engines(engine_names(args.verify_with), args.source)  # refused before anything is written
    from megatron_embed.export.formats import EXPORTERS, ExportOptions, check_quantization

    options = ExportOptions(max_shard_size=args.max_shard_size, dtype=args.dtype, compare=not args.no_compare,
                            merge_lora=args.merge_lora, gguf_type=args.gguf_type, dim=args.dim, quantize=args.quantize,
                            calibration=args.calibration)
    check_quantization(args.format, options)
    write_output("\n".join(EXPORTERS[args.format](args.source, args.destination, options)))
    if args.verify_with:
        try:
            _verify(args.destination, args.verify_with, args.source, args.dim)
        except UserError:
            shutil.rmtree(args.destination)  # written by this command, and not what was trained
            raise
    return 0


def _verify(directory: str, engines: str, against: str | None, dim: int | None) -> None:
    from megatron_embed.export.engines.gate import engine_names, verify_directory

    write_output("\n".join(verify_directory(Path(directory), engine_names(engines), against, dim)))
