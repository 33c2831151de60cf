"""`encode --model DIR --input FILE.jsonl --output FILE.npy|DIR`"""

import argparse
import os

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError
from megatron_embed.parallel.lost_rank import monitored_ranks

HELP = "Encode texts as vectors"
EXAMPLES = ("megatron-embed encode --model runs/a/best --input texts.jsonl --output vectors.npy --role document",
            "megatron-embed encode --model runs/a/best --input corpus.jsonl --output vectors --role document "
            "--output-dtype float16")
PAGE = "docs/evaluation.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--input", required=True, metavar="FILE.jsonl", type=path,
                        help='Rows {"text": ..., "title"?: ...}; a title is put before its text, as in evaluate')
    parser.add_argument("--output", required=True, metavar="FILE.npy|DIR", type=path,
                        help="File to write, one row per text; or a directory of such files (shards), for corpora that "
                             "do not fit into memory: a command that was killed goes on with the next shard")
    parser.add_argument("--output-dtype", choices=("float32", "float16"), default="float32",
                        help="Type of the numbers in the files (default: float32)")
    parser.add_argument("--role", choices=("query", "document"),
                        help="Put the prompt of this role before every text (default: no prompt)")
    add_prompt_arguments(parser)
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write [texts, dim], in the order of the rows; nothing half-written is left behind."""
    from megatron_embed.data.corpus import TextsOnDisk

    texts = TextsOnDisk(args.input, "--input")
    folder = os.path.dirname(os.path.abspath(args.output))
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)) or (
            args.output.endswith(".npy") == os.path.isdir(args.output) and os.path.exists(args.output)):
        raise ConfigError(f"--output {args.output}: must be a .npy file, or a directory, in a directory that exists "
                          "and is writable", key="--output")
    from megatron_embed.loading.model_directory import open_encoder
    from megatron_embed.loading.prompts import given_prompts
    from megatron_embed.run.encode_command import encode_to_directory, encode_to_file

    prompts = given_prompts(args, () if args.role is None else (args.role,))
    with monitored_ranks() as start:
        encoder, model, _ = open_encoder(args, prompts=args.role is not None, given_prompts=prompts, start=start)
        if args.output.endswith(".npy"):
            encode_to_file(args, texts, encoder)
        else:
            encode_to_directory(args, texts, encoder, model)
    return 0
