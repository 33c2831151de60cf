"""Batches of one data-parallel rank, each prepared while the step before it computes."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from megatron_embed.batch import EmbedBatch
from megatron_embed.data.mixture import Sampler
from megatron_embed.data.packing import build_embed_batch
from megatron_embed.data.prompts import RoleTokenizer
from megatron_embed.data.records import RecordSet
from megatron_embed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def check_prompts(records: RecordSet, tokenizer: RoleTokenizer) -> None:
    """Raises ConfigError for a prompt or an instruction of the data that leaves no room, or an instruction missing."""
    for source in records.files:
        prompts = source.file.query_prompt, source.file.document_prompt
        tokenizer.check_prompts(source.instructions, *prompts)
        if set(source.instructions) != {None} and not tokenizer.takes_instructions(prompts[0]):
            logger.warning("%s: the rows carry instructions that no prompt uses: data.query_prompt has no "
                           "{instruction}", source.path)


class BatchLoader:
    """This rank's batch of any optimizer step; no communication, equal on every rank of a replica.

    Data-parallel rank r takes rows r*G/dp_size ... of the G = global_batch_size rows of the step.

    Args:
        records: all training rows.
        sampler: over the same records.
        tokenizer: of the model that is trained.
        dp_rank: this rank's place on the data axis.
        dp_size: ranks on the data axis.
        micro_batch_size: queries per rank per micro-batch; not used with a token budget.
        num_negatives: hard negatives per query.
        alignment: tokens; every micro-batch is a multiple of it.
        constant_tokens: all micro-batches of a step have one size.
        micro_batch_tokens: token budget of a micro-batch; null: none. Ranks' numbers of micro-batches then differ.
        whole_groups: under a budget, a query shares the micro-batch of its documents.

    Attributes:
        truncated_rows: rows cut to the maximum length, in the batches handed out so far.

    Raises:
        ConfigError: the batch sizes do not divide, or an instruction is missing or too long.
    """

    def __init__(self, records: RecordSet, sampler: Sampler, tokenizer: RoleTokenizer, *, dp_rank: int,
                 dp_size: int, micro_batch_size: int, num_negatives: int, alignment: int,
                 constant_tokens: bool, micro_batch_tokens: int | None = None, whole_groups: bool = False) -> None:
        group = micro_batch_size * dp_size
        total = sampler.global_batch_size
        if micro_batch_tokens is None and total % group:
            raise ConfigError(f"training.global_batch_size = {total} is not a multiple of micro_batch_size * "
                              f"data_parallel_size = {micro_batch_size} * {dp_size}; next valid: "
                              f"{-(-total // group) * group}")
        check_prompts(records, tokenizer)
        self.truncated_rows = 0
        self._records = records
        self._sampler = sampler
        self._tokenizer = tokenizer
        share = total // dp_size
        self._share = slice(dp_rank * share, (dp_rank + 1) * share)
        self._micro_batch_size = micro_batch_size
        self._num_negatives = num_negatives
        self._alignment = alignment
        self._constant_tokens = constant_tokens
        self._micro_batch_tokens = micro_batch_tokens
        self._whole_groups = whole_groups
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        self._next: tuple[int, Future[EmbedBatch]] | None = None

    def rows(self, step: int) -> list[int]:
        """The row numbers in the whole data of this rank's queries in step `step`."""
        return self._sampler.rows_of_step(step)[self._share]

    def batch(self, step: int) -> EmbedBatch:
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

    def _build(self, step: int) -> EmbedBatch:
        try:
            records = [self._records[row] for row in self.rows(step)]
        except OSError as error:  # a disk that fails under way; the loop tells the other ranks of a UserError
            raise DataError(f"data.train: a row of step {step + 1} cannot be read ({error.strerror or error}); look at "
                            "the disk, then start the run again") from error
        return build_embed_batch(
            records, self._tokenizer,
            micro_batch_size=self._micro_batch_size, num_negatives=self._num_negatives, alignment=self._alignment,
            constant_tokens=self._constant_tokens, most_positives=self._records.most_positives,
            micro_batch_tokens=self._micro_batch_tokens, whole_groups=self._whole_groups)
