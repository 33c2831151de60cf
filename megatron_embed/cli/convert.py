"""`convert hf-to-megatron SRC DST` and `convert megatron-to-hf SRC DST [--format ...]`"""

import argparse

from megatron_embed.cli.common import path, write_output
from megatron_embed.errors import CheckpointError, ConfigError

HELP = "convert a model between Hugging Face directories and our checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_megatron = directions.add_parser("hf-to-megatron", help="Hugging Face directory to a checkpoint")
    to_hf = directions.add_parser("megatron-to-hf", help="checkpoint to a Hugging Face directory")
    for direction in (to_megatron, to_hf):
        direction.add_argument("source", metavar="SRC", type=path, help="what to read")
        direction.add_argument("destination", metavar="DST", type=path, help="directory to make")
    to_hf.add_argument("--format", choices=("hf", "sentence-transformers", "cross-encoder", "peft"), default="hf",
                       help="hf: weights, configuration, tokenizer; sentence-transformers: with pooling, normalization "
                            "and prompts as well, loaded and compared before it counts as done; cross-encoder: a "
                            "reranker for CrossEncoder and servers, compared likewise; peft: the LoRA adapters alone; "
                            "default: hf")
    to_hf.add_argument("--merge-lora", action="store_true",
                       help="write the checkpoint's LoRA adapters into the weights")


def run(args: argparse.Namespace) -> int:
    """Convert in this one process and print the report."""
    from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
    from megatron_embed.convert.peft import is_peft_directory, write_peft

    if args.direction == "hf-to-megatron":
        if is_peft_directory(args.source):
            raise CheckpointError(f"{args.source}: a PEFT adapter, no model; give it as model.path or --model, which "
                                  "take it as it is, or convert its base model")
        write_output(str(hf_to_megatron(args.source, args.destination)))
    elif args.format == "peft":
        if args.merge_lora:
            raise ConfigError("--merge-lora: --format peft writes the adapters apart from the weights; leave one out")
        write_output(str(write_peft(args.source, args.destination)))
    elif args.format == "cross-encoder" or (args.format == "hf" and trained_head(args.source) is not None):
        from megatron_embed.cli.export_reranker import export_reranker_checkpoint

        if args.merge_lora:
            raise ConfigError(f"--merge-lora: {args.source} is to be a reranker, and those have no adapters; leave it "
                              "out")
        classification = args.format == "cross-encoder" or trained_head(args.source) == "score"
        write_output(export_reranker_checkpoint(args.source, args.destination, classification=classification))
    elif args.format == "hf":
        write_output(str(megatron_to_hf(args.source, args.destination, merge_lora=args.merge_lora)))
    else:
        from megatron_embed.cli.export import export_checkpoint

        write_output(export_checkpoint(args.source, args.destination, merge_lora=args.merge_lora))
    return 0


def trained_head(source: str) -> str | None:
    """The head of the reranker that a checkpoint is; null for an embedding model's."""
    from megatron_embed.convert.layout import open_checkpoint

    return open_checkpoint(source).info.head
