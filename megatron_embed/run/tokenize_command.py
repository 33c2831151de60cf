"""`data tokenize`: the token ids of a run's rows, written before the run."""

import time

from megatron_embed.config.schema import RunConfig
from megatron_embed.data.dataset import open_records
from megatron_embed.data.loader import check_prompts
from megatron_embed.data.tokenize import tokenize_rows
from megatron_embed.errors import ConfigError
from megatron_embed.loading.model_directory import find_model
from megatron_embed.run.embedding_task import EmbeddingTask, open_tokenizer, settings_of_tokens


def tokenize(config: RunConfig) -> str:
    """Write `data.token_cache`. Returns a line that says what it holds.

    Raises:
        UserError: a row cannot be used, or the directory cannot be written.
    """
    directory, start = config.data.token_cache, time.monotonic()
    if directory is None:
        raise ConfigError("data.token_cache: names no directory to write the token ids to; write data.token_cache=DIR "
                          "behind the configuration, and set it in the run's", key="data.token_cache")
    task = EmbeddingTask(config, find_model(config.model.path), None)
    tokenizer = open_tokenizer(task.config, task.model)
    records = open_records(task.config.data.files, task.config.objective.rows, task.index_place)
    check_prompts(records, tokenizer)
    texts, tokens = tokenize_rows(records, tokenizer, directory, settings_of_tokens(task.config, tokenizer, records))
    return (f"{directory}: {len(records):,} rows, {texts:,} different texts, {tokens:,} tokens, in "
            f"{time.monotonic() - start:.1f} s")
