"""`evaluate --model DIR --data BEIR_DIR|FILE.jsonl`"""

import argparse
import contextlib
import json

from megatron_embed.cli.columns import add_columns_argument
from megatron_embed.cli.common import (
    add_encoding_arguments,
    add_given_vectors,
    add_model_argument,
    check_vector_options,
    comma_list,
    path,
    positive_int,
    write_output,
)
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError
from megatron_embed.names import PRECISIONS, Precision
from megatron_embed.platform.terminal_text import write_error
from megatron_embed.run.required_metrics import Requirement, missed_requirements, parse_requirement

HELP = "Evaluate retrieval, pairs with scores, or ranked lists; the last line of stdout is a JSON object of metrics"
EXAMPLES = ("megatron-embed evaluate --model runs/a/best --data beir/scifact",
            "megatron-embed evaluate --model runs/a/best --data beir/scifact --precision int8,binary,rescore",
            "megatron-embed evaluate --model runs/a/best --data pairs.jsonl")
PAGE = "docs/evaluation.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--data", required=True, metavar="BEIR_DIR|FILE.jsonl", type=path,
                        help="For an embedding model: a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, "
                             'or a file of pairs {"text_a", "text_b", "score"}. For an embedding model or a reranker: '
                             'a file of lists {"query", "documents": [...], "labels": [...]}')
    add_columns_argument(parser, "of a file of pairs or lists")
    parser.add_argument("--split", help="Name of the qrels file of a folder (default: test)")
    parser.add_argument("--drop-own-id", action="store_true",
                        help="Remove the document with the query's own id from its ranking, as BEIR and MTEB do for "
                             "ArguAna and Quora")
    parser.add_argument("--dims", type=dims, default=(), metavar="N,N",
                        help="Also evaluate vectors truncated to these dimensions, as dim_N/...")
    parser.add_argument("--precision", type=precisions, default=(), metavar="P,P",
                        help="Also evaluate vectors as a store keeps them, at every width: int8; binary, by Hamming "
                             "distances of signs; rescore, whose best candidates by these are ranked by the query as "
                             "it is. As int8/..., binary/... and rescore/...; float32 is always evaluated")
    parser.add_argument("--two-stage", type=positive_int, metavar="N",
                        help="Also evaluate a search with vectors truncated to N dimensions whose best candidates are "
                             "ranked by the full vectors, as two_stage_N/...")
    parser.add_argument("--reranker", metavar="DIR", type=path,
                        help="Also evaluate a search whose best candidates this reranker ranks, as reranked/...")
    parser.add_argument("--reranker-weight", type=weights, default=(), metavar="W,W",
                        help="Also evaluate rankings by (1 - W) * similarity + W * reranker's score, both scaled to "
                             "0..1 within the candidates, as reranked_W/...")
    parser.add_argument("--candidates", type=positive_int, metavar="N",
                        help="Number of documents per query that the first of two stages finds (default: 100)")
    parser.add_argument("--head", choices=("joint",),
                        help="Of a model with joint heads (BGE-M3): rank by the sum of its scores, and by each of them "
                             "as dense/..., sparse/... and multi_vector/... (default: by the texts' own vectors)")
    parser.add_argument("--per-query", metavar="FILE.jsonl", type=path,
                        help="File to write with the metrics of every query of a folder, a row each")
    parser.add_argument("--require", action="append", type=requirement, default=[], metavar="METRIC:VALUE",
                        help="Exit with code 2 if this metric is below the value, after printing all of them; may be "
                             "given several times. Also 'METRIC>=VALUE', in quotes")
    add_given_vectors(parser, "the folder's corpus.jsonl")
    parser.add_argument("--documents-from", metavar="OLD", type=path,
                        help="Search with the model's queries over the documents of another model, its directory or "
                             "the vectors of corpus.jsonl that it gave: what an index that is kept would find")
    parser.add_argument("--map", metavar="MAP", type=path,
                        help="With --documents-from: map these vectors to the model's first (see migrate)")
    add_prompt_arguments(parser)
    add_encoding_arguments(parser)


def requirement(text: str) -> Requirement:
    """A lower bound such as ndcg@10:0.5."""
    try:
        return parse_requirement(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def dims(text: str) -> tuple[int, ...]:
    """Dimensions such as 64,256."""
    return comma_list(text, positive_int)


def precisions(text: str) -> tuple[Precision, ...]:
    """Precisions such as int8,binary."""
    known: dict[str, Precision] = {name: name for name in PRECISIONS}

    def precision(part: str) -> Precision:
        if part not in known:
            raise argparse.ArgumentTypeError(f"{text!r} must be some of {', '.join(known)}, with commas between them")
        return known[part]

    return comma_list(text, precision)


def weights(text: str) -> tuple[float, ...]:
    """Weights such as 0.25,0.5."""

    def weight(part: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(part) < 1:
                return float(part)
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers between 0 and 1 (1 is the reranker alone, which is "
                                         "always evaluated)")

    return comma_list(text, weight)


def run(args: argparse.Namespace) -> int:
    """Print the metrics from rank 0. The exit code is 2 on every rank if one is below a bound of --require."""
    stages = args.two_stage is not None or args.reranker is not None or "rescore" in args.precision
    if args.candidates is not None and not stages:
        raise ConfigError(f"--candidates {args.candidates}: only search in two stages has candidates; add --two-stage, "
                          "--precision rescore or --reranker", key="--candidates")
    check_vector_options(args)
    check_other_documents(args)
    if args.reranker_weight and args.reranker is None:
        raise ConfigError(f"--reranker-weight {','.join(map(str, args.reranker_weight))}: has no effect without "
                          "--reranker; add that, or leave it out", key="--reranker-weight")
    from megatron_embed.run.evaluate_command import evaluate

    metrics, rank = evaluate(args)
    if rank == 0:
        write_output(json.dumps(metrics))
    missed = missed_requirements(args.require, metrics)
    if missed and rank == 0:
        write_error(f"--require: {'; '.join(missed)}")
    return 2 if missed else 0


def check_other_documents(args: argparse.Namespace) -> None:
    """Raises ConfigError for options of another model's documents that do not go together."""
    if args.map is not None and args.documents_from is None:
        raise ConfigError(f"--map {args.map}: maps the vectors of --documents-from; add that, or leave it out",
                          key="--map")
    if args.documents_from is not None and args.vectors is not None:
        raise ConfigError(f"--documents-from {args.documents_from}: --vectors names the documents' vectors too; keep "
                          "one of them", key="--documents-from")
