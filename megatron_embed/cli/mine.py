"""`mine --model DIR|bm25 --data TRAIN.jsonl [--corpus FILE] --output OUT.jsonl`"""

import argparse
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_embed.cli.common import add_encoding_arguments, path
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError, DataError, EmptyTextError, UserError
from megatron_embed.names import NEGATIVE_SAMPLINGS
from megatron_embed.parallel.lost_rank import Start, monitored_ranks
from megatron_embed.platform.atomic_file import check_jsonl, write_atomic
from megatron_embed.platform.launcher import process_rank

if TYPE_CHECKING:
    from megatron_embed.data.dataset import Record
    from megatron_embed.evaluation.encode import TextEncoder
    from megatron_embed.evaluation.score import PairScorer
    from megatron_embed.loading.model_directory import ModelDirectory
    from megatron_embed.mining.cache import VectorSource
    from megatron_embed.mining.filters import MiningOptions
    from megatron_embed.mining.task import Mined, MiningTask
    from megatron_embed.names import Role
    from megatron_embed.parallel.topology import Topology

logger = logging.getLogger(__name__)

HELP = "hard negatives for training rows, by a model's vectors or by BM25"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR|bm25", type=path,
                        help="Hugging Face or Sentence Transformers directory, one of our checkpoints, or bm25")
    parser.add_argument("--data", required=True, metavar="TRAIN.jsonl", type=path,
                        help="rows with query and positive; negatives that they have are replaced")
    parser.add_argument("--corpus", metavar="FILE.jsonl", type=path,
                        help='documents to search, rows {"text": ..., "title"?: ..., "_id"?: ...}; default: those of '
                             "--data")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", type=path, help="the rows with their negatives")
    parser.add_argument("--reranker", metavar="DIR", type=path,
                        help="judge the candidates with this reranker: order, bounds, margins and written scores are "
                             "by its scores")
    parser.add_argument("--num-negatives", type=int, default=3, metavar="N", help="of each query; default: 3")
    parser.add_argument("--range-min", type=int, default=0, metavar="N",
                        help="best candidates to skip, positives not counted; default: 0")
    parser.add_argument("--range-max", type=int, metavar="N",
                        help="candidates to look at; default: range-min + num-negatives + most positives of a query, "
                             "with 10 * num-negatives if --max-score, a margin or --reranker is set")
    for name, what in (("--max-score", "leave out candidates with a higher score"),
                       ("--min-score", "leave out candidates with a lower score"),
                       ("--absolute-margin", "leave out candidates above the lowest positive's score - M"),
                       ("--relative-margin", "leave out candidates above score - |score| * M of the lowest positive")):
        parser.add_argument(name, type=float, metavar="S" if "score" in name else "M", help=what)
    parser.add_argument("--mine-query-text", action="store_true",
                        help="let a document whose text is the query's be its negative; default: such a document is "
                             "left out")
    parser.add_argument("--sampling", choices=NEGATIVE_SAMPLINGS, default="top",
                        help="the best candidates that are left, or any of them; default: top")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="for --sampling random; default: 1234")
    add_prompt_arguments(parser, "{instruction} in it is the row's; ")
    parser.add_argument("--cache", metavar="DIR", type=path,
                        help="keep vectors here, for the same texts, prompts and weights another time")
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write a row with negatives for every row; nothing half-written is left behind."""
    from megatron_embed.data.dataset import RecordFile
    from megatron_embed.mining.filters import MiningOptions
    from megatron_embed.mining.task import build_task, read_corpus

    options = MiningOptions(
        num_negatives=args.num_negatives, range_min=args.range_min, range_max=args.range_max, max_score=args.max_score,
        min_score=args.min_score, absolute_margin=args.absolute_margin, relative_margin=args.relative_margin,
        sampling=args.sampling, seed=args.seed, judged=args.reranker is not None)
    check_jsonl("--output", args.output)
    by_words = args.model == "bm25"
    if by_words:
        refuse_vector_options(args)
        if process_rank() != 0 and not options.judged:  # One process counts words; the others have nothing to do.
            return 0
    records = list(RecordFile(args.data, key="--data"))
    corpus = None if args.corpus is None else read_corpus(args.corpus)
    prompts = [""] * len(records) if by_words else query_prompts(args, records)
    task = build_task(records, prompts, corpus, mine_query_text=args.mine_query_text)
    with monitored_ranks() as start:
        if by_words:
            mine_by_words(args, records, task, options, start)
        else:
            mine_with_model(args, records, task, options, start)
    return 0


def refuse_vector_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that BM25 would ignore."""
    given = {"--pooling": args.pooling, "--max-length": args.max_length, "--query-prompt": args.query_prompt,
             "--document-prompt": args.document_prompt, "--cache": args.cache,
             "--no-normalize": args.no_normalize or None}
    if args.reranker is None:
        given |= {"--dtype": args.dtype, "parallel.*": args.overrides or None}
    for key, value in given.items():
        if value is not None:
            raise ConfigError(f"{key}: BM25 compares words and has no use for it; leave it out")


def query_prompts(args: argparse.Namespace, records: "Sequence[Record]") -> list[str]:
    """Each row's prompt: --query-prompt, else the directory's, with the row's instruction in its place."""
    from megatron_embed.loading.model_directory import find_model

    prompt = args.query_prompt
    if prompt is None:
        prompt = find_model(args.model, "--model").saved.prompts.get("query", "")
    if "{instruction}" not in prompt:
        return [prompt] * len(records)
    for record in records:
        if record.instruction is None:
            raise DataError(f"{record.source}: the query prompt {prompt!r} needs an instruction and the row has none; "
                            "give it one, or write the prompt out with --query-prompt")
    return [prompt.replace("{instruction}", record.instruction or "") for record in records]


def mine_by_words(args: argparse.Namespace, records: "Sequence[Record]", task: "MiningTask",
                  options: "MiningOptions", start: Start) -> None:
    """Ranks by BM25 and writes, in one process; on all ranks together where a reranker judges."""
    from megatron_embed.mining.bm25 import mine_bm25

    if not options.judged:
        mined = mine_bm25(task, options, show_progress=True)
        error = write_rows_whole(args.output, records, task, mined, options)
        if error is not None:
            raise error
        return
    from megatron_embed.parallel.collectives import raise_on_all_ranks

    scorer, topology = open_judge(args, records, task, start)
    mined = judged(scorer, mine_bm25(task, options, show_progress=topology.rank == 0), records, task, options)
    raise_on_all_ranks(write_rows_whole(args.output, records, task, mined, options) if topology.rank == 0 else None)


def open_judge(args: argparse.Namespace, records: "Sequence[Record]", task: "MiningTask",
               start: Start, topology: "Topology | None" = None) -> "tuple[PairScorer, Topology]":
    """The reranker, on all ranks, once it is known to have room for every query."""
    from megatron_embed.loading.reranker import open_scorer
    from megatron_embed.mining.judge import pair_of

    scorer, _, topology = open_scorer(args.reranker, key="--reranker", dtype=args.dtype, overrides=args.overrides,
                                      topology=topology, start=start)
    scorer.tokenizer.check_room([pair_of(task, records, query, task.positives[query][0])
                                 for query in range(len(task.queries))])
    return scorer, topology


def judged(scorer: "PairScorer", found: "Sequence[Mined]", records: "Sequence[Record]", task: "MiningTask",
           options: "MiningOptions") -> "list[Mined]":
    """The candidates by the reranker's scores. Called by all ranks."""
    from megatron_embed.mining.judge import judge

    return judge(found, task, records, scorer.score, options, show_progress=scorer.topology.rank == 0)


def mine_with_model(args: argparse.Namespace, records: "Sequence[Record]", task: "MiningTask",
                    options: "MiningOptions", start: Start) -> None:
    """Embeds, searches and writes, on all ranks together."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import normalize

    from megatron_embed.loading.model_directory import open_encoder
    from megatron_embed.mining.dense import mine_vectors
    from megatron_embed.parallel.collectives import raise_on_all_ranks

    # Queries carry their prompts already.
    given: dict[Role, str] = {"query": ""}
    if args.document_prompt is not None:
        given["document"] = args.document_prompt
    encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given, start=start)
    scorer = open_judge(args, records, task, start, topology)[0] if options.judged else None
    source = vector_source(args, encoder, model)
    scale = functools.partial(normalize, dim=-1) if model.saved.similarity == "cosine" else torch.clone
    role: Role = "query"
    try:
        queries = scale(torch.cat(list(source.blocks(role, task.queries)))).to(topology.device)
        role = "document"
        documents = (scale(block) for block in source.blocks(role, task.documents))
        mined = mine_vectors(queries, documents, task.positives, options, excluded=task.excluded,
                             group=dist.group.WORLD, num_documents=len(task.documents),
                             show_progress=topology.rank == 0)
    except EmptyTextError as error:
        place = place_of(role, error.row, records, task, args.corpus)
        raise EmptyTextError(error.row, place, error.text) from None
    if scorer is not None:
        assert mined is not None, "all ranks have the candidates"
        mined = judged(scorer, mined, records, task, options)
    own = None if topology.rank else mined
    raise_on_all_ranks(None if own is None else write_rows_whole(args.output, records, task, own, options))


def vector_source(args: argparse.Namespace, encoder: "TextEncoder", model: "ModelDirectory") -> "VectorSource":
    """The encoder, behind the cache if one was named. Called by all ranks."""
    from megatron_embed import __version__
    from megatron_embed.mining.cache import VectorCache, VectorSource, model_digest
    from megatron_embed.parallel.collectives import broadcast_from_rank0

    if args.cache is None:
        return VectorSource(encoder, None, "", {})
    rank = encoder.topology.rank
    cache = VectorCache(args.cache, rank=rank)
    digest = broadcast_from_rank0(model_digest(model.read_from) if rank == 0 else "")
    # What was not given is what the directories say, and the digest is of all that they say.
    # What `auto` is depends on the machine.
    dtype = str(next(encoder.chunks[0].parameters()).dtype) if args.dtype == "auto" else args.dtype
    settings = {"version": __version__, "pooling": encoder.pooling, "causal": encoder.causal,
                "max_length": args.max_length, "dtype": dtype, "normalize": not args.no_normalize}
    return VectorSource(encoder, cache, digest, settings)


def place_of(role: "Role", number: int, records: "Sequence[Record]", task: "MiningTask", corpus: str | None) -> str:
    """FILE:LINE of the first row that has this query or document, else the corpus and the document's number there."""
    for row, record in enumerate(records):
        if role == "query" and task.query_of_row[row] == number:
            return record.source
        if role == "document" and task.documents[number] in (*record.positive, *record.negatives):
            return record.source
    return f"{corpus}: document {number + 1}"


def write_rows_whole(output: str, records: "Sequence[Record]", task: "MiningTask", mined: "Sequence[Mined]",
                     options: "MiningOptions") -> UserError | None:
    """Writes the file, whole or not at all, and says what it holds; gives the error if it cannot."""
    from megatron_embed.mining.task import write_rows

    counts = [len(mined[query].negatives) for query in task.query_of_row]
    if not any(counts):
        return ConfigError(f"--output {output}: no candidate of any row passes the filters; loosen the score bounds "
                           "and margins, lower --range-min, or give a larger --corpus")
    error = write_atomic("--output", output, lambda file: write_rows(file, records, task, mined))
    if error is not None:
        return error
    logger.info("%s: %d rows, %d negatives from %d documents; %d rows have fewer than %d, %d of them none", output,
                len(records), sum(counts), len(task.documents), sum(count < options.num_negatives for count in counts),
                options.num_negatives, counts.count(0))
    return None
