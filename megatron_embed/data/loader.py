"""Batches of one data-parallel rank, each prepared while the step before it computes."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from megatron_embed.batch import EmbedBatch, RerankBatch, StepBatch
from megatron_embed.config.data import TrainFile
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.mixture import Sampler
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec, build_embed_batch
from megatron_embed.data.pair_batches import build_rerank_batch, sample_negatives
from megatron_embed.data.pair_tokenizer import PairTokenizer
from megatron_embed.data.records import sampled_documents
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", bound=StepBatch)


def check_prompts(records: RecordSet, tokenizer: RoleTokenizer) -> None:
    """Raises ConfigError for a prompt or an instruction of the data that leaves no room, or an instruction missing."""
    for source in records.files:
        prompts = source.file.query_prompt, source.file.document_prompt
        tokenizer.check_prompts(source.instructions, *prompts)
        if set(source.instructions) != {None} and not tokenizer.takes_instructions(prompts[0]):
            logger.warning("%s: the rows carry instructions that no prompt uses: data.query_prompt has no "
                           "{instruction}", source.path)


def data_set_names(paths: Sequence[str]) -> list[str]:
    """A short name of each path, for metrics: the last part without its ending, with its number if it is not unique."""
    names = [Path(path).name.split(".")[0] or path for path in paths]
    return [name if names.count(name) == 1 else f"{name}_{number + 1}" for number, name in enumerate(names)]


class StepLoader(ABC, Generic[Batch]):
    """This rank's batch of any optimizer step; no communication, equal on every rank of a replica.

    Data-parallel rank r takes rows r*G/dp_size ... of the G = global_batch_size rows of the step.

    Attributes:
        truncated_rows: rows cut to the maximum length, in the batches handed out so far.
    """

    def __init__(self, records: RecordSet, sampler: Sampler, *, dp_rank: int, dp_size: int) -> None:
        self.truncated_rows = 0
        self._records = records
        self._sampler = sampler
        share = sampler.global_batch_size // dp_size
        self._share = slice(dp_rank * share, (dp_rank + 1) * share)
        self._names = data_set_names([file.path for file in records.files])
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        self._next: tuple[int, Future[Batch]] | None = None

    @abstractmethod
    def batch_of(self, records: Sequence[Any], rows: Sequence[int], files: Sequence[TrainFile], step: int) -> Batch:
        """The batch of this rank's records of a step; `rows` are their numbers in the whole data, `files` the files
        that they are of. In the thread."""

    def rows(self, step: int) -> list[int]:
        """The row numbers in the whole data of this rank's queries in step `step`."""
        return self._sampler.rows_of_step(step)[self._share]

    def batch(self, step: int) -> Batch:
        """This rank's batch of optimizer step `step`; starts preparing step + 1.

        Raises:
            DataError: a file changed since it was checked.
        """
        prepared, self._next = self._next, None
        if prepared is None or prepared[0] != step:
            prepared = (step, self._thread.submit(self._build, step))
        batch = prepared[1].result()
        self._next = (step + 1, self._thread.submit(self._build, step + 1))
        self.truncated_rows += batch.num_truncated
        return batch

    def close(self) -> None:
        """Wait for the batch under preparation and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _build(self, step: int) -> Batch:
        batch = self.build(self._records, self.rows(step), step)
        entries = {self._records.file_of(row) for row in self._sampler.rows_of_step(step)}
        if len(self._names) > 1 and len(entries) == 1:
            return replace(batch, data_set=self._names[entries.pop()])
        return batch

    def build(self, records: RecordSet, rows: Sequence[int], step: int) -> Batch:
        """The batch of some rows, made as those of a step are.

        Raises:
            DataError: a row cannot be read.
        """
        try:
            found = [records[row] for row in rows]
        except OSError as error:  # a disk that fails under way; the loop tells the other ranks of a UserError
            raise DataError(f"data.train: a row of step {step + 1} cannot be read ({error.strerror or error}); look at "
                            "the disk, then start the run again") from error
        return self.batch_of(found, rows, [records.files[records.file_of(row)].file for row in rows], step)


class BatchLoader(StepLoader[EmbedBatch]):
    """Batches of an embedding model.

    Args:
        records: all training rows.
        sampler: over the same records.
        tokenizer: that of the model in training.
        packing: how rows are packed; with a token budget, ranks' numbers of micro-batches differ.
        documents: positives and hard negatives per query; more than any row has are as many as the row with the most
            has. `most_positives` is counted here.
        dp_rank, dp_size: this rank's index on the data-parallel axis, and the ranks on it.
        in_batch: whether the queries of every file have other negatives than their own.
        seed: for sampling a row's documents, from it, the row and the step alone; None: the first of the row.
        validation: further records that `build` is given, if any: messages have room for their documents too.

    Raises:
        ConfigError: the batch sizes do not divide, or an instruction is missing or too long.
    """

    def __init__(self, records: RecordSet, sampler: Sampler, tokenizer: RoleTokenizer, packing: PackingSpec,
                 documents: DocumentsPerQuery, *, dp_rank: int, dp_size: int, in_batch: bool = True,
                 seed: int | None = None, validation: RecordSet | None = None) -> None:
        group = packing.micro_batch_size * dp_size
        total = sampler.global_batch_size
        if packing.micro_batch_tokens is None and total % group:
            raise ConfigError(f"training.global_batch_size = {total} is not a multiple of micro_batch_size * "
                              f"data_parallel_size = {packing.micro_batch_size} * {dp_size}; next valid: "
                              f"{-(-total // group) * group}", key="training.global_batch_size")
        check_prompts(records, tokenizer)
        super().__init__(records, sampler, dp_rank=dp_rank, dp_size=dp_size)
        self._tokenizer = tokenizer
        self._packing = packing
        # Messages have room for what is asked for: never more of it than there is. All ranks read the same rows.
        sets = [records] if validation is None else [records, validation]
        most_positives = max(part.most_positives for part in sets)
        self._documents = DocumentsPerQuery(
            positives=min(documents.positives, most_positives), most_positives=most_positives,
            negatives=min(documents.negatives, max(part.most_negatives for part in sets)))
        self._in_batch = in_batch
        self._seed = seed

    def batch_of(self, records: Sequence[Any], rows: Sequence[int], files: Sequence[TrainFile],
                 step: int) -> EmbedBatch:
        if self._seed is not None:
            records = [sampled_documents(record, (self._seed, step, row))
                       for record, row in zip(records, rows, strict=True)]
        in_batch = None if self._in_batch else torch.tensor([file.in_batch_negatives for file in files])
        return build_embed_batch(records, self._tokenizer, self._packing, self._documents, in_batch=in_batch)


class RerankLoader(StepLoader[RerankBatch]):
    """Batches of a reranker; each time that a row comes its negatives are sampled again, from seed, row and step alone.

    Args:
        records: all training rows, RerankRecords.
        sampler: over the same records.
        tokenizer: that of the model in training, with its prompt.
        packing: how pairs are packed.
        dp_rank, dp_size: this rank's index on the data-parallel axis, and the ranks on it.
        num_negatives: documents with label 0 per query; 0: all of the row.
        seed: for sampling; None: the first ones of the row.
    """

    def __init__(self, records: RecordSet, sampler: Sampler, tokenizer: PairTokenizer, packing: PackingSpec, *,
                 dp_rank: int, dp_size: int, num_negatives: int, seed: int | None) -> None:
        super().__init__(records, sampler, dp_rank=dp_rank, dp_size=dp_size)
        self._tokenizer = tokenizer
        self._packing = packing
        self._num_negatives = num_negatives
        self._seed = seed

    def batch_of(self, records: Sequence[Any], rows: Sequence[int], files: Sequence[TrainFile],
                 step: int) -> RerankBatch:
        seeds = [None if self._seed is None else (self._seed, step, row) for row in rows]
        sampled = [sample_negatives(record, self._num_negatives, seed)
                   for record, seed in zip(records, seeds, strict=True)]
        return build_rerank_batch(sampled, self._tokenizer, self._packing)
