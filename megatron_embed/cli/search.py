"""`search --vectors FILE.npy --texts FILE.jsonl --model DIR --query TEXT`"""

import argparse

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path, positive_int
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.names import INDEXES

HELP = "Search an encoded corpus with FAISS: exact, or approximate with IVF or HNSW"
EXAMPLES = ("megatron-embed search --model runs/a/best --vectors vectors.npy --texts texts.jsonl --query 'solar power'",
            "megatron-embed search --model runs/a/best --vectors vectors.npy --texts texts.jsonl --queries - "
            "--index hnsw --format jsonl < queries.txt")
PAGE = "docs/search.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--vectors", required=True, metavar="FILE.npy|DIR", type=path,
                        help="Vectors of the texts, as `encode --role document` writes them")
    parser.add_argument("--texts", required=True, metavar="FILE.jsonl", type=path,
                        help='The texts, rows {"text": ..., "title"?: ..., "_id"?: ...}: the file given to encode')
    parser.add_argument("--query", action="append", default=[], metavar="TEXT",
                        help="A query; may be given several times")
    parser.add_argument("--queries", metavar="FILE|-", type=path,
                        help='Queries, one a line; of a .jsonl file rows {"text": ...} or {"query": ...}; - reads '
                             "stdin")
    parser.add_argument("--top-k", type=positive_int, default=10, metavar="N",
                        help="Number of texts to print for a query (default: 10)")
    parser.add_argument("--dim", type=positive_int, metavar="N",
                        help="Compare the first N components of the vectors (Matryoshka; default: all)")
    parser.add_argument("--similarity", choices=("cosine", "dot"),
                        help="What compares vectors (default: what the model directory says)")
    parser.add_argument("--index", choices=INDEXES, default="flat",
                        help="flat: exact; ivf, hnsw: approximate, kept beside the vectors and reused (default: flat)")
    parser.add_argument("--probes", type=positive_int, metavar="N",
                        help="With --index ivf: lists that a query looks into (default: a sixteenth of them, at least "
                             "16)")
    for name, what in (("--links", "neighbours of a vector in the graph (default: 32)"),
                       ("--ef-construction", "candidates while a vector is added (default: 200)"),
                       ("--ef-search", "candidates while a query is answered, at least --top-k (default: 128)")):
        parser.add_argument(name, type=positive_int, metavar="N", help=f"With --index hnsw: {what}")
    parser.add_argument("--no-recall", action="store_true",
                        help="With --index ivf or hnsw: leave out the exact search that its recall is measured with")
    parser.add_argument("--format", choices=("table", "jsonl"), default="table",
                        help="jsonl: one object per query, with its hits (default: table)")
    add_prompt_arguments(parser)
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the best texts of every query."""
    from megatron_embed.run.search_command import search

    search(args)
    return 0
