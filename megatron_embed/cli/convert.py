"""`convert hf-to-megatron SRC DST` and `convert megatron-to-hf SRC DST [--format ...]`"""

import argparse

from megatron_embed.cli.common import path, write_output
from megatron_embed.errors import CheckpointError

HELP = "Convert a model between Hugging Face directories and checkpoints of megatron-embed"
EXAMPLES = ("megatron-embed convert megatron-to-hf runs/a/best out --format sentence-transformers",
            "megatron-embed convert hf-to-megatron Qwen3-Embedding-0.6B out")
PAGE = "docs/conversion.md"

FORMATS = {
    "hf": "weights, configuration and tokenizer in the model's original architecture",
    "sentence-transformers": "the same with pooling, normalization and prompts, in the layout that servers read",
    "cross-encoder": "a reranker for CrossEncoder and servers",
    "peft": "only the LoRA adapters",
}
"""Formats that a checkpoint can be exported to; each has its function in export/formats.py."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_megatron = directions.add_parser("hf-to-megatron", help="Convert a Hugging Face directory to a checkpoint")
    to_hf = directions.add_parser("megatron-to-hf", help="Convert a checkpoint to a Hugging Face directory")
    for direction in (to_megatron, to_hf):
        direction.add_argument("source", metavar="SRC", type=path, help="Directory to read")
        direction.add_argument("destination", metavar="DST", type=path, help="Directory to create")
    to_hf.add_argument("--format", choices=FORMATS, default="hf",
                       help="; ".join(f"{name}: {text}" for name, text in FORMATS.items()) + " (default: hf)")
    to_hf.add_argument("--max-shard-size", metavar="SIZE", default="5GB",
                       help="Maximum size of a weight file, such as 5GB or 512MiB (default: 5GB)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="Dtype of the written weights (default: the checkpoint's, bit for bit)")
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
    from megatron_embed.export.formats import EXPORTERS, ExportOptions

    options = ExportOptions(max_shard_size=args.max_shard_size, dtype=args.dtype, compare=not args.no_compare,
                            merge_lora=args.merge_lora)
    write_output("\n".join(EXPORTERS[args.format](args.source, args.destination, options)))
    return 0
