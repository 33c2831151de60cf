"""What of a run depends on what it trains: rows to batches, the evaluations, the export."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_embed.batch import EmbedBatch, RerankBatch
from megatron_embed.checkpoint.state import steps_done
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.loader import BatchLoader, RerankLoader, StepLoader
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec
from megatron_embed.data.pair_batches import pairs_of
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.data.records import RerankRecord
from megatron_embed.data.tokenizer import Role, RoleTokenizer
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.reranking import RerankData, ScorePairs, evaluate_reranking, similarity_of_pairs
from megatron_embed.evaluation.retrieval import Embed
from megatron_embed.evaluation.suite import together
from megatron_embed.export.embedding import PROBES, export_model
from megatron_embed.export.model_card import write_card
from megatron_embed.export.reranker import PROBE_PAIRS, comparable, export_reranker
from megatron_embed.export.verify import ExpectedSettings
from megatron_embed.loading.reranker import scorer_of
from megatron_embed.models.encoder import EmbeddingModel, attention_kernel
from megatron_embed.parallel.collectives import raise_on_all_ranks
from megatron_embed.parallel.topology import Topology, token_alignment
from megatron_embed.run.preflight import Inputs, log_directory
from megatron_embed.run.resume import record_export
from megatron_embed.training.bin_sync import agree_on_bins, agree_on_rerank_bins, agree_on_shares
from megatron_embed.training.metrics import write_projector

NUM_PROJECTOR_TEXTS = 300
"""Of each evaluation set, half of them queries."""
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
    show: Callable[[], None] | None
    """After the last step: a sheet of vectors for TensorBoard. Null: there are no vectors."""
    export: Callable[[str, int], None]
    """(checkpoint, steps): writes `checkpoint.export_at_end` from the checkpoint whose weights the model holds; the
    run has done so many steps."""


def embedding_task(config: RunConfig, inputs: Inputs, topology: Topology, models: Sequence[EmbeddingModel],
                   wrapped: Sequence[torch.nn.Module]) -> Task:
    """Training an embedding model."""
    tokenizer = inputs.tokenizer
    assert isinstance(tokenizer, RoleTokenizer)
    encoder = TextEncoder(wrapped, topology, tokenizer, pooling=models[0].pooling, dim=inputs.model.shape.hidden_size,
                          kernel=attention_kernel(config), causal=models[0].causal)
    keep_groups_together = not config.objective.couples_batch
    loader = BatchLoader(
        inputs.records, inputs.sampler, tokenizer,
        dataclasses.replace(packing_of(config), keep_groups_together=keep_groups_together),
        DocumentsPerQuery(positives=config.data.num_positives, negatives=config.data.num_negatives,
                          seed=config.training.seed if config.data.samples_documents else None),
        dp_rank=topology.dp_rank, dp_size=topology.dp_size, validation=inputs.validation)
    similarity: Literal["cosine", "dot"] = "cosine" if config.embedding.unit_length else "dot"

    def agree(batch: EmbedBatch) -> EmbedBatch:
        return agree_on_bins(batch, topology, keep_groups_together=keep_groups_together)

    def embed_for(instruction: str | None) -> Embed:
        return functools.partial(encoder.encode, instruction=instruction)

    def evaluate() -> dict[str, float]:
        score = functools.partial(similarity_of_pairs, encoder.encode, similarity=similarity)
        metrics = inputs.suite.evaluate(embed_for, similarity, group=dist.group.WORLD, device=topology.device)
        return {**metrics, **rerank_all(inputs.suite.reranking, score)}

    def show() -> None:
        show_in_projector(config, inputs, encoder, topology)

    def export(checkpoint: str, steps: int) -> None:
        export_model(checkpoint, config.checkpoint.export_at_end or "", encoder,
                     comparable_texts(inputs.records, tokenizer), config.model.dtype,
                     expected_settings(config, tokenizer),
                     note=functools.partial(_note_export, config, checkpoint, steps, inputs.model.shape.hidden_size))

    return Task(loader=loader, agree=agree, export=export, show=show,
                agree_on_shares=functools.partial(agree_on_shares, topology=topology,
                                                  keep_groups_together=keep_groups_together),
                evaluate=evaluate if inputs.suite else None)


def packing_of(config: RunConfig) -> PackingSpec:
    """How the rows of a run are packed: sizes, alignment and budget."""
    return PackingSpec(
        micro_batch_size=config.training.micro_batch_size, micro_batch_tokens=config.training.micro_batch_tokens,
        alignment=token_alignment(config.parallel), uniform_size=config.parallel.pipeline_model_parallel_size > 1)


def reranker_task(config: RunConfig, inputs: Inputs, topology: Topology, models: Sequence[EmbeddingModel],
                  wrapped: Sequence[torch.nn.Module]) -> Task:
    """Training a reranker."""
    tokenizer = inputs.tokenizer
    assert isinstance(tokenizer, PairTokenizer) and inputs.settings is not None
    scorer = scorer_of(wrapped, models, topology, tokenizer, config, inputs.settings.activation)
    sampling = config.data.document_sampling
    draws = config.data.shuffle if sampling is None else sampling == "random"
    loader = RerankLoader(
        inputs.records, inputs.sampler, tokenizer, packing_of(config), dp_rank=topology.dp_rank,
        dp_size=topology.dp_size, num_negatives=config.data.num_negatives,
        seed=config.training.seed if draws else None)

    def agree(batch: RerankBatch) -> RerankBatch:
        return agree_on_rerank_bins(batch, topology)

    def export(checkpoint: str, steps: int) -> None:
        export_reranker(checkpoint, config.checkpoint.export_at_end or "", scorer,
                        comparable_pairs(inputs.records, tokenizer), config.model.dtype,
                        note=functools.partial(_note_export, config, checkpoint, steps, None))

    evaluate = functools.partial(rerank_all, inputs.suite.reranking, scorer.raw_scores)
    return Task(loader=loader, agree=agree, agree_on_shares=agree, export=export, show=None,
                evaluate=evaluate if inputs.suite else None)


def _note_export(config: RunConfig, checkpoint: str, steps: int, dim: int | None, directory: Path) -> None:
    """Puts the model card into a finished export of the run, which has done so many steps, and notes that it is its."""
    exported = steps if config.checkpoint.export == "last" else steps_done(Path(checkpoint))
    write_card(directory, config, step=exported, dim=dim)
    record_export(config, steps)


def expected_settings(config: RunConfig, tokenizer: RoleTokenizer) -> ExpectedSettings:
    """What Sentence Transformers must say of the run's export."""
    roles: tuple[Role, ...] = ("query", "document")
    return ExpectedSettings(
        prompts={role: tokenizer.fill_prompt(role) for role in roles},
        max_seq_length=max(tokenizer.max_length(role) for role in roles),
        similarity="cosine" if config.embedding.normalize else "dot", dtype=config.model.dtype,
        matryoshka_dims=config.embedding.matryoshka_dims or None)


def comparable_texts(records: RecordSet, tokenizer: RoleTokenizer) -> list[str]:
    """Training texts that no role cuts whose maximum length is the shorter one: Sentence Transformers knows the longer
    one alone."""
    both: tuple[Role, ...] = ("query", "document")
    longest = max(tokenizer.max_length(role) for role in both)
    roles = [role for role in both if tokenizer.max_length(role) < longest]
    some = [records[number] for number in range(min(len(records), NUM_EXPORT_ROWS))]
    texts = [*(record.query for record in some), *(text for texts in PROBES.values() for text in texts)]
    return [text for text in texts if not any(tokenizer.tokenize([text], role).num_truncated for role in roles)]


def comparable_pairs(records: RecordSet, tokenizer: PairTokenizer) -> list[Pair]:
    """The first pair of some training rows, and pairs of several scripts, those that are not cut."""
    some = [records[number] for number in range(min(len(records), NUM_EXPORT_ROWS))]
    pairs = [pairs_of(record)[0] for record in some if isinstance(record, RerankRecord)]
    return comparable([*pairs, *(Pair(query=query, document=document) for query, document in PROBE_PAIRS)], tokenizer)


def rerank_all(sets: Sequence[RerankData], score: ScorePairs) -> dict[str, float]:
    """Reranking metrics, `rerank/ndcg@10` and so on: the mean over the sets, each set's own where there are several."""
    results = together([(data.name, evaluate_reranking(score, data)) for data in sets])
    return {f"rerank/{name}": value for name, value in results.items()}


def show_in_projector(config: RunConfig, inputs: Inputs, encoder: TextEncoder, topology: Topology) -> None:
    """A sheet of evaluated texts for TensorBoard's projector, where there is TensorBoard. Called by all ranks."""
    directory, samples = log_directory(config), inputs.suite.samples(NUM_PROJECTOR_TEXTS)
    if directory is None or not config.logging.tensorboard or not samples:
        return
    vectors = [encoder.encode(texts, role, instruction=data.instruction) for data, role, texts in samples]
    labels = [(data.name, role, text) for data, role, texts in samples for text in texts]
    raise_on_all_ranks(write_projector(directory, torch.cat(vectors), labels, inputs.train_steps)
                if topology.rank == 0 else None)
