"""From a run's last checkpoint to a directory that the stock libraries load, compared before it gets its name."""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from megatron_embed.cli.model import ModelDirectory
from megatron_embed.config.json_file import read_json_file
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.convert import megatron_to_hf
from megatron_embed.convert.export import export_sentence_transformers
from megatron_embed.convert.layout import open_checkpoint
from megatron_embed.convert.verify import compare_with_sentence_transformers
from megatron_embed.data.prompts import Role, fill_template
from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.models.families import ModelShape
from megatron_embed.parallel.collectives import raise_first

logger = logging.getLogger(__name__)

MINIMUM_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
"""Between the exported model in the stock library and ours in memory, for every text."""

PROBES = {
    "en": ("What is the capital of France?", "A short text.",
           "Gradient checkpointing trades computation for memory: activations are dropped in the forward pass and "
           "computed again when the backward pass needs them, so that longer sequences or larger batches fit on the "
           "same device."),
    "zh": ("深度学习是什么？", "向量检索把文本变成向量，再按相似度排序。"),
    "code": ("def mean(values):\n    return sum(values) / len(values)",
             "SELECT name FROM users WHERE age > 30 ORDER BY name;"),
}
"""Texts of several scripts and lengths on which an exported checkpoint is compared."""


def stock_runs_causally(shape: ModelShape, bidirectional: bool = False) -> bool:
    """Whether the installed Transformers would run the model as another one: up to 5.1 it knows decoders with causal
    attention alone; then it reads `is_causal` of config.json."""
    old = tuple(map(int, version("transformers").split(".")[:2])) < (5, 2)
    return old and (shape.bidirectional or bidirectional) and shape.rotary_base is not None


def write_settings(hf: Path, config: RunConfig, model: ModelDirectory) -> None:
    """Sentence Transformers files beside a checkpoint's configuration, as this run pools, normalizes and prompts: with
    `embedding.instruction` in its place, since that library takes a prompt as it stands."""
    pooling, unit_length, saved = model.pooling(config.embedding.pooling), config.embedding.unit_length, model.saved
    roles: tuple[Role, ...] = ("query", "document")
    lengths = {role: config.data.max_length(role) for role in roles}
    export_sentence_transformers(
        hf, pooling=pooling, normalize=unit_length, needs_eos=pooling == "lasttoken" and saved.chat is None,
        query_prompt=fill_template(config.data.prompt("query"), config.embedding.instruction),
        document_prompt=config.data.prompt("document"), max_seq_length=max(lengths.values()),
        embedding_dimension=model.shape.hidden_size, saved=dataclasses.replace(
            saved, truncation_side="right", similarity=saved.similarity if unit_length else "dot",
            role_lengths=dict(lengths) if saved.role_lengths else {}))
    facts: dict[str, object] = {}
    if config.model.bidirectional and not model.shape.bidirectional:
        facts["is_causal"] = False
    if config.embedding.matryoshka_dims:
        facts["matryoshka_dimensions"] = sorted(config.embedding.matryoshka_dims)  # what vLLM lets a request ask for
    if facts:
        file = hf / "config.json"
        values = {**read_json_file(file), **facts}
        file.write_text(json.dumps(values, indent=2), encoding="utf-8")


def export_model(checkpoint: str, destination: str, encoder: TextEncoder, texts: Sequence[str], dtype: str,
                 note: Callable[[Path], None]) -> None:
    """Writes `destination` from a checkpoint, of a run from the newest, if Sentence Transformers gives the vectors of
    the model in memory.

    Called by all ranks; every rank raises what rank 0 met. `note` is called on rank 0, with the directory, when nothing
    is left to do but to give the export its name.

    Raises:
        CheckpointError: the export differs from the model, or cannot be written; nothing is left behind.
    """
    roles: tuple[Role, ...] = ("query", "document")
    vectors = {role: encoder.encode(texts, role) for role in roles}

    def compare(directory: Path) -> None:
        for role in roles:
            report = compare_with_sentence_transformers(directory, texts, vectors[role], prompt_name=role,
                                                        minimum_cosine=MINIMUM_COSINE[dtype])
            logger.info("%s vectors: %s", role, report)
        note(directory)

    error: UserError | None = None
    if dist.get_rank() == 0:
        try:
            merge = open_checkpoint(checkpoint).info.adapters is not None
            logger.info("exported %s", megatron_to_hf(checkpoint, destination, merge_lora=merge, finish=compare))
        except UserError as found:
            error = found
        except OSError as found:
            error = CheckpointError(f"{destination}: the export cannot be written ({found.strerror or found}); look at "
                                    "the disk, then start the run again: it goes on from its checkpoint")
    raise_first(error)
