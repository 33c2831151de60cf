"""Mining from opened files and models to the written rows."""

import argparse
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from megatron_embed import __version__
from megatron_embed.data.records import Record
from megatron_embed.errors import ConfigError, DataError, EmptyTextError, UserError
from megatron_embed.mining.filters import MiningOptions
from megatron_embed.mining.report import report, samples
from megatron_embed.mining.task import Mined, MinedRows, MiningTask, write_rows
from megatron_embed.names import Role
from megatron_embed.parallel.lost_rank import Start, monitored_ranks
from megatron_embed.platform.atomic_file import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_embed.evaluation.encode import TextEncoder
    from megatron_embed.evaluation.given_vectors import GivenVectors
    from megatron_embed.evaluation.score import PairScorer
    from megatron_embed.evaluation.vector_cache import VectorSource
    from megatron_embed.loading.model_directory import ModelDirectory
    from megatron_embed.parallel.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MiningJob:
    """The rows of a file, the documents that are searched for them, and the file that gets the result."""

    records: Sequence[Record]
    task: MiningTask
    options: MiningOptions
    output: str
    least_negatives: int = 0
    """Rows with fewer negatives are left out."""
    show: int = 0
    """Rows to log as samples, spread over the file."""

    def mine_with_bm25(self, scorer: "PairScorer | None") -> None:
        """Rank by BM25 and write. Called by one process, or by all ranks if there is a reranker."""
        from megatron_embed.mining.bm25 import mine_bm25

        if scorer is None:
            error = self._write(mine_bm25(self.task, self.options, show_progress=True))
            if error is not None:
                raise error
            return
        from megatron_embed.parallel.collectives import raise_on_all_ranks

        is_first = scorer.topology.rank == 0
        mined = self._reranked(mine_bm25(self.task, self.options, show_progress=is_first), scorer)
        raise_on_all_ranks(self._write(mined) if is_first else None)

    def mine_with_model(self, source: "VectorSource", topology: "Topology", scorer: "PairScorer | None", *,
                        cosine: bool, given: "GivenVectors | None" = None) -> None:
        """Embed, search, rerank if there is a reranker, and write. Called by all ranks.

        Args:
            cosine: search by cosine similarity, else by dot product.
            given: the vectors of the corpus, which are then not computed.
        """
        import torch
        from torch.nn.functional import normalize


        task = self.task
        scale = functools.partial(normalize, dim=-1) if cosine else torch.clone
        role: Role = "query"
        try:
            queries = scale(torch.cat(list(source.blocks(role, task.queries)))).to(topology.device)
            role = "document"
            if given is None:
                documents = (scale(block) for block in source.blocks(role, task.documents))
            else:
                own = (scale(block) for block in source.blocks(role, task.documents.own))
                documents = chain(self._given_blocks(given), own)
            mined = self._searched(queries, documents, given, topology)
        except EmptyTextError as error:
            first = len(task.documents) - len(task.documents.own) if given is not None and role == "document" else 0
            raise EmptyTextError(error.row, self._source_of(role, first + error.row), error.text) from None
        self._finish(mined, scorer, is_first=topology.rank == 0)

    def mine_with_blocks(self, encoder: "TextEncoder", scorer: "PairScorer | None") -> None:
        """The same with a multi-vector or sparse model, whose documents' vectors stay on their rank. Called by all
        ranks."""
        from megatron_embed.mining.by_blocks import mine_by_blocks

        try:
            mined = mine_by_blocks(encoder, self.task, self.options)
        except EmptyTextError as error:
            role: Role = "query" if error.name.startswith("query") else "document"
            raise EmptyTextError(error.row, self._source_of(role, error.row), error.text) from None
        self._finish(mined, scorer, is_first=encoder.topology.rank == 0)

    def _finish(self, mined: Sequence[Mined] | None, scorer: "PairScorer | None", *, is_first: bool) -> None:
        """Rerank if there is a reranker, and write. Called by all ranks."""
        from megatron_embed.parallel.collectives import raise_on_all_ranks

        result: Sequence[Mined] | None = mined
        if scorer is not None:
            assert mined is not None, "all ranks have the candidates"
            result = self._reranked(mined, scorer)
        raise_on_all_ranks(self._write(result) if is_first and result is not None else None)

    def _searched(self, queries: "Tensor", documents: "Iterator[Tensor]", given: "GivenVectors | None",
                  topology: "Topology") -> "MinedRows | None":
        """The negatives, by exact search or by the given vectors' index. Called by all ranks."""
        import torch
        import torch.distributed as dist

        from megatron_embed.mining.dense import mine_by_index, mine_vectors

        task = self.task
        if given is None or given.index is None:
            return mine_vectors(queries, documents, task.positives, self.options, excluded=task.excluded,
                                group=dist.group.WORLD, num_documents=len(task.documents),
                                show_progress=topology.rank == 0)
        assert task.documents.corpus is not None
        further = list(documents)
        return mine_by_index(queries, given, task.documents.corpus.document_of_row,
                             torch.cat(further) if further else queries[:0].cpu(), task.positives, self.options,
                             excluded=task.excluded, group=dist.group.WORLD)

    def _given_blocks(self, given: "GivenVectors") -> "Iterator[Tensor]":
        """The given vectors of the corpus' documents, scaled; none if an index is searched."""
        from megatron_embed.evaluation.vector_files import ROWS_AT_ONCE

        assert self.task.documents.corpus is not None
        rows = self.task.documents.corpus.first_rows
        for start in range(0, len(rows) if given.index is None else 0, ROWS_AT_ONCE):
            yield given.vectors.scaled(given.vectors.gather(rows[start:start + ROWS_AT_ONCE]))

    def check_query_length(self, scorer: "PairScorer") -> None:
        """Raises DataError for a query that leaves no tokens for a document in the reranker's template."""
        from megatron_embed.mining.rerank_candidates import pair_of

        scorer.tokenizer.check_query_length([pair_of(self.task, self.records, query, positives[0])
                                     for query, positives in enumerate(self.task.positives)])

    def _reranked(self, mined: Sequence[Mined], scorer: "PairScorer") -> list[Mined]:
        """The candidates by the reranker's scores. Called by all ranks."""
        from megatron_embed.mining.rerank_candidates import rerank_candidates

        return rerank_candidates(mined, self.task, self.records, scorer.score, self.options,
                                 show_progress=scorer.topology.rank == 0)

    def _source_of(self, role: Role, index: int) -> str:
        """FILE:LINE of the first row with this query or document, else of the corpus."""
        for row, record in enumerate(self.records):
            if role == "query" and self.task.query_of_row[row] == index:
                return record.source
            if role == "document" and self.task.documents[index] in (*record.positive, *record.negatives):
                return record.source
        assert self.task.documents.corpus is not None
        return self.task.documents.corpus.source(index)

    def _write(self, mined: Sequence[Mined]) -> UserError | None:
        """Write the file, complete or not at all, and log what it holds; the error if it cannot be written."""
        task, output, num_negatives = self.task, self.output, self.options.num_negatives
        counts = [len(mined[query].negatives) for query in task.query_of_row]
        if not any(counts):
            return ConfigError(f"--output {output}: no candidate of any row passes the filters; loosen the score "
                               "bounds and margins, lower --range-min, or give a larger --corpus", key="--output")
        dropped = sum(count < self.least_negatives for count in counts)
        if dropped == len(counts):
            return ConfigError(f"--drop-incomplete {self.least_negatives}: every row has fewer negatives, at most "
                               f"{max(counts)}; lower it, or loosen the filters", key="--drop-incomplete")
        error = write_atomic("--output", output,
                             lambda file: write_rows(file, self.records, task, mined, self.least_negatives))
        if error is not None:
            return error
        logger.info("%s: %d rows, %d negatives from %d documents; %d rows have fewer than %d, %d of them none", output,
                    len(self.records), sum(counts), len(task.documents), sum(count < num_negatives for count in counts),
                    num_negatives, counts.count(0))
        if dropped:
            logger.info("%s: %d rows with fewer than %d negatives are left out, %d remain", output, dropped,
                        self.least_negatives, len(counts) - dropped)
        logger.info("%s", report(mined, self.options))
        if self.show:
            logger.info("%s", samples(self.records, task, mined, self.show, self.least_negatives))
        return None


def mine(args: argparse.Namespace, job: MiningJob) -> None:
    """Open the models that the options of `mine` name, then mine and write. Called by all ranks.

    Args:
        args: --model, --reranker, --document-prompt, --cache, and what open_encoder reads.
    """
    with monitored_ranks() as start:
        if args.model == "bm25":
            job.mine_with_bm25(_open_reranker(args, job, start))
            return
        from megatron_embed.evaluation.given_vectors import open_given_vectors
        from megatron_embed.loading.model_directory import open_encoder

        prompts: dict[Role, str] = {"query": ""}  # Queries carry their prompts already.
        if args.document_prompt is not None:
            prompts["document"] = args.document_prompt
        encoder, model, topology = open_encoder(args, prompts=True, given_prompts=prompts, start=start,
                                                multi_vector=args.cache is None,
                                                option=None if args.cache is None else "--cache")
        scorer = _open_reranker(args, job, start, topology)
        if encoder.pooling in ("tokens", "splade"):
            job.mine_with_blocks(encoder, scorer)
            return
        source = _open_vector_source(args, encoder, model)
        corpus = job.task.documents.corpus
        given = open_given_vectors(args, rows=0 if corpus is None else len(corpus.document_of_row), dim=encoder.dim,
                                   similarity=model.saved.similarity, what=args.corpus)
        job.mine_with_model(source, topology, scorer, cosine=model.saved.similarity == "cosine", given=given)


def query_prompts(args: argparse.Namespace, records: Sequence[Record]) -> list[str]:
    """Each row's prompt: --query-prompt, else the model directory's, with the row's instruction filled in."""
    from megatron_embed.loading.model_directory import find_model

    if args.model == "bm25":
        return [""] * len(records)
    saved = find_model(args.model, "--model").saved
    prompt = saved.prompts.get("query", "") if args.query_prompt is None else args.query_prompt
    if prompt and not saved.pools_prompts:
        raise ConfigError(f"--query-prompt {prompt!r}: include_prompt = false in the pooling of {args.model} is not "
                          "supported together with a prompt; set it to true, or leave the prompt out",
                          key="--query-prompt")
    if "{instruction}" not in prompt:
        return [prompt] * len(records)
    for record in records:
        if record.instruction is None:
            raise DataError(f"{record.source}: the query prompt {prompt!r} needs an instruction and the row has none; "
                            "give it one, or write the prompt out with --query-prompt")
    return [prompt.replace("{instruction}", record.instruction or "") for record in records]


def _open_reranker(args: argparse.Namespace, job: MiningJob, start: Start,
                   topology: "Topology | None" = None) -> "PairScorer | None":
    """The model of --reranker, on all ranks, once it is known to have room for every query; None without the option."""
    if args.reranker is None:
        return None
    from megatron_embed.loading.reranker import open_scorer

    scorer, _, _ = open_scorer(args.reranker, key="--reranker", dtype=args.dtype, overrides=args.overrides,
                               topology=topology, start=start)
    job.check_query_length(scorer)
    return scorer


def _open_vector_source(args: argparse.Namespace, encoder: "TextEncoder", model: "ModelDirectory") -> "VectorSource":
    """The encoder, behind the cache if --cache names one. Called by all ranks."""
    from megatron_embed.evaluation.vector_cache import VectorCache, VectorSource, model_digest
    from megatron_embed.parallel.collectives import broadcast_from_rank0

    if args.cache is None:
        return VectorSource(encoder, None, "", {})
    rank = encoder.topology.rank
    cache = VectorCache(args.cache, rank=rank)
    digest = broadcast_from_rank0(model_digest(model.read_from) if rank == 0 else "")
    # An option that was not given is the model's own setting, which the digest covers. `auto` depends on the machine.
    dtype = str(next(encoder.chunks[0].parameters()).dtype) if args.dtype == "auto" else args.dtype
    settings = {"version": __version__, "pooling": encoder.pooling, "causal": encoder.causal,
                "max_length": args.max_length, "dtype": dtype, "normalize": not args.no_normalize}
    return VectorSource(encoder, cache, digest, settings)
