"""From a checkpoint to a directory that the stock libraries load, compared with the model before it gets its name."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_embed.cli.model import ModelDirectory
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.convert import megatron_to_hf
from megatron_embed.convert.export import export_sentence_transformers
from megatron_embed.convert.verify import compare_with_sentence_transformers
from megatron_embed.data.prompts import Role
from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.evaluation.encode import TextEncoder

logger = logging.getLogger(__name__)

MINIMUM_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
"""Between the exported model in Sentence Transformers and ours in memory, for every text."""


def write_settings(hf: Path, config: RunConfig, model: ModelDirectory) -> None:
    """Sentence Transformers files beside a checkpoint's configuration, as this run pools, normalizes and prompts."""
    export_sentence_transformers(
        hf, pooling=model.pooling(config.embedding.pooling), normalize=config.embedding.normalize,
        query_prompt=config.data.query_prompt, document_prompt=config.data.document_prompt,
        max_seq_length=max(config.data.query_max_length, config.data.document_max_length),
        embedding_dimension=model.shape.hidden_size)


def export_model(checkpoint: str, destination: str, encoder: TextEncoder, texts: Sequence[str], dtype: str) -> None:
    """Writes `destination` from the newest checkpoint, if Sentence Transformers gives the vectors of the model in memory.

    Called by all ranks; every rank raises what rank 0 met.

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

    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            logger.info("exported %s", megatron_to_hf(checkpoint, destination, finish=compare))
        except UserError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])
