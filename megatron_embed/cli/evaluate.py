"""`evaluate --model DIR --data BEIR_DIR`"""

import argparse

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument

HELP = "retrieval metrics on a BEIR folder, as one JSON object in the last line of stdout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--data", required=True, metavar="BEIR_DIR",
                        help="folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    parser.add_argument("--split", default="test", help="which qrels file; default: test")
    add_encoding_arguments(parser)
