"""`encode --model DIR --input FILE.jsonl --output FILE.npy`"""

import argparse

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument

HELP = "texts to vectors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--input", required=True, metavar="FILE.jsonl", help='rows {"text": ...}')
    parser.add_argument("--output", required=True, metavar="FILE.npy", help="float32 vectors, one row per text")
    parser.add_argument("--role", choices=("query", "document"),
                        help="put the directory's prompt for this role before every text; default: no prompt")
    add_encoding_arguments(parser)
