"""What of a run depends on what it trains: rows to batches, the evaluations, the export."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_embed.batch import EmbedBatch, RerankBatch
from megatron_embed.cli.export import PROBES, export_model
from megatron_embed.cli.export_reranker import PROBE_PAIRS, comparable, export_reranker
from megatron_embed.cli.inputs import Inputs
from megatron_embed.cli.reranker import scorer_of
from megatron_embed.cli.resume import record_export
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.loader import BatchLoader, RerankLoader, StepLoader
from megatron_embed.data.pairs import Pair, PairTokenizer
from megatron_embed.data.prompts import Role, RoleTokenizer
from megatron_embed.data.records import RecordSet, RerankRecord
from megatron_embed.data.rerank import pairs_of
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.reranking import RerankData, ScorePairs, evaluate_reranking, similarity_of_pairs
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from megatron_embed.models.encoder import EmbeddingModel, attention_kernel
from megatron_embed.parallel.topology import Topology, token_alignment
from megatron_embed.training.agreement import agree_on_bins, agree_on_rerank_bins, agree_on_shares

NUM_EXPORT_ROWS = 64
"""Training rows on whose texts an export is compared with the model in memory."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Built once the model is loaded. Everything here is called by all ranks."""

    loader: StepLoader[Any]
    agree: Callable[[Any], Any]
    """Gives all data-parallel ranks as many micro-batches, of one size; for token budgets."""
    agree_on_shares: Callable[[Any], Any]
    """The same where ranks differ in their numbers of rows."""
    evaluate: Callable[[], dict[str, float]] | None
    """Null: there is nothing to evaluate on."""
    export: Callable[[int], None]
    """Writes `checkpoint.export_at_end` from the newest checkpoint, which has so many optimizer steps."""


def embedding_task(config: RunConfig, inputs: Inputs, topology: Topology, models: Sequence[EmbeddingModel],
                   wrapped: Sequence[torch.nn.Module]) -> Task:
    """Training an embedding model."""
    tokenizer = inputs.tokenizer
    assert isinstance(tokenizer, RoleTokenizer)
    encoder = TextEncoder(wrapped, topology, tokenizer, pooling=models[0].pooling, dim=inputs.model.shape.hidden_size,
                          kernel=attention_kernel(config), causal=models[0].causal)
    whole_groups = not config.objective.couples_batch
    loader = BatchLoader(
        inputs.records, inputs.sampler, tokenizer, dp_rank=topology.dp_rank, dp_size=topology.dp_size,
        micro_batch_size=config.training.micro_batch_size, num_negatives=config.data.num_negatives,
        num_positives=config.data.num_positives, in_batch=[file.in_batch_negatives for file in config.data.train],
        alignment=token_alignment(config.parallel), constant_tokens=topology.pp_size > 1,
        micro_batch_tokens=config.training.micro_batch_tokens, whole_groups=whole_groups)
    similarity: Literal["cosine", "dot"] = "cosine" if config.embedding.normalize else "dot"

    def agree(batch: EmbedBatch) -> EmbedBatch:
        return agree_on_bins(batch, topology, whole_groups=whole_groups)

    def evaluate() -> dict[str, float]:
        score = functools.partial(similarity_of_pairs, encoder.encode, similarity=similarity)
        return {**evaluate_all(inputs.retrieval, encoder, similarity), **rerank_all(inputs.reranking, score)}

    def export(steps: int) -> None:
        directory, target = _export_places(config)
        export_model(directory, target, encoder, comparable_texts(inputs.records, tokenizer), config.model.dtype,
                     note=functools.partial(record_export, directory, target, steps))

    return Task(loader=loader, agree=agree, export=export,
                agree_on_shares=functools.partial(agree_on_shares, topology=topology, whole_groups=whole_groups),
                evaluate=evaluate if inputs.retrieval or inputs.reranking else None)


def reranker_task(config: RunConfig, inputs: Inputs, topology: Topology, models: Sequence[EmbeddingModel],
                  wrapped: Sequence[torch.nn.Module]) -> Task:
    """Training a reranker."""
    tokenizer = inputs.tokenizer
    assert isinstance(tokenizer, PairTokenizer) and inputs.settings is not None
    scorer = scorer_of(wrapped, models, topology, tokenizer, config, inputs.settings.activation)
    loader = RerankLoader(
        inputs.records, inputs.sampler, tokenizer, dp_rank=topology.dp_rank, dp_size=topology.dp_size,
        micro_batch_size=config.training.micro_batch_size, num_negatives=config.data.num_negatives,
        seed=config.training.seed if config.data.shuffle else None, alignment=token_alignment(config.parallel),
        constant_tokens=topology.pp_size > 1, micro_batch_tokens=config.training.micro_batch_tokens)

    def agree(batch: RerankBatch) -> RerankBatch:
        return agree_on_rerank_bins(batch, topology)

    def export(steps: int) -> None:
        directory, target = _export_places(config)
        export_reranker(directory, target, scorer, comparable_pairs(inputs.records, tokenizer), config.model.dtype,
                        note=functools.partial(record_export, directory, target, steps))

    evaluate = functools.partial(rerank_all, inputs.reranking, scorer.raw_scores)
    return Task(loader=loader, agree=agree, agree_on_shares=agree, export=export,
                evaluate=evaluate if inputs.reranking else None)


def _export_places(config: RunConfig) -> tuple[str, str]:
    directory, target = config.checkpoint.directory, config.checkpoint.export_at_end
    assert directory is not None and target is not None
    return directory, target


def comparable_texts(records: RecordSet, tokenizer: RoleTokenizer) -> list[str]:
    """Training texts that neither role cuts: Sentence Transformers knows one maximum length, we know one per role."""
    roles: tuple[Role, ...] = ("query", "document")
    some = [records[number] for number in range(min(len(records), NUM_EXPORT_ROWS))]
    texts = [*(record.query for record in some), *(text for texts in PROBES.values() for text in texts)]
    return [text for text in texts if not any(tokenizer.tokenize([text], role).num_truncated for role in roles)]


def comparable_pairs(records: RecordSet, tokenizer: PairTokenizer) -> list[Pair]:
    """The first pair of some training rows, and pairs of several scripts, those that are not cut."""
    some = [records[number] for number in range(min(len(records), NUM_EXPORT_ROWS))]
    pairs = [pairs_of(record)[0] for record in some if isinstance(record, RerankRecord)]
    return comparable([*pairs, *(Pair(query=query, document=document) for query, document in PROBE_PAIRS)], tokenizer)


def evaluate_all(sets: Sequence[BeirData], encoder: TextEncoder,
                 similarity: Literal["cosine", "dot"]) -> dict[str, float]:
    """Retrieval metrics of every set, prefixed by its name where there are several. Called by all ranks."""
    results: dict[str, float] = {}
    for data in sets:
        metrics = evaluate_retrieval(encoder.encode, data, similarity=similarity)
        results.update(metrics if len(sets) == 1 else {f"{data.name}/{key}": value for key, value in metrics.items()})
    return results


def rerank_all(sets: Sequence[RerankData], score: ScorePairs) -> dict[str, float]:
    """Reranking metrics of every set, `rerank/ndcg@10` and so on, with the set's name where there are several."""
    results: dict[str, float] = {}
    for data in sets:
        prefix = "rerank" if len(sets) == 1 else f"rerank/{data.name}"
        results.update({f"{prefix}/{key}": value for key, value in evaluate_reranking(score, data).items()})
    return results
