"""Training a reranker."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_embed.config.schema import RunConfig
from megatron_embed.data.dataset import RecordSet, open_records
from megatron_embed.data.loader import RerankLoader
from megatron_embed.data.pair_batches import check_rerank_records, pairs_of
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.data.records import RerankRecord
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.score import PairScorer
from megatron_embed.evaluation.suite import EvaluationSuite
from megatron_embed.export.embedding import PROBES
from megatron_embed.export.reranker import PROBE_PAIRS, comparable, export_reranker
from megatron_embed.loading.model_directory import ModelDirectory, error_context
from megatron_embed.loading.reranker import (
    check_last_token,
    head_spec,
    load_reranker_chunks,
    open_pair_tokenizer,
    reranker_settings,
    scorer_of,
)
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.models.heads import HeadSpec
from megatron_embed.models.joint_files import remove_joint_heads
from megatron_embed.models.reranker_settings import RerankerSettings, read_reranker_settings, write_reranker_settings
from megatron_embed.objectives.base import with_margins
from megatron_embed.objectives.reranking import Reranking
from megatron_embed.parallel.topology import Topology, token_alignment
from megatron_embed.run.task import Inputs, Task, TaskParts, evaluate_rerank_sets, first_rows
from megatron_embed.training.bin_sync import agree_on_rerank_bins


class RerankTask(Task):
    """Pairs of query and document to scores."""

    tokenizer: PairTokenizer
    settings: RerankerSettings
    head: HeadSpec

    def __init__(self, config: RunConfig, model: ModelDirectory, checkpoint: Path | None) -> None:
        self._lengths_are_set = (config.data.query_max_length, config.data.document_max_length) != (None, None)
        super().__init__(config, model, checkpoint)

    def check_sizes(self) -> None:
        """Nothing to check: a pair's length is checked with its template, when that is opened."""

    def open(self) -> RecordSet:
        self.open_tokenizer()
        self.head = head_spec(self.settings, self.tokenizer)
        config, records = self.config, open_records(self.config.data.files, "rerank", self.index_place)
        records.check_once(f"{self.settings_of_rows}{self.settings}", functools.partial(
            check_rerank_records, records, self.tokenizer, loss=config.objective.loss,
            temperature=config.objective.temperature, num_negatives=config.data.num_negatives,
            micro_batch_tokens=config.training.micro_batch_tokens, alignment=token_alignment(config.parallel)))
        return records

    def _settings(self) -> RerankerSettings:
        """The reranker's settings; of a resumed run, those it had."""
        data, model = self.config.data, self.model
        if self.checkpoint is not None and (begun := read_reranker_settings(self.checkpoint / "hf")) is not None:
            model = dataclasses.replace(model, reranker=begun, path=self.checkpoint, peft=None)
        return reranker_settings(self.config.reranker, model, lengths_are_set=self._lengths_are_set,
                                 longest=data.max_length("query") + data.max_length("document"))

    def open_tokenizer(self) -> PairTokenizer:
        """Set `settings` and `tokenizer`, and return the latter. Raises UserError if training could not use them."""
        config, self.settings = self.config, self._settings()
        with error_context("model.path", config.model.path):
            tokenizer = open_pair_tokenizer(self.settings, self.model)
        check_last_token(self.settings, tokenizer, "reranker.template" if config.reranker.template is not None else
                         f"model.path = {config.model.path!r}: its template")
        if config.checkpoint.export_at_end is not None and not tokenizer.can_pad:
            raise ConfigError(f"checkpoint.export_at_end = {config.checkpoint.export_at_end!r}: the tokenizer of "
                              f"{config.model.path} names neither pad_token nor eos_token, without which the stock "
                              "libraries form no batch; set pad_token in its tokenizer_config.json",
                              key="checkpoint.export_at_end")
        self.tokenizer = tokenizer
        return tokenizer

    @property
    def samples_documents(self) -> bool:
        """Whether a step samples a row's negatives, so that any of them may be used."""
        data = self.config.data
        return data.shuffle if data.document_sampling is None else data.document_sampling == "random"

    def check_evaluations(self, suite: EvaluationSuite) -> None:
        """Nothing to check: lists of documents are checked where they are read."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return with_margins(Reranking.names)

    @property
    def lengths(self) -> str:
        return f"up to {self.settings.max_length} tokens of a pair"

    @property
    def example(self) -> str:
        return 'scores = model.rerank("what is tea", ["a drink", "a river"])'

    def saved_settings(self, checkpoint: Path) -> dict[str, object]:
        begun = read_reranker_settings(checkpoint / "hf")
        return {} if begun is None else {f"reranker.{name}": value for name, value in vars(begun).items()}

    def has_tokenizer_of(self, checkpoint: Path) -> bool:
        pairs = [Pair(query="a", document=text) for texts in PROBES.values() for text in texts]
        saved = self.tokenizer.with_directory(str(checkpoint / "hf"))
        return saved.tokenize(pairs) == self.tokenizer.tokenize(pairs)

    def load_model_chunks(self, topology: Topology) -> list[EmbeddingModel]:
        return load_reranker_chunks(self.model, self.config, topology, self.head, new_weights=True)

    def build_objective(self, inputs: Inputs, topology: Topology) -> Reranking:
        return Reranking(self.config.objective.loss, self.config.reranker, topology.dp_group)

    def write_settings(self, hf: Path) -> None:
        write_reranker_settings(hf, self.settings)
        remove_joint_heads(hf)

    def build(self, inputs: Inputs, topology: Topology, models: Sequence[EmbeddingModel],
              wrapped: Sequence[torch.nn.Module]) -> TaskParts:
        scorer = scorer_of(wrapped, models, topology, self.tokenizer, self.config, self.settings.activation)
        agree = functools.partial(agree_on_rerank_bins, topology=topology,
                                  budget=self.config.training.micro_batch_tokens)
        return TaskParts(
            agree=agree, agree_on_shares=agree, show_vectors=None,
            evaluate=functools.partial(evaluate_rerank_sets, inputs.suite.reranking, scorer.raw_scores)
            if inputs.suite else None,
            export=functools.partial(self._export, scorer, inputs.records))

    def build_loader(self, inputs: Inputs, dp_rank: int, dp_size: int) -> RerankLoader:
        return RerankLoader(
            inputs.records, inputs.sampler, self.tokenizer, self.packing, dp_rank=dp_rank, dp_size=dp_size,
            num_negatives=self.config.data.num_negatives,
            seed=self.config.training.seed if self.samples_documents else None)

    def _export(self, scorer: PairScorer, records: RecordSet, checkpoint: str, steps: int) -> None:
        export_reranker(checkpoint, self.wanted_exports(checkpoint, steps, None, records), scorer,
                        comparable_pairs(records, self.tokenizer), self.config.model.dtype)


def comparable_pairs(records: RecordSet, tokenizer: PairTokenizer) -> list[Pair]:
    """The first pair of some training rows, and pairs of several scripts, those that are not cut."""
    pairs = [pairs_of(record)[0] for record in first_rows(records) if isinstance(record, RerankRecord)]
    return comparable([*pairs, *(Pair(query=query, document=document) for query, document in PROBE_PAIRS)], tokenizer)
