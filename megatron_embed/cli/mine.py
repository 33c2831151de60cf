"""`mine --model DIR|bm25 --data TRAIN.jsonl [--corpus FILE] --output OUT.jsonl`"""

import argparse

from megatron_embed.cli.columns import add_columns_argument
from megatron_embed.cli.common import (
    add_encoding_arguments,
    add_given_vectors,
    check_vector_options,
    path,
    positive_int,
)
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError
from megatron_embed.platform.atomic_file import check_jsonl
from megatron_embed.platform.launcher import process_rank

HELP = "Mine hard negatives for training rows, with an embedding model or BM25"
EXAMPLES = ("megatron-embed mine --model bm25 --data train.jsonl --output mined.jsonl",
            "megatron-embed mine --model runs/a/best --data train.jsonl --output mined.jsonl --relative-margin 0.05")
PAGE = "docs/mining.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR|bm25", type=path,
                        help="Hugging Face or Sentence Transformers directory, a checkpoint of megatron-embed, or bm25")
    parser.add_argument("--data", required=True, metavar="TRAIN.jsonl", type=path,
                        help="Rows with query and positive; their negatives are replaced")
    add_columns_argument(parser, "of --data")
    parser.add_argument("--corpus", metavar="FILE.jsonl", type=path,
                        help='Documents to search, rows {"text": ..., "title"?: ..., "_id"?: ...} (default: the '
                             "documents of --data)")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", type=path,
                        help="File to write: the rows with their negatives")
    parser.add_argument("--reranker", metavar="DIR", type=path,
                        help="Rerank the candidates with this model; its scores decide order, bounds and margins, and "
                             "are written")
    parser.add_argument("--num-negatives", type=int, default=3, metavar="N",
                        help="Number of hard negatives per query (default: 3)")
    parser.add_argument("--range-min", type=int, default=0, metavar="N",
                        help="Number of best candidates to skip, not counting positives (default: 0)")
    parser.add_argument("--range-max", type=int, metavar="N",
                        help="Number of candidates to consider (default: range-min + num-negatives + most positives of "
                             "a query, with 10 * num-negatives if --max-score, a margin or --reranker is set)")
    for name, what in (("--max-score", "Skip candidates scored above S"),
                       ("--min-score", "Skip candidates scored below S"),
                       ("--absolute-margin", "Skip candidates scored above (lowest positive - M)"),
                       ("--relative-margin", "Skip candidates scored above (lowest positive - |lowest positive| * M)")):
        parser.add_argument(name, type=float, metavar="S" if "score" in name else "M", help=what)
    parser.add_argument("--drop-incomplete", nargs="?", type=positive_int, const=0, metavar="N",
                        help="Leave out rows with fewer than N negatives (without N: fewer than --num-negatives)")
    parser.add_argument("--show", nargs="?", type=positive_int, const=10, default=0, metavar="N",
                        help="Also print N rows, spread over the file, with their negatives and scores (without N: 10)")
    parser.add_argument("--mine-query-text", action="store_true",
                        help="Allow documents with the same text as the query as negatives (default: skip them)")
    parser.add_argument("--sampling", choices=("top", "random"), default="top",
                        help="Take the best remaining candidates, or sample from them at random (default: top)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="Seed of --sampling random (default: 1234)")
    add_prompt_arguments(parser, "{instruction} stands for the row's instruction; ")
    parser.add_argument("--cache", metavar="DIR", type=path,
                        help="Directory that keeps the vectors for later runs with the same texts, prompts and weights")
    add_given_vectors(parser, "--corpus")
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write a row with negatives for every row; nothing half-written is left behind."""
    from megatron_embed.config.data import TrainFile
    from megatron_embed.data.columns import COLUMNS_OPTION
    from megatron_embed.data.dataset import RecordFile
    from megatron_embed.mining.documents import CorpusFile
    from megatron_embed.mining.filters import MiningOptions
    from megatron_embed.mining.mine import MiningJob, mine, query_prompts
    from megatron_embed.mining.task import build_task

    options = MiningOptions(
        num_negatives=args.num_negatives, range_min=args.range_min, range_max=args.range_max, max_score=args.max_score,
        min_score=args.min_score, absolute_margin=args.absolute_margin, relative_margin=args.relative_margin,
        sampling=args.sampling, seed=args.seed, reranked=args.reranker is not None)
    check_jsonl("--output", args.output)
    check_vector_options(args)
    if args.vectors is not None and args.corpus is None:
        raise ConfigError(f"--vectors {args.vectors}: are those of the documents of --corpus; name that file too",
                          key="--vectors")
    if args.model == "bm25":
        refuse_vector_options(args)
        if process_rank() != 0 and args.reranker is None:  # One process runs BM25; the others have nothing to do.
            return 0
    records = list(RecordFile(TrainFile(path=args.data, columns=args.columns), key="--data",
                              columns_key=COLUMNS_OPTION))
    corpus = None if args.corpus is None else CorpusFile(args.corpus)
    task = build_task(records, query_prompts(args, records), corpus, mine_query_text=args.mine_query_text)
    least = options.num_negatives if args.drop_incomplete == 0 else args.drop_incomplete or 0
    mine(args, MiningJob(records=records, task=task, options=options, output=args.output, least_negatives=least,
                         show=args.show))
    return 0


def refuse_vector_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that BM25 would ignore."""
    given = {"--pooling": args.pooling, "--max-length": args.max_length, "--query-prompt": args.query_prompt,
             "--document-prompt": args.document_prompt, "--cache": args.cache, "--vectors": args.vectors,
             "--no-normalize": args.no_normalize or None}
    if args.reranker is None:
        given |= {"--dtype": args.dtype, "parallel.*": args.overrides or None}
    for key, value in given.items():
        if value is not None:
            raise ConfigError(f"{key}: has no effect with BM25; leave it out", key=key)
