"""Training an embedding model."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_embed.config.evaluation import EvaluationSet
from megatron_embed.config.run_checks import check_score_temperature
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.dataset import RecordSet, open_records
from megatron_embed.data.empty_texts import refuse_empty_rows
from megatron_embed.data.loader import BatchLoader
from megatron_embed.data.number_checks import WITH_BOUNDS
from megatron_embed.data.packing import DocumentsPerQuery
from megatron_embed.data.records import ANY_NUMBER, require_fields, text_id
from megatron_embed.data.token_cache import TokenCache
from megatron_embed.data.tokenizer import Role, RoleTokenizer, TextFormat
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.beir import refuse_empty_texts
from megatron_embed.evaluation.block_retrieval import means_by_blocks
from megatron_embed.evaluation.document_search import scores_of_lists
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.reranking import similarity_of_pairs
from megatron_embed.evaluation.retrieval import Embed
from megatron_embed.evaluation.sts import refuse_empty_pairs
from megatron_embed.evaluation.suite import EvaluationSuite, average
from megatron_embed.export.calibration import ranges_of_documents
from megatron_embed.export.embedding import PROBES, export_model, write_settings
from megatron_embed.export.verify import ExpectedSettings
from megatron_embed.loading.model_directory import ModelDirectory, error_context, load_model_chunks
from megatron_embed.models.encoder import EmbeddingModel, attention_kernel
from megatron_embed.models.reranker_settings import RERANKER_FILE
from megatron_embed.names import Similarity, pools_last_token
from megatron_embed.objectives.base import Objective, with_margins
from megatron_embed.objectives.build import build_objective, metric_names
from megatron_embed.objectives.fixed_vectors import Lookup
from megatron_embed.parallel.collectives import raise_on_all_ranks
from megatron_embed.parallel.topology import Topology, check_token_budget
from megatron_embed.run.other_models import check_other_models, fixed_vectors
from megatron_embed.run.task import Inputs, Task, TaskParts, evaluate_rerank_sets, first_rows
from megatron_embed.training.bin_sync import agree_on_bins, agree_on_shares
from megatron_embed.training.metrics import write_projector

NUM_PROJECTOR_TEXTS = 300
"""Texts of each evaluation set in TensorBoard's projector, half of them queries."""
ROLES: tuple[Role, ...] = ("query", "document")


class EmbeddingTask(Task):
    """Texts to vectors: contrastive losses, labelled pairs and hard negatives."""

    tokenizer: RoleTokenizer
    cache: TokenCache | None = None
    """The token ids of the rows, if they were written before the run."""
    old_documents: Lookup | None = None
    """Vectors of documents that training leaves as they are, once the objective is built."""

    def check_sizes(self) -> None:
        check_score_temperature(self.config)
        check_lengths(self.config, self.model)
        check_dims(self.config, self.model)
        check_other_models(self.config, self.model)

    def open(self) -> RecordSet:
        data, objective = self.config.data, self.config.objective
        self.tokenizer = open_tokenizer(self.config, self.model)
        records = open_records(data.files, objective.rows, self.index_place)
        if data.token_cache is not None:
            self.cache = TokenCache(data.token_cache, settings_of_tokens(self.config, self.tokenizer, records))
        records.check_once(self.settings_of_rows, functools.partial(self._check_rows, records))
        check_token_budget(self.config, records.most_in_use(data.num_positives, data.num_negatives))
        return records

    def _check_rows(self, records: RecordSet) -> None:
        """Raises UserError for a row that the loss or the tokenizer cannot take."""
        data, objective = self.config.data, self.config.objective
        require_fields(records, objective.loss, teacher_scores=objective.needs_teacher_scores,
                       negatives=objective.needs_own_negatives, labels=objective.loss in WITH_BOUNDS,
                       teacher_temperature=objective.teacher_temperature or objective.temperature)
        read = (ANY_NUMBER, ANY_NUMBER) if data.samples_documents else (data.num_negatives, data.num_positives)
        refuse_empty_rows(records, self.tokenizer, *read)

    def check_evaluations(self, suite: EvaluationSuite) -> None:
        evaluation = self.config.evaluation
        for key, sets in (("retrieval", evaluation.retrieval), ("sts", evaluation.sts)):
            check_instructions(f"evaluation.{key}", sets, self.config, self.tokenizer)
        for data in suite.retrieval:
            refuse_empty_texts(data, self.tokenizer)
        for pairs in suite.sts:
            refuse_empty_pairs(pairs, self.tokenizer)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return with_margins(metric_names(self.config))

    @property
    def lengths(self) -> str:
        query, document = (self.tokenizer.max_length(role) for role in ROLES)
        return f"up to {query} tokens of a query, {document} of a document"

    @property
    def example(self) -> str:
        return 'vectors = model.encode(["what is tea"], role="query")'

    def saved_settings(self, checkpoint: Path) -> dict[str, object]:
        return {}

    def has_tokenizer_of(self, checkpoint: Path) -> bool:
        config, texts = self.config, [text for texts in PROBES.values() for text in texts]
        saved = RoleTokenizer(
            str(checkpoint / "hf"), add_eos=pools_last_token(self.model.pooling(config.embedding.pooling)),
            text_format=training_format(self.model), document_prompt=config.data.prompt("document"),
            query_max_length=config.data.max_length("query"), document_max_length=config.data.max_length("document"))
        return saved.tokenize(texts, "document").token_ids == self.tokenizer.tokenize(texts, "document").token_ids

    def load_model_chunks(self, topology: Topology) -> list[EmbeddingModel]:
        return load_model_chunks(self.model, self.config, topology, new_weights=True)

    def build_objective(self, inputs: Inputs, topology: Topology) -> Objective[Any]:
        fixed = fixed_vectors(inputs, topology, self.tokenizer)
        self.old_documents = fixed.old_document
        return build_objective(self.config, topology.dp_group, topology.model_parallel_groups, fixed)

    def write_settings(self, hf: Path) -> None:
        (hf / RERANKER_FILE).unlink(missing_ok=True)
        with error_context("model.path", self.config.model.path):
            write_settings(hf, self.config, self.model)

    def build(self, inputs: Inputs, topology: Topology, models: Sequence[EmbeddingModel],
              wrapped: Sequence[torch.nn.Module]) -> TaskParts:
        encoder = TextEncoder(wrapped, topology, self.tokenizer, pooling=models[0].pooling,
                              dim=self.model.dim(self.config.embedding), causal=models[0].causal,
                              kernel=attention_kernel(self.config, self.model.shape))
        agreement: dict[str, Any] = {"topology": topology, "budget": self.config.training.micro_batch_tokens,
                                     "keep_groups_together": self._keeps_groups}
        return TaskParts(
            agree=functools.partial(agree_on_bins, **agreement),
            agree_on_shares=functools.partial(agree_on_shares, **agreement),
            evaluate=functools.partial(self._evaluate, encoder, inputs.suite) if inputs.suite else None,
            show_vectors=functools.partial(self._show_vectors, encoder, inputs),
            export=functools.partial(self._export, encoder, inputs.records))

    @property
    def _keeps_groups(self) -> bool:
        """Whether a query shares its micro-batch with its documents."""
        return not self.config.workload.couples_batch

    def build_loader(self, inputs: Inputs, dp_rank: int, dp_size: int) -> BatchLoader:
        data = self.config.data
        return BatchLoader(
            inputs.records, inputs.sampler,
            self.tokenizer if self.cache is None else self.tokenizer.with_cache(self.cache),
            dataclasses.replace(self.packing, keep_groups_together=self._keeps_groups),
            DocumentsPerQuery(positives=data.num_positives, negatives=data.num_negatives,
                              embedded=not self.config.training.query_side_only,
                              seed=self.config.training.seed if data.samples_documents else None),
            dp_rank=dp_rank, dp_size=dp_size, validation=inputs.validation)

    def _evaluate(self, encoder: TextEncoder, suite: EvaluationSuite) -> dict[str, float]:
        similarity: Similarity = "cosine" if self.config.embedding.unit_length else "dot"
        if encoder.gives_several:
            retrieval = [(data.name, means_by_blocks(encoder, data, group=dist.group.WORLD))
                         for data in suite.retrieval]
            return {**average(retrieval), **evaluate_rerank_sets(suite.reranking, functools.partial(
                scores_of_lists, encoder))}

        def embed_for(instruction: str | None) -> Embed:
            own = functools.partial(encoder.encode, instruction=instruction)
            old = self.old_documents if self.config.training.query_side_only else None
            return own if old is None else lambda texts, role: (
                own(texts, role) if role == "query" else old(torch.tensor(list(map(text_id, texts)))))

        score = functools.partial(similarity_of_pairs, encoder.encode, similarity=similarity)
        metrics = suite.evaluate(embed_for, similarity, group=dist.group.WORLD, device=encoder.topology.device)
        return {**metrics, **evaluate_rerank_sets(suite.reranking, score)}

    def _show_vectors(self, encoder: TextEncoder, inputs: Inputs) -> None:
        """Vectors of evaluated texts for TensorBoard's projector, where there is TensorBoard."""
        directory, samples = self.config.log_directory, inputs.suite.samples(NUM_PROJECTOR_TEXTS)
        if directory is None or not self.config.logging.tensorboard or not samples or (
                encoder.gives_several):
            return
        vectors = [encoder.encode(texts, role, instruction=data.instruction) for data, role, texts in samples]
        labels = [(data.name, role, text) for data, role, texts in samples for text in texts]
        raise_on_all_ranks(write_projector(directory, torch.cat(vectors), labels, inputs.train_steps)
                           if encoder.topology.rank == 0 else None)

    def _export(self, encoder: TextEncoder, records: RecordSet, checkpoint: str, steps: int) -> None:
        config, embedding = self.config, self.config.embedding
        wanted = self.wanted_exports(checkpoint, steps, self.model.dim(embedding), records)
        ranges = {} if "int8" not in embedding.precision else ranges_of_documents(
            encoder, records, embedding.matryoshka_dims, unit_length=embedding.unit_length)
        export_model(checkpoint, wanted, encoder, comparable_texts(records, self.tokenizer), config.model.dtype,
                     expected_settings(config, self.tokenizer), ranges)


def check_lengths(config: RunConfig, model: ModelDirectory) -> None:
    """Raises ConfigError if a role's texts are longer than the model's positions."""
    for role, length in ((role, config.data.max_length(role)) for role in ROLES):
        if length > model.shape.longest_text:
            raise ConfigError(f"data.{role}_max_length = {length} is longer than the model's "
                              f"{model.shape.longest_text} positions; lower it to that or less",
                              key=f"data.{role}_max_length")
    expanded = config.embedding.query_expansion or 0
    if expanded > model.shape.longest_text:
        raise ConfigError(f"embedding.query_expansion = {expanded} is longer than the model's "
                          f"{model.shape.longest_text} positions; lower it to that or less",
                          key="embedding.query_expansion")


def check_dims(config: RunConfig, model: ModelDirectory) -> None:
    """Raises ConfigError for matryoshka dimensions or an `embedding_dim` that the model's vectors cannot have."""
    dims, dim = config.embedding.matryoshka_dims, model.dim(config.embedding)
    if dims and dims[0] > dim:
        raise ConfigError(f"embedding.matryoshka_dims = {list(dims)}: the model's vectors have {dim} "
                          "dimensions; leave out what is wider", key="embedding.matryoshka_dims")


def check_instructions(key: str, sets: Sequence[EvaluationSet], config: RunConfig, tokenizer: RoleTokenizer) -> None:
    """Raises ConfigError if a set lacks the instruction that the prompt needs, or has one that leaves no text."""
    for item in sets:
        if tokenizer.needs_instructions and item.instruction is None:
            raise ConfigError(f"{key} = {item.path!r}: data.query_prompt = {config.data.query_prompt!r} needs an "
                              "instruction and the set has none; write {path: ..., instruction: ...}, or set "
                              "embedding.instruction for all", key=key)
        tokenizer.check_prompts({item.instruction: f"{key} = {item.path!r}"})


def open_tokenizer(config: RunConfig, model: ModelDirectory) -> RoleTokenizer:
    """The model's tokenizer with this run's prompts and lengths."""
    with error_context("model.path", config.model.path):
        tokenizer = RoleTokenizer(
            str(model.hf), add_eos=pools_last_token(model.pooling(config.embedding.pooling)),
            text_format=training_format(model), query_prompt=config.data.prompt("query"),
            document_prompt=config.data.prompt("document"), query_max_length=config.data.max_length("query"),
            document_max_length=config.data.max_length("document"),
            vocab_size=model.shape.vocab_size, instruction=config.embedding.instruction)
    asked = {"evaluation.reranking": config.evaluation.reranking,
             "checkpoint.export_at_end": config.checkpoint.export_at_end}
    if tokenizer.needs_instructions and any(asked.values()):
        key, value = next((key, value) for key, value in asked.items() if value)
        raise ConfigError(f"{key} = {value!r}: data.query_prompt = {config.data.query_prompt!r} needs an instruction; "
                          "set embedding.instruction", key=key)
    return tokenizer


def settings_of_tokens(config: RunConfig, tokenizer: RoleTokenizer, records: RecordSet) -> dict[str, object]:
    """All that decides the token ids of the rows, by name."""
    prompts = {f"data.{role}_prompt": config.data.prompt(role) for role in ROLES}
    entries = [[file.file.query_prompt, file.file.document_prompt, file.file.instruction]
               for file in records.files]
    return {**tokenizer.settings_of_ids(), **prompts, "embedding.instruction": config.embedding.instruction,
            "prompts of data.train": entries, "content of data.train": [file.digest for file in records.files]}


def training_format(model: ModelDirectory) -> TextFormat:
    """The text format in training: the directory's, but cut at the end, so that no prompt is lost."""
    return dataclasses.replace(model.text_format, truncation_side="right")


def expected_settings(config: RunConfig, tokenizer: RoleTokenizer) -> ExpectedSettings:
    """The settings that Sentence Transformers must read from the run's export."""
    return ExpectedSettings(
        prompts={role: tokenizer.fill_prompt(role) for role in ROLES},
        max_seq_length=max(tokenizer.max_length(role) for role in ROLES),
        similarity="maxsim" if config.embedding.head == "multi_vector" else
        "cosine" if config.embedding.normalize else "dot", dtype=config.model.dtype,
        matryoshka_dims=config.embedding.matryoshka_dims or None)


def comparable_texts(records: RecordSet, tokenizer: RoleTokenizer) -> list[str]:
    """Training texts that no role cuts whose maximum length is the shorter one: Sentence Transformers knows the longer
    one alone."""
    longest = max(tokenizer.max_length(role) for role in ROLES)
    shorter = [role for role in ROLES if tokenizer.max_length(role) < longest]
    texts = [*(record.query for record in first_rows(records)), *(text for texts in PROBES.values() for text in texts)]
    return [text for text in texts if not any(tokenizer.tokenize([text], role).num_truncated for role in shorter)]
