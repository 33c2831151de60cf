"""Settings that a run takes from its model's directory where the configuration leaves them out."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from megatron_embed.config.data import DEFAULT_LENGTH
from megatron_embed.config.load import read_resolved
from megatron_embed.config.schema import RunConfig
from megatron_embed.config.vector_format import format_of_run, why_query_length_is_idle, with_format
from megatron_embed.loading.model_directory import ModelDirectory
from megatron_embed.models.saved_settings import trained_lengths

logger = logging.getLogger(__name__)

_DATA_KEYS = ("query_prompt", "document_prompt", "query_max_length", "document_max_length")


def inherited(config: RunConfig, model: ModelDirectory, checkpoint: Path | None = None) -> RunConfig:
    """The configuration with prompts, lengths and `normalize` of the model directory where it has none.

    Args:
        checkpoint: the newest one of a run that is resumed, which keeps what it began with.
    """
    file = None if checkpoint is None else checkpoint / "config.yaml"
    before: dict[str, Any] = {} if file is None or not file.is_file() else read_resolved(file)
    began = {**before.get("data", {}), "normalize": before.get("embedding", {}).get("normalize")}
    known = {**_of_directory(config, model), **{key: value for key, value in began.items() if value is not None}}
    data = {key: known[key] for key in _DATA_KEYS if _is_unset(config, key)}
    normalize = config.embedding.normalize
    if normalize is None:
        sparse = config.embedding.head == "sparse" or (config.embedding.head is None and model.saved.sparse)
        normalize = (bool(known["normalize"]) or config.embedding.head == "joint") and not sparse
    embedding = dataclasses.replace(config.embedding, normalize=normalize)
    if config.workload.inherits_text_settings:
        embedding = with_format(embedding, model.saved.vectors, sparse=model.saved.sparse)
        length, vectors = config.data.query_max_length, format_of_run(embedding, model.saved.vectors)
        if length is not None and (idle := why_query_length_is_idle(length, vectors)):
            logger.warning("%s", idle)
    if checkpoint is None and config.workload.inherits_text_settings:
        _log(config, model, {**{f"data.{key}": value for key, value in data.items()}, **(
            {} if config.embedding.normalize is not None else {"embedding.normalize": normalize}), **(
            {} if config.embedding.pooling is not None or embedding.head not in ("dense", "joint")
            else {"embedding.pooling": model.pooling(None)})})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data),
                               embedding=embedding)


def _is_unset(config: RunConfig, key: str) -> bool:
    data: dict[str, Any] = vars(config.data)
    return data[key] is None


def _of_directory(config: RunConfig, model: ModelDirectory) -> dict[str, Any]:
    """Values of _DATA_KEYS and `normalize` by the directory, else by default."""
    if not config.workload.inherits_text_settings:
        return {"query_prompt": "", "document_prompt": "", "query_max_length": DEFAULT_LENGTH,
                "document_max_length": DEFAULT_LENGTH, "normalize": True}
    saved = model.saved
    lengths = trained_lengths(saved, model.shape.longest_text, model.max_lengths)
    return {**{f"{role}_max_length": length for role, length in lengths.items()},
            **{f"{role}_prompt": saved.prompts.get(role, "") for role in ("query", "document")},
            "normalize": saved.trains_unit_length}


def _log(config: RunConfig, model: ModelDirectory, taken: dict[str, object]) -> None:
    if model.saved.truncation_side == "left":
        logger.info("%s says truncation_side: left; training cuts texts at their end, so that no prompt is lost, and "
                    "exports say right", model.tokenizer_directory)
    if taken:
        logger.info("not set, so as %s says or by default: %s", model.peft or model.path,
                    ", ".join(f"{key} = {value!r}" for key, value in taken.items()))
