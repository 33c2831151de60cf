"""What a run trains, an embedding model or a reranker: all that differs between the two is a method of `Task`."""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_embed import __version__
from megatron_embed.checkpoint.load import steps_done
from megatron_embed.config.load import to_dict
from megatron_embed.config.run_checks import why_encode_each
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.index_store import IndexPlace
from megatron_embed.data.loader import StepLoader
from megatron_embed.data.packing import PackingSpec
from megatron_embed.data.sampler import Sampler
from megatron_embed.evaluation.reranking import RerankData, ScorePairs, evaluate_reranking
from megatron_embed.evaluation.suite import EvaluationSuite, average
from megatron_embed.export.calibration import sample_rows
from megatron_embed.export.engines.further import further_files
from megatron_embed.export.model_card import write_card
from megatron_embed.export.verified_write import WantedExport
from megatron_embed.loading.model_directory import ModelDirectory
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.models.heads import HeadSpec
from megatron_embed.names import FurtherExport
from megatron_embed.objectives.base import Objective
from megatron_embed.parallel.topology import Topology, token_alignment
from megatron_embed.platform.launcher import launched_rank
from megatron_embed.run.inherit import inherited
from megatron_embed.run.run_directory import ResumeState, pending_exports, record_export

_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_BLOCK = 1 << 20
_NOT_OF_ROWS = ("index_directory", "workers", "token_cache")
"""Settings of the section data that do not change what is read of a row."""
NUM_EXPORT_ROWS = 64
"""Training rows on whose texts an export is compared with the model in memory."""


class Task(ABC):
    """The task of a run: checked and opened before the first collective, built once its model is loaded.

    Attributes:
        config: the run's, with the model directory's own settings where it had none.
        model: the directory that the run starts from.
        checkpoint: the newest one of a run that is resumed; None: a new run.
        head: what lies behind the model's pooling, once the task is open; None: nothing.
    """

    head: HeadSpec | None = None

    def __init__(self, config: RunConfig, model: ModelDirectory, checkpoint: Path | None) -> None:
        self.config, self.checkpoint = inherited(config, model, checkpoint), checkpoint
        self.model = model if self.config.workload.has_head else model.of_run(
            self.config.embedding, self.config.objective.score_weights)

    # Before the first collective, on every rank alike.

    @abstractmethod
    def check_sizes(self) -> None:
        """Raises ConfigError for lengths and dimensions that the model does not have."""

    @abstractmethod
    def open(self) -> RecordSet:
        """Opens the tokenizer and all rows, each one that the loss can take. Raises UserError for another one."""

    @abstractmethod
    def check_evaluations(self, suite: EvaluationSuite) -> None:
        """Raises UserError for an evaluation set whose texts the tokenizer cannot take."""

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """The names of the objective's metrics."""

    @property
    @abstractmethod
    def lengths(self) -> str:
        """The longest texts that it reads, in words, once it is open."""

    @property
    @abstractmethod
    def example(self) -> str:
        """A line of Python that uses the trained `model`."""

    @abstractmethod
    def saved_settings(self, checkpoint: Path) -> dict[str, object]:
        """Settings by dotted key that the files of a checkpoint of this run hold besides its config.yaml."""

    @abstractmethod
    def has_tokenizer_of(self, checkpoint: Path) -> bool:
        """Whether a checkpoint's tokenizer gives the same ids, on texts of several scripts."""

    # With the process groups.

    @abstractmethod
    def load_model_chunks(self, topology: Topology) -> list[EmbeddingModel]:
        """This rank's model chunks with their weights."""

    @abstractmethod
    def build_objective(self, inputs: "Inputs", topology: Topology) -> Objective[Any]:
        """The loss over the ranks of a replica and of the data-parallel group. Called by all ranks, before the model is
        loaded."""

    @abstractmethod
    def build_loader(self, inputs: "Inputs", dp_rank: int, dp_size: int) -> StepLoader[Any]:
        """The loader of a data-parallel rank. No communication."""

    @abstractmethod
    def build(self, inputs: "Inputs", topology: Topology, models: Sequence[EmbeddingModel],
              wrapped: Sequence[torch.nn.Module]) -> "TaskParts":
        """The evaluations and the export. `wrapped`: the same models in DDP. Called by all ranks."""

    @abstractmethod
    def write_settings(self, hf: Path) -> None:
        """Puts files beside a checkpoint's configuration that say how this run's model is used."""

    # The same of every task.

    @property
    def has_head(self) -> bool:
        """Whether the model has a head behind its last layer: a reranker's, or the vocabulary's of a sparse model."""
        return self.head is not None or self.config.embedding.head == "sparse"

    @property
    def has_tied_head(self) -> bool:
        """Whether the word embeddings get a part of their gradient from a head, after the backward passes."""
        shape = self.model.shape
        if self.head is not None:
            return self.head.is_tied(shape)
        in_pipeline = self.config.parallel.pipeline_model_parallel_size > 1
        return self.has_head and shape.tie_word_embeddings and in_pipeline

    @property
    def packing(self) -> PackingSpec:
        """Settings of packing: sizes, alignment and budget."""
        training, parallel = self.config.training, self.config.parallel
        return PackingSpec(
            micro_batch_size=training.micro_batch_size, micro_batch_tokens=training.micro_batch_tokens,
            alignment=token_alignment(parallel), uniform_size=parallel.pipeline_model_parallel_size > 1,
            encode_once=self._encodes_once)

    @property
    def _encodes_once(self) -> bool:
        """Whether a text that several rows of a share have is encoded once; see `training.encode_repeated_texts`."""
        training = self.config.training
        if training.encode_repeated_texts != "auto":
            return training.encode_repeated_texts == "once"
        balances = self.model.shape.num_experts > 0 and training.moe_aux_loss_coefficient > 0
        return not balances and why_encode_each(self.config) is None

    @property
    def index_place(self) -> IndexPlace:
        """The directory of the index of the rows, which all ranks write together."""
        rank, world_size, _ = launched_rank()
        return IndexPlace(directory=self.config.data.index_directory, rank=rank, world_size=world_size)

    @property
    def settings_of_rows(self) -> str:
        """All that decides whether training can take a row: this version, the settings, the tokenizer's files."""
        values, tokenizer = to_dict(self.config), hashlib.blake2b()
        for file in sorted(path for path in self.model.hf.rglob("*") if path.suffix in _TOKENIZER_SUFFIXES):
            tokenizer.update(f"{file.name}\0".encode())
            with file.open("rb") as opened:
                while block := opened.read(_BLOCK):
                    tokenizer.update(block)
        values["data"] = {name: value for name, value in values["data"].items() if name not in _NOT_OF_ROWS}
        sections = ("task", "model", "data", "objective", "embedding", "reranker", "parallel")
        return json.dumps([__version__, {name: values[name] for name in sections}, tokenizer.hexdigest(),
                           self.config.training.micro_batch_tokens], sort_keys=True, default=repr)

    def wanted_exports(self, checkpoint: str, steps: int, dim: int | None, records: RecordSet) -> list[WantedExport]:
        """The exports of the run, which has done so many steps, that are not there yet.

        Args:
            dim: dimensions of the vectors; None: a reranker.
            records: to calibrate 8-bit integers on.
        """
        pending = pending_exports(self.config, steps)
        rows = sample_rows(records) if any(kind is not None and kind.endswith("int8") for kind in pending) else []
        note = functools.partial(self._note_export, checkpoint, steps, dim)
        return [WantedExport(destination=target, note=functools.partial(note, kind),
                             addition=None if kind is None else further_files(kind, rows))
                for kind, target in pending.items()]

    def _note_export(self, checkpoint: str, steps: int, dim: int | None, kind: FurtherExport | None,
                     directory: Path) -> None:
        """Puts the model card into a finished export and records it."""
        exported = steps if self.config.checkpoint.export == "last" else steps_done(Path(checkpoint))
        write_card(directory, self.config, step=exported, dim=dim,
                   title=Path(self.config.checkpoint.exports[kind]).name)
        record_export(self.config, kind, steps)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is read and checked before the first collective, on every rank alike."""

    task: Task
    records: RecordSet
    """To train on."""
    validation: RecordSet | None
    """Held out; None without `data.validation_fraction` and `data.validation`."""
    sampler: Sampler
    order: int
    """The ORDER_VERSION that the run began with."""
    suite: EvaluationSuite
    """All that the run is evaluated on."""
    train_steps: int
    resume_state: ResumeState

    @property
    def config(self) -> RunConfig:
        """The task's."""
        return self.task.config

    @property
    def last_step(self) -> int:
        """The optimizer step after which the run ends, unless it ends early."""
        return last_step(self.resume_state, self.train_steps)

    @property
    def is_complete(self) -> bool:
        """Whether every step is done, evaluated where that is due, and the export made if one is wanted."""
        return is_complete(self.config, self.resume_state, self.train_steps)


def last_step(state: ResumeState, train_steps: int) -> int:
    """The optimizer step after which a run of so many ends, unless it ends early."""
    return state.steps if state.ended_early else train_steps


def is_complete(config: RunConfig, state: ResumeState, train_steps: int) -> bool:
    """Whether every step is done, evaluated where that is due, and the export made if one is wanted."""
    return (state.steps >= last_step(state, train_steps) and not pending_exports(config, state.steps)
            and not state.evaluation_owed)


@dataclass(frozen=True, kw_only=True)
class CompletedRun:
    """A run with nothing left to do, which is found before any row is read."""

    resume_state: ResumeState
    train_steps: int


@dataclass(frozen=True, kw_only=True)
class TaskParts:
    """The parts of a training that its task decides. Everything here is called by all ranks."""

    agree: Callable[[Any], Any]
    """Gives all data-parallel ranks as many micro-batches, in sizes of the budget; for token budgets."""
    agree_on_shares: Callable[[Any], Any]
    """The same where ranks differ in their numbers of rows."""
    evaluate: Callable[[], dict[str, float]] | None
    """None: there is nothing to evaluate on."""
    show_vectors: Callable[[], None] | None
    """Writes vectors for TensorBoard's projector, after the last step. None: there are no vectors."""
    export: Callable[[str, int], None]
    """(checkpoint, steps): writes `checkpoint.export_at_end`, in all formats, from the checkpoint whose weights the
    model holds; the run has done so many steps."""


def evaluate_rerank_sets(sets: Sequence[RerankData], score: ScorePairs) -> dict[str, float]:
    """Reranking metrics, `rerank/ndcg@10` and so on: the mean over the sets, each set's own where there are several."""
    results = average([(data.name, evaluate_reranking(score, data)) for data in sets])
    return {f"rerank/{name}": value for name, value in results.items()}


def first_rows(records: RecordSet) -> list[Any]:
    """Some training rows to compare an export on."""
    return [records[row] for row in range(min(len(records), NUM_EXPORT_ROWS))]
