"""`init MODEL DATA...` and `init --from FILE|"COMMAND LINE"`"""

import argparse
from pathlib import Path

from megatron_embed.cli.columns import add_columns_argument
from megatron_embed.cli.common import path, positive_int, write_output
from megatron_embed.errors import ConfigError, UserError

HELP = "Write a configuration: a starting one for a model and data, or another trainer's settings translated"
EXAMPLES = ("megatron-embed init Qwen/Qwen3-Embedding-0.6B train.jsonl --output run.yaml",
            "megatron-embed init --from train.sh --output run.yaml")
PAGE = "docs/foreign_words.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_embed.planning.hardware import GPU_CHOICES

    parser.add_argument("model", nargs="?", type=path, metavar="MODEL", help="Model directory or hub name")
    parser.add_argument("data", nargs="*", type=path, metavar="DATA", help="Files of rows, folders or hub data sets")
    add_columns_argument(parser, "of DATA")
    parser.add_argument("--from", dest="source", metavar="FILE|COMMAND",
                        help="Translate a YAML, JSON or shell file of Transformers, ms-swift, FlagEmbedding, Tevatron, "
                             "Sentence Transformers or DeepSpeed, or a command line in quotes")
    parser.add_argument("--task", choices=("embedding", "reranker"), help="Of a starting configuration (default: "
                        "embedding)")
    parser.add_argument("--lora", action="store_true", help="Train low-rank adapters instead of all parameters")
    parser.add_argument("--gpus", type=positive_int, metavar="N", help="GPUs to plan for (default: 1)")
    parser.add_argument("--gpu", choices=tuple(GPU_CHOICES), default="h100", help="GPU model or memory (default: h100)")
    parser.add_argument("--output", metavar="FILE", type=path, help="File to create (default: standard output)")


def run(args: argparse.Namespace) -> int:
    """Write the configuration; 0 unless there is nothing to write it from."""
    if (args.source is None) == (args.model is None):
        raise UserError("init takes MODEL DATA for a starting configuration, or --from FILE|\"COMMAND LINE\" to "
                        "translate another trainer's; see `megatron-embed init --help`")
    if args.source is not None and (args.task is not None or args.lora or args.gpus is not None or args.columns):
        raise UserError("--task, --lora, --gpus and --columns are for a starting configuration; --from takes them from "
                        "what it translates")
    if args.output is not None and Path(args.output).exists():
        raise UserError(f"--output {args.output}: exists; nothing is overwritten, name another file")
    text = _translation(args.source) if args.source is not None else _starting(args)
    if args.output is None:
        write_output(text.rstrip("\n"))
        return 0
    try:
        Path(args.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written: {error.strerror}") from None
    return 0


def _translation(source: str) -> str:
    """The translated text, which is a configuration that can be loaded."""
    from megatron_embed.config.load import load_text
    from megatron_embed.init.translate import translated

    text = translated(source).text()
    try:
        load_text(text, "the translation")
    except ConfigError as error:
        raise ConfigError(f"--from: {error}; correct it in the other trainer's settings, or leave it out there",
                          key=error.key) from None
    return text


def _starting(args: argparse.Namespace) -> str:
    from megatron_embed.config.load import load_text
    from megatron_embed.init.starting import starting_text
    from megatron_embed.planning.hardware import GPU_CHOICES

    if not args.data:
        raise UserError(f"init {args.model}: give the data too: a file of rows such as train.jsonl")
    text = starting_text(args.model, args.data, task=args.task or "embedding", lora=args.lora, gpus=args.gpus or 1,
                         gpu=GPU_CHOICES[args.gpu], columns=args.columns)
    load_text(text, "the starting configuration")
    return text
