"""`evaluate --model DIR --data BEIR_DIR|FILE.jsonl`"""

import argparse
import functools
import json
import os

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path, write_output

HELP = "retrieval metrics on a BEIR folder, or ranking metrics on a file of lists, as one JSON object in the last line"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--data", required=True, metavar="BEIR_DIR|FILE.jsonl", type=path,
                        help="folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, for an embedding model; or "
                             'a file of lists {"query", "documents": [...], "labels": [...]}, for a reranker as well')
    parser.add_argument("--split", default="test", help="which qrels file; default: test")
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the metrics from rank 0; prompts are the directory's."""
    metrics, rank = evaluate_lists(args) if os.path.isfile(args.data) else evaluate_beir(args)
    if rank == 0:
        write_output(json.dumps(metrics))
    return 0


def evaluate_beir(args: argparse.Namespace) -> tuple[dict[str, float], int]:
    """(metrics of an embedding model on a BEIR folder, this rank)."""
    from megatron_embed.evaluation.beir import load_beir

    data = load_beir(args.data, args.split)
    from megatron_embed.cli.model import open_encoder
    from megatron_embed.evaluation.retrieval import evaluate_retrieval

    encoder, model, topology = open_encoder(args, prompts=True)
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    return evaluate_retrieval(encode, data, similarity=model.saved.similarity), topology.rank


def evaluate_lists(args: argparse.Namespace) -> tuple[dict[str, float], int]:
    """(metrics of a reranker, or of an embedding model's similarities, on a file of lists, this rank)."""
    from megatron_embed.evaluation.reranking import evaluate_reranking, load_rerank_file, similarity_of_pairs

    data = load_rerank_file(args.data)
    from megatron_embed.cli.model import find_model, open_encoder
    from megatron_embed.cli.reranker import is_reranker, open_scorer

    if is_reranker(find_model(args.model, "--model")):
        scorer, _, topology = open_scorer(args)
        score = functools.partial(scorer.raw_scores, show_progress=topology.rank == 0)
        return evaluate_reranking(score, data), topology.rank
    encoder, model, topology = open_encoder(args, prompts=True)
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    score = functools.partial(similarity_of_pairs, encode, similarity=model.saved.similarity)
    return evaluate_reranking(score, data), topology.rank
