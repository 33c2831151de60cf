"""`evaluate --model DIR --data BEIR_DIR|FILE.jsonl`"""

import argparse
import functools
import json
import os
from typing import TYPE_CHECKING, TextIO

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path, positive_int, write_output
from megatron_embed.cli.prompts import add_prompt_arguments, given_prompts, refuse_prompts
from megatron_embed.errors import ConfigError, UserError
from megatron_embed.parallel.lost_rank import Start, monitored_ranks
from megatron_embed.platform.atomic_file import check_jsonl, write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from megatron_embed.evaluation.second_stage import SecondStage
    from megatron_embed.parallel.topology import Topology

HELP = "metrics of retrieval, of pairs with scores, or of ranked lists, as one JSON object in the last line of stdout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--data", required=True, metavar="BEIR_DIR|FILE.jsonl", type=path,
                        help="folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, or a file of pairs "
                             '{"text_a", "text_b", "score"}, for an embedding model; or a file of lists {"query", '
                             '"documents": [...], "labels": [...]}, for a reranker as well')
    parser.add_argument("--split", help="which qrels file of a folder; default: test")
    parser.add_argument("--drop-own-id", action="store_true",
                        help="leave the document with the query's own id out of its rankings, as BEIR and MTEB do for "
                             "ArguAna and Quora")
    parser.add_argument("--dims", type=dims, default=(), metavar="N,N",
                        help="measure vectors cut to these widths as well, as dim_N/...")
    parser.add_argument("--two-stage", type=positive_int, metavar="N",
                        help="measure search by vectors of this width whose best candidates are ordered by full ones "
                             "as well, as two_stage_N/...")
    parser.add_argument("--reranker", metavar="DIR", type=path,
                        help="measure search whose best candidates this reranker orders as well, as reranked/...")
    parser.add_argument("--reranker-weight", type=weights, default=(), metavar="W,W",
                        help="measure orders by (1 - W) * similarity + W * reranker's score as well, both scaled to "
                             "0..1 within the candidates, as reranked_W/...")
    parser.add_argument("--candidates", type=positive_int, metavar="N",
                        help="documents per query that the first of two stages finds; default: 100")
    parser.add_argument("--per-query", metavar="FILE.jsonl", type=path,
                        help="write the metrics of every query of a folder as well, a row each")
    add_prompt_arguments(parser)
    add_encoding_arguments(parser)


def dims(text: str) -> tuple[int, ...]:
    """Widths such as 64,256."""
    return tuple(positive_int(part.strip()) for part in text.split(","))


def weights(text: str) -> tuple[float, ...]:
    """Weights such as 0.25,0.5."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < weight < 1 for weight in found):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers between 0 and 1 (1 is the reranker alone, which is "
                                         "measured anyway)")
    return found


def run(args: argparse.Namespace) -> int:
    """Print the metrics from rank 0."""
    if args.candidates is not None and args.two_stage is None and args.reranker is None:
        raise ConfigError(f"--candidates {args.candidates}: only search in two stages has candidates; add --two-stage "
                          "or --reranker")
    if args.reranker_weight and args.reranker is None:
        raise ConfigError(f"--reranker-weight {','.join(map(str, args.reranker_weight))}: there is no reranker; add "
                          "--reranker")
    with monitored_ranks() as start:
        if not os.path.isfile(args.data):
            metrics, rank = evaluate_beir(args, start)
        elif holds_pairs(args.data):
            metrics, rank = evaluate_pairs(args, start)
        else:
            metrics, rank = evaluate_lists(args, start)
    if rank == 0:
        write_output(json.dumps(metrics))
    return 0


def holds_pairs(file: str) -> bool:
    """Whether the first row of a JSONL file is a pair."""
    from megatron_embed.data.jsonl import parse_object, read_lines

    if not file.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        return False
    first = next(read_lines(file, "--data"), None)
    return first is not None and "text_a" in parse_object(first.raw, f"{file}:{first.number}")


def evaluate_beir(args: argparse.Namespace, start: Start) -> tuple[dict[str, float], int]:
    """(metrics of an embedding model on a BEIR folder, this rank)."""
    from megatron_embed.evaluation.beir import load_beir

    if args.per_query is not None:
        check_jsonl("--per-query", args.per_query)
    data = load_beir(args.data, args.split or "test", drop_own_id=args.drop_own_id)
    import torch.distributed as dist

    from megatron_embed.evaluation.retrieval import Widths, evaluate_queries, mean_metrics
    from megatron_embed.loading.model_directory import open_encoder
    from megatron_embed.parallel.collectives import raise_on_all_ranks

    encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given_prompts(args), start=start)
    widths = Widths(dims=args.dims, two_stage=args.two_stage, candidates=args.candidates or 100)
    widths.check(encoder.dim)
    second_stage = None if args.reranker is None else open_second_stage(args, data.query_texts, topology)
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    per_query = evaluate_queries(encode, data, similarity=model.saved.similarity, widths=widths,
                                 second_stage=second_stage, group=dist.group.WORLD, device=topology.device)
    if args.per_query is not None:
        raise_on_all_ranks(write_queries(args.per_query, per_query) if topology.rank == 0 else None)
    return mean_metrics(per_query), topology.rank


def write_queries(output: str, per_query: "Mapping[str, Mapping[str, float]]") -> UserError | None:
    """Writes a row `{"query": id, metric: value, ...}` for each query, all or none; gives the error if it cannot."""
    def write(file: TextIO) -> None:
        for query, metrics in per_query.items():
            file.write(json.dumps({"query": query, **metrics}, ensure_ascii=False) + "\n")

    return write_atomic("--per-query", output, write)


def open_second_stage(args: argparse.Namespace, queries: "Sequence[str]", topology: "Topology") -> "SecondStage":
    """The reranker, once it is known to have room for every query; its own scores, since probabilities may tie."""
    from megatron_embed.data.pair_tokenizer import Pair
    from megatron_embed.evaluation.second_stage import SecondStage
    from megatron_embed.loading.reranker import open_scorer

    scorer, _, _ = open_scorer(args.reranker, key="--reranker", dtype=args.dtype, overrides=args.overrides,
                               topology=topology)
    scorer.tokenizer.check_room([Pair(query=query, document="...") for query in queries])

    def score(pairs: "Sequence[tuple[str, str]]") -> "Tensor":
        return scorer.raw_scores([Pair(query=query, document=document) for query, document in pairs],
                                 show_progress=topology.rank == 0)

    return SecondStage(score=score, candidates=args.candidates or 100, weights=args.reranker_weight)


def evaluate_pairs(args: argparse.Namespace, start: Start) -> tuple[dict[str, float], int]:
    """(correlations of an embedding model's similarities with the scores of a file of pairs, this rank)."""
    refuse(args, "pairs", "split", "drop_own_id", "two_stage", "reranker", "per_query")
    from megatron_embed.evaluation.sts import load_sts

    data = load_sts(args.data, "--data")
    from megatron_embed.evaluation.sts import evaluate_sts
    from megatron_embed.loading.model_directory import open_encoder

    encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given_prompts(args), start=start)
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    return evaluate_sts(encode, data, similarity=model.saved.similarity, dims=args.dims), topology.rank


def evaluate_lists(args: argparse.Namespace, start: Start) -> tuple[dict[str, float], int]:
    """(metrics of a reranker, or of an embedding model's similarities, on a file of lists, this rank)."""
    refuse(args, "lists", "split", "drop_own_id", "two_stage", "dims", "reranker", "per_query")
    from megatron_embed.evaluation.reranking import evaluate_reranking, load_rerank_file, similarity_of_pairs

    data = load_rerank_file(args.data)
    from megatron_embed.loading.model_directory import find_model, open_encoder
    from megatron_embed.loading.reranker import is_reranker, open_scorer

    if is_reranker(find_model(args.model, "--model")):
        refuse_prompts(args, f"{args.model} is a reranker, which reads query and document in its own template")
        scorer, _, topology = open_scorer(args.model, max_length=args.max_length, dtype=args.dtype,
                                          overrides=args.overrides, start=start)
        score = functools.partial(scorer.raw_scores, show_progress=topology.rank == 0)
        return evaluate_reranking(score, data), topology.rank
    encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given_prompts(args), start=start)
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    score = functools.partial(similarity_of_pairs, encode, similarity=model.saved.similarity)
    return evaluate_reranking(score, data), topology.rank


def refuse(args: argparse.Namespace, kind: str, *options: str) -> None:
    """Raises ConfigError for an option that was given and that a file of this kind has no use for."""
    for name in options:
        value = vars(args)[name]
        if value:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            given = f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}")
            raise ConfigError(f"{given}: a file of {kind} has no use for it; leave it out, or name a BEIR folder as "
                              "--data")
