"""`data check` with a model: counts of a run's rows, and the lengths of what its model reads of them."""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain

from megatron_embed.config.schema import RunConfig
from megatron_embed.data.check import PAIRS, Counts, check_records
from megatron_embed.data.columns import COLUMNS_OPTION, COLUMNS_SETTING
from megatron_embed.data.dataset import open_records
from megatron_embed.data.loader import check_prompts
from megatron_embed.data.pair_batches import pairs_of, sample_negatives
from megatron_embed.data.records import ANY_NUMBER, AnyRecord, RerankRecord, as_kind, documents_in_use
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.loading.model_directory import ModelDirectory, find_model
from megatron_embed.run.embedding_task import ROLES, open_tokenizer
from megatron_embed.run.inherit import inherited
from megatron_embed.run.rerank_task import RerankTask

logger = logging.getLogger(__name__)


class _Texts:
    """Lengths of the texts that an embedding model reads, by role.

    Args:
        used: negatives and positives of a row that training uses.
    """

    def __init__(self, tokenizer: RoleTokenizer, limits: Mapping[str, int], used: tuple[int, int]) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._used = used

    def lengths(self, rows: Sequence[AnyRecord]) -> dict[str, list[int]]:
        documents = [(text, record.document_prompt) for record in rows for text in documents_in_use(
            record, *self._used)]
        queries = self._tokenizer.count_tokens([record.query for record in rows], "query", [
            record.instruction for record in rows], [record.query_prompt for record in rows])
        return {"query tokens": queries, "document tokens": self._tokenizer.count_tokens(
            [text for text, _ in documents], "document", prompts=[prompt for _, prompt in documents])}


class _Pairs:
    """Lengths of the pairs that a reranker reads."""

    def __init__(self, task: RerankTask) -> None:
        self._tokenizer = task.open_tokenizer()
        self._num_negatives = 0 if task.samples_documents else task.config.data.num_negatives
        self.limits = {PAIRS: self._tokenizer.max_length}

    def lengths(self, rows: Sequence[AnyRecord]) -> dict[str, list[int]]:
        pairs = []
        for row in rows:
            record = as_kind(row, "rerank")
            assert isinstance(record, RerankRecord)
            pairs.append(pairs_of(sample_negatives(record, self._num_negatives, None)))
        self._tokenizer.check_query_length([of_row[0] for of_row in pairs], strict=True)
        return {PAIRS: self._tokenizer.count_tokens(list(chain.from_iterable(pairs)))}


def check_with_model(config: RunConfig, *, is_run: bool) -> list[Counts]:
    """Counts of each entry, those of tokens included.

    Args:
        is_run: whether the configuration is that of a run; otherwise it was made from a command's options.
    Raises:
        UserError: a row, or the model's tokenizer, cannot be used.
    """
    model = find_model(config.model.path)
    records = open_records(config.data.files, kind=None, columns_key=COLUMNS_SETTING if is_run else COLUMNS_OPTION)
    samples, counter = config.data.samples_documents, None
    if config.workload.rows == "rerank":
        counter = _Pairs(RerankTask(config, model, None))
    else:
        config = inherited(config, model)
        tokenizer = open_tokenizer(config, model)
        check_prompts(records, tokenizer)
        negatives = config.data.num_negatives if is_run and not samples else ANY_NUMBER
        counter = _Texts(tokenizer, _limits(config, model, is_run), (negatives, config.data.num_positives))
    return check_records(records, num_negatives=config.data.num_negatives if is_run and not samples else 0,
                         counter=counter)


def _limits(config: RunConfig, model: ModelDirectory, is_run: bool) -> dict[str, int]:
    """Tokens to which texts are truncated: at most the model's positions, with a warning where more are asked for."""
    positions = model.shape.longest_text
    asked = {role: config.data.max_length(role) for role in ROLES}
    for role, length in asked.items():
        if length > positions and (is_run or role == "query"):
            key, refused = (f"data.{role}_max_length", "which training refuses") if is_run else ("--max-length", "")
            logger.warning("%s = %d is longer than the model's %d positions%s; lengths are compared with these", key,
                           length, positions, refused and f", {refused}")
    return {f"{role} tokens": min(length, positions) for role, length in asked.items()}
