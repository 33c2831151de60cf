"""Batches of one data-parallel rank, each prepared while the steps before it compute."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from megatron_embed.batch import EmbedBatch, RerankBatch, StepBatch
from megatron_embed.config.data import TrainFile
from megatron_embed.config.require import micro_batches_per_step
from megatron_embed.data.batch_workers import BatchReceiver
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec, build_embed_batch
from megatron_embed.data.pair_batches import build_rerank_batch, sample_negatives
from megatron_embed.data.pair_tokenizer import PairTokenizer
from megatron_embed.data.records import sampled_documents
from megatron_embed.data.sampler import Sampler
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import DataError

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", bound=StepBatch)


def check_prompts(records: RecordSet, tokenizer: RoleTokenizer) -> None:
    """Raises ConfigError if a prompt or instruction of the data leaves no tokens for the text, or one is missing."""
    for source in records.files:
        prompts = source.file.query_prompt, source.file.document_prompt
        tokenizer.check_prompts(source.instructions, *prompts)
        if set(source.instructions) != {None} and not tokenizer.takes_instructions(prompts[0]):
            logger.warning("%s: the rows carry instructions that no prompt uses: data.query_prompt has no "
                           "{instruction}", source.path)


def data_set_names(paths: Sequence[str]) -> list[str]:
    """A short name of each path, for metrics: the last part without its ending, numbered if it is not unique."""
    names = [Path(path).name.split(".")[0] or path for path in paths]
    return [name if names.count(name) == 1 else f"{name}_{count}" for count, name in enumerate(names, start=1)]


class StepLoader(ABC, Generic[Batch]):
    """This rank's batch of any optimizer step; no communication, equal on every rank of a replica.

    Data-parallel rank r takes rows r*G/dp_size ... of the G = global_batch_size rows of the step.
    """

    def __init__(self, records: RecordSet, sampler: Sampler, *, dp_rank: int, dp_size: int) -> None:
        self._records = records
        self._sampler = sampler
        share = sampler.global_batch_size // dp_size
        self._share = slice(dp_rank * share, (dp_rank + 1) * share)
        self._names = data_set_names([file.path for file in records.files])
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        self._next: tuple[int, Future[Batch]] | None = None
        self._receiver: BatchReceiver | None = None

    @abstractmethod
    def batch_of(self, records: Sequence[Any], rows: Sequence[int], files: Sequence[TrainFile], step: int) -> Batch:
        """The batch of this rank's records of a step. Runs in the loader's thread or in a worker process.

        Args:
            rows: index of each record in the whole data.
            files: the entry that each record comes from.
        """

    def rows(self, step: int) -> list[int]:
        """Indices, in the whole data, of this rank's rows in step `step`."""
        return self._sampler.rows_of_step(step)[self._share]

    def batch(self, step: int) -> Batch:
        """This rank's batch of optimizer step `step`; later ones are prepared meanwhile.

        Raises:
            DataError: a file changed since it was checked.
            ConfigError: the worker processes are gone.
        """
        if self._receiver is not None and self._receiver.next_step == step:
            received: Batch = self._receiver.take()
            return received
        prepared, self._next = self._next, None
        if prepared is None or prepared[0] != step:
            prepared = (step, self._thread.submit(self.prepare, step))
        batch = prepared[1].result()
        self._next = (step + 1, self._thread.submit(self.prepare, step + 1))
        return batch

    def receive_from(self, receiver: BatchReceiver) -> None:
        """Take the batches of consecutive steps from worker processes; those of other steps are prepared here."""
        self._receiver = receiver

    def close(self) -> None:
        """Wait for the batch under preparation and end the thread; the workers may end."""
        if self._receiver is not None:
            self._receiver.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def prepare(self, step: int) -> Batch:
        """This rank's batch of optimizer step `step`, made by the caller."""
        rows = self._sampler.rows_of_step(step)
        own = rows[self._share]
        batch = self.build(self._records, own, step)
        if len(self._names) == 1:
            return batch
        counts = Counter(self._names[self._records.file_of(row)] for row in rows)
        return replace(batch, set_rows=counts, data_set=next(iter(counts)) if len(counts) == 1 else None)

    def build(self, records: RecordSet, rows: Sequence[int], step: int) -> Batch:
        """The batch of some rows, made as that of a step.

        Raises:
            DataError: a row cannot be read.
        """
        try:
            batch_records = [records[row] for row in rows]
        except OSError as error:  # a disk that fails during the run; the loop tells the other ranks of a UserError
            raise DataError(f"data.train: a row of step {step + 1} cannot be read ({error.strerror or error}); look at "
                            "the disk, then start the run again") from error
        files = [records.files[records.file_of(row)].file for row in rows]
        return replace(self.batch_of(batch_records, rows, files, step), row_ids=torch.tensor(rows, dtype=torch.int64))


class BatchLoader(StepLoader[EmbedBatch]):
    """Batches of an embedding model.

    Args:
        records: all training rows.
        sampler: over the same records.
        tokenizer: that of the model in training.
        packing: how rows are packed; with a token budget, ranks' numbers of micro-batches differ.
        documents: positives and hard negatives per query, limited here to the most that any row has; `most_positives`
            is counted here.
        dp_rank, dp_size: this rank's index on the data-parallel axis, and the ranks on it.
        validation: further records that `build` is given, if any: capacities count their documents too.

    Raises:
        ConfigError: the batch sizes do not divide, or an instruction is missing or too long.
    """

    def __init__(self, records: RecordSet, sampler: Sampler, tokenizer: RoleTokenizer, packing: PackingSpec,
                 documents: DocumentsPerQuery, *, dp_rank: int, dp_size: int,
                 validation: RecordSet | None = None) -> None:
        if packing.micro_batch_tokens is None:
            micro_batches_per_step(sampler.global_batch_size, packing.micro_batch_size, dp_size)
        check_prompts(records, tokenizer)
        super().__init__(records, sampler, dp_rank=dp_rank, dp_size=dp_size)
        self._tokenizer = tokenizer
        self._packing = packing
        # Capacities never exceed the documents that exist. All ranks read the same rows.
        sets = [records] if validation is None else [records, validation]
        most_positives = max(part.most_positives for part in sets)
        self._documents = replace(
            documents, positives=min(documents.positives, most_positives), most_positives=most_positives,
            negatives=min(documents.negatives, max(part.most_negatives for part in sets)))
        self._all_in_batch = all(source.file.in_batch_negatives for part in sets for source in part.files)

    def batch_of(self, records: Sequence[Any], rows: Sequence[int], files: Sequence[TrainFile],
                 step: int) -> EmbedBatch:
        if (seed := self._documents.seed) is not None:
            records = [sampled_documents(record, (seed, step, row)) for record, row in zip(records, rows, strict=True)]
        in_batch = None if self._all_in_batch else torch.tensor([file.in_batch_negatives for file in files])
        return build_embed_batch(records, self._tokenizer, self._packing, self._documents, in_batch=in_batch)


class RerankLoader(StepLoader[RerankBatch]):
    """Batches of a reranker. A row's negatives are sampled again each time, from seed, step and row alone.

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
