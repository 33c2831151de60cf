"""The three kinds of evaluation that the `evaluate` command knows, from its options to metrics."""

import argparse
import dataclasses
import functools
import json
import os
from typing import TYPE_CHECKING, Literal, TextIO

from megatron_embed.errors import ConfigError, UserError
from megatron_embed.parallel.lost_rank import Start, monitored_ranks
from megatron_embed.platform.atomic_file import check_jsonl, write_atomic
from megatron_embed.run.required_metrics import check_metric_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from megatron_embed.evaluation.given_vectors import GivenVectors
    from megatron_embed.evaluation.rerank_stage import RerankStage
    from megatron_embed.evaluation.retrieval import Embed
    from megatron_embed.names import Role, Similarity
    from megatron_embed.parallel.topology import Topology


def evaluate(args: argparse.Namespace) -> tuple[dict[str, float], int]:
    """(metrics of the data that --data names, this rank). Called by all ranks.

    Args:
        args: the options of `evaluate`.
    """
    with monitored_ranks() as start:
        if not os.path.isfile(args.data):
            return evaluate_beir(args, start)
        if holds_pairs(args.data, args.columns):
            return evaluate_pairs(args, start)
        return evaluate_lists(args, start)


def holds_pairs(file: str, columns: dict[str, str]) -> bool:
    """Whether the first row of a file is a pair with a score. `columns`: see --columns."""
    from megatron_embed.config.data import TrainFile
    from megatron_embed.data.columns import COLUMNS_OPTION
    from megatron_embed.data.formats import RowReader
    from megatron_embed.data.records import Record
    from megatron_embed.data.row_source import open_rows

    rows = open_rows(file, "--data")
    reader = RowReader(TrainFile(path=file, columns=columns), None, holds_texts=rows.holds_texts,
                       columns_key=COLUMNS_OPTION)
    record = next((reader.read(*row) for row in rows.scan()), None)
    return isinstance(record, Record) and record.score is not None


def evaluate_beir(args: argparse.Namespace, start: Start) -> tuple[dict[str, float], int]:
    """(metrics of an embedding model on a BEIR folder, this rank)."""
    from megatron_embed.evaluation.beir import load_beir

    if args.columns:
        raise ConfigError(f"--columns: {args.data} is a BEIR folder, whose files have fixed columns; leave it out",
                          key="--columns")
    if args.per_query is not None:
        check_jsonl("--per-query", args.per_query)
    data = load_beir(args.data, args.split or "test", drop_own_id=args.drop_own_id)
    import torch.distributed as dist

    from megatron_embed.evaluation.block_retrieval import evaluate_by_blocks
    from megatron_embed.evaluation.given_vectors import open_given_vectors
    from megatron_embed.evaluation.retrieval import METRICS, Embed, Rankings, evaluate_queries, mean_metrics
    from megatron_embed.evaluation.stored_vectors import read_ranges
    from megatron_embed.loading.model_directory import open_encoder
    from megatron_embed.loading.prompts import given_prompts
    from megatron_embed.parallel.collectives import raise_on_all_ranks

    check_metric_names(args.require, [prefix + name for prefix in ranking_prefixes(args) for name in METRICS])
    encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given_prompts(args), start=start,
                                             multi_vector=may_be_multi_vector(args), option=dense_option(args))
    given = open_given_vectors(args, rows=len(data.document_ids), dim=encoder.dim, similarity=model.saved.similarity,
                               what=f"{args.data}/corpus.jsonl")
    encode: Embed = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    if args.documents_from is not None:
        encode, given = open_other_documents(args, encode, topology, dim=encoder.dim, rows=len(data.document_ids),
                                             similarity=model.saved.similarity)
    option = "--dims" if args.dims else "--two-stage" if args.two_stage else "--precision" if args.precision else None
    if given is not None and given.index is not None and option is not None:
        raise ConfigError(f"{option}: compares parts of vectors, and --index {given.kind} holds whole ones; leave it "
                          "out, or set --index flat", key=option)
    has_ranges = "int8" in args.precision and args.documents_from is None  # the model's are of its own documents
    rankings = Rankings(dims=args.dims, two_stage=args.two_stage, candidates=args.candidates or 100,
                        precisions=args.precision, ranges=read_ranges(model.root) if has_ranges else {})
    rankings.check(encoder.dim)
    if args.reranker is not None:
        rankings = dataclasses.replace(rankings, rerank=open_rerank_stage(args, data.query_texts, topology))
    if encoder.gives_several:
        per_query = evaluate_by_blocks(encoder, data, rerank=rankings.rerank, group=dist.group.WORLD,
                                       show_progress=topology.rank == 0)
    else:
        per_query = evaluate_queries(encode, data, similarity=model.saved.similarity, rankings=rankings,
                                     group=dist.group.WORLD, device=topology.device, given=given)
    if args.per_query is not None:
        raise_on_all_ranks(write_queries(args.per_query, per_query) if topology.rank == 0 else None)
    return mean_metrics(per_query), topology.rank


def dense_option(args: argparse.Namespace) -> str | None:
    """The first option that was given and needs one vector for each text."""
    options = ("dims", "two_stage", "vectors", "precision", "documents_from")
    return next((f"--{name.replace('_', '-')}" for name in options if vars(args)[name]), None)


def may_be_multi_vector(args: argparse.Namespace) -> bool | Literal["joint"]:
    """See `open_encoder`. Raises ConfigError for --head with options that need one vector for each text."""
    given = dense_option(args)
    if args.head is None:
        return given is None
    if given is not None:
        raise ConfigError(f"{given}: needs one vector for each text, and --head {args.head} compares more; leave one "
                          "of them out", key=given)
    return "joint"


def open_other_documents(args: argparse.Namespace, encode: "Embed", topology: "Topology", *, dim: int, rows: int,
                         similarity: "Similarity") -> "tuple[Embed, GivenVectors | None]":
    """(what embeds texts, the documents' vectors if they are stored) with the documents of --documents-from. Called by
    all ranks.

    Args:
        encode: embeds queries.
        dim, similarity: of the model.
        rows: documents.
    Raises:
        ConfigError: the documents' vectors are not those of the corpus, or not as wide as the model's.
    """
    from megatron_embed.evaluation.given_vectors import GivenVectors
    from megatron_embed.evaluation.vector_files import VectorFile, are_vectors
    from megatron_embed.evaluation.vector_map import MappedVectors, VectorMap
    from megatron_embed.loading.model_directory import open_encoder

    key, path = "--documents-from", args.documents_from
    vector_map = None if args.map is None else VectorMap.read(args.map, "--map")
    if are_vectors(path):
        vectors = (VectorFile(path, key, similarity=similarity) if vector_map is None else
                   MappedVectors(path, key, vector_map, similarity=similarity))
        if len(vectors) != rows:
            raise ConfigError(f"{key} {path}: {len(vectors)} vectors for the {rows} rows of {args.data}/corpus.jsonl; "
                              "name what `encode` wrote of that file", key=key)
        check_width(args, vectors.full_width, dim)
        return encode, GivenVectors(vectors=vectors, kind="flat", index=None)
    settings = {**vars(args), "model": path, "pooling": None, "max_length": None}
    prompts: dict[Role, str] = {} if args.document_prompt is None else {"document": args.document_prompt}
    other, _, _ = open_encoder(argparse.Namespace(**settings), prompts=True, given_prompts=prompts, key=key,
                               start=lambda parallel: topology)
    if vector_map is not None and vector_map.old_dim != other.dim:
        raise ConfigError(f"--map {args.map}: takes vectors of {vector_map.old_dim} components, and those of {path} "
                          f"have {other.dim}; name the map that was fitted to them", key="--map")
    check_width(args, other.dim if vector_map is None else vector_map.new_dim, dim)

    def embed(texts: "Sequence[str]", role: "Role") -> "Tensor":
        if role == "query":
            return encode(texts, role)
        vectors = other.encode(texts, role, show_progress=topology.rank == 0)
        return vectors if vector_map is None else vector_map(vectors)

    return embed, None


def check_width(args: argparse.Namespace, width: int, dim: int) -> None:
    """Raises ConfigError if documents' vectors of this width cannot be compared with the model's of `dim`."""
    if width != dim:
        raise ConfigError(f"--documents-from {args.documents_from}: vectors of {width} components, and those of "
                          f"{args.model} have {dim}; give the --map that `megatron-embed migrate` fits",
                          key="--documents-from")


def ranking_prefixes(args: argparse.Namespace) -> list[str]:
    """Prefixes of the metrics' names, one for each ranking of a BEIR folder that the options ask for."""
    from megatron_embed.evaluation.joint_search import PREFIXES
    from megatron_embed.evaluation.stored_vectors import precision_prefixes

    prefixes = [*(PREFIXES if args.head == "joint" else [""]), *(f"dim_{width}/" for width in args.dims)]
    prefixes += [prefix for prefix, *_ in precision_prefixes(args.dims, args.precision)]
    if args.two_stage is not None:
        prefixes.append(f"two_stage_{args.two_stage}/")
    if args.reranker is not None:
        prefixes += ["reranked/", *(f"reranked_{weight:g}/" for weight in args.reranker_weight)]
    return prefixes


def write_queries(output: str, per_query: "Mapping[str, Mapping[str, float]]") -> UserError | None:
    """Write a row `{"query": id, metric: value, ...}` per query, all or none; the error if they cannot be written."""
    def write(file: TextIO) -> None:
        for query, metrics in per_query.items():
            file.write(json.dumps({"query": query, **metrics}, ensure_ascii=False) + "\n")

    return write_atomic("--per-query", output, write)


def open_rerank_stage(args: argparse.Namespace, queries: "Sequence[str]", topology: "Topology") -> "RerankStage":
    """The model of --reranker, once it is known to have room for every query.

    It ranks by the scores before the activation, since probabilities may tie.
    """
    from megatron_embed.data.pair_tokenizer import Pair
    from megatron_embed.evaluation.rerank_stage import RerankStage
    from megatron_embed.loading.reranker import open_scorer

    scorer, _, _ = open_scorer(args.reranker, key="--reranker", dtype=args.dtype, overrides=args.overrides,
                               topology=topology)
    scorer.tokenizer.check_query_length([Pair(query=query, document="...") for query in queries])

    def score(pairs: "Sequence[tuple[str, str]]") -> "Tensor":
        return scorer.raw_scores([Pair(query=query, document=document) for query, document in pairs],
                                 show_progress=topology.rank == 0)

    return RerankStage(score=score, candidates=args.candidates or 100, weights=args.reranker_weight)


def evaluate_pairs(args: argparse.Namespace, start: Start) -> tuple[dict[str, float], int]:
    """(correlations of an embedding model's similarities with the scores of a file of pairs, this rank)."""
    refuse_options(args, "pairs", "head", "split", "drop_own_id", "two_stage", "precision", "reranker", "per_query",
                   "vectors", "index", "probes", "ef_search", "documents_from", "map")
    from megatron_embed.evaluation.sts import load_sts

    data = load_sts(args.data, "--data", args.columns)
    from megatron_embed.evaluation.sts import METRICS, evaluate_sts
    from megatron_embed.loading.model_directory import open_encoder
    from megatron_embed.loading.prompts import given_prompts

    prefixes = ["", *(f"dim_{width}/" for width in args.dims)]
    check_metric_names(args.require, [prefix + name for prefix in prefixes for name in METRICS])
    encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given_prompts(args), start=start)
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    return evaluate_sts(encode, data, similarity=model.saved.similarity, dims=args.dims), topology.rank


def evaluate_lists(args: argparse.Namespace, start: Start) -> tuple[dict[str, float], int]:
    """(metrics of a reranker, or of an embedding model's similarities, on a file of lists, this rank)."""
    refuse_options(args, "lists", "split", "drop_own_id", "two_stage", "dims", "precision", "reranker", "per_query",
                   "vectors", "index", "probes", "ef_search", "documents_from", "map")
    from megatron_embed.evaluation.document_search import scores_of_lists
    from megatron_embed.evaluation.reranking import METRICS, evaluate_reranking, load_rerank_file, similarity_of_pairs

    data = load_rerank_file(args.data, columns=args.columns)
    check_metric_names(args.require, METRICS)
    from megatron_embed.loading.model_directory import find_model, open_encoder
    from megatron_embed.loading.prompts import given_prompts, refuse_prompts
    from megatron_embed.loading.reranker import is_reranker, open_scorer

    if is_reranker(find_model(args.model, "--model")):
        if args.head is not None:
            raise ConfigError(f"--head {args.head}: {args.model} is a reranker, which has no vectors; leave it out",
                              key="--head")
        refuse_prompts(args, f"{args.model} is a reranker, which reads query and document in its own template")
        scorer, _, topology = open_scorer(args.model, max_length=args.max_length, dtype=args.dtype,
                                          overrides=args.overrides, start=start)
        score = functools.partial(scorer.raw_scores, show_progress=topology.rank == 0)
        return evaluate_reranking(score, data), topology.rank
    encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given_prompts(args), start=start,
                                            multi_vector=True if args.head is None else "joint")
    encode = functools.partial(encoder.encode, show_progress=topology.rank == 0)
    score = functools.partial(similarity_of_pairs, encode, similarity=model.saved.similarity)
    if encoder.gives_several:
        return evaluate_reranking(functools.partial(scores_of_lists, encoder), data), topology.rank
    return evaluate_reranking(score, data), topology.rank


def refuse_options(args: argparse.Namespace, kind: str, *options: str) -> None:
    """Raises ConfigError for an option that was given and has no effect on a file of this kind."""
    for name in options:
        value = vars(args)[name]
        if value:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            given = f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}")
            raise ConfigError(f"{given}: has no effect on a file of {kind}; leave it out, or name a BEIR folder as "
                              "--data", key=f"--{name.replace('_', '-')}")
