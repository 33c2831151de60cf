"""`evaluate --model DIR --data BEIR_DIR`"""

import argparse
import functools
import json

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path, write_output

HELP = "retrieval metrics on a BEIR folder, as one JSON object in the last line of stdout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--data", required=True, metavar="BEIR_DIR", type=path,
                        help="folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    parser.add_argument("--split", default="test", help="which qrels file; default: test")
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the metrics from rank 0; prompts are the directory's."""
    from megatron_embed.evaluation.beir import load_beir

    data = load_beir(args.data, args.split)
    from megatron_embed.cli.model import open_encoder
    from megatron_embed.evaluation.retrieval import evaluate_retrieval

    encoder, model, topology = open_encoder(args, prompts=True)
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    metrics = evaluate_retrieval(encode, data, similarity=model.saved.similarity)
    if topology.rank == 0:
        write_output(json.dumps(metrics))
    return 0
