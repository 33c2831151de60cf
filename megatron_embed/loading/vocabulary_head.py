"""Weights of a sparse model's vocabulary head, from a model directory or new."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.convert.checkpoint_directory import PassthroughFile, open_checkpoint, open_passthrough
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.vocabulary_tensors import vocabulary_names
from megatron_embed.errors import ConfigError
from megatron_embed.models.families import ModelShape
from megatron_embed.models.vocabulary_head import VocabularyHead, initialize_vocabulary_head
from megatron_embed.models.vocabulary_shape import MASKED_LM, check_family

logger = logging.getLogger(__name__)


def passthrough_tensors(hf: Path, checkpoint: Path | None) -> HFDirectory | PassthroughFile:
    """The tensors of a directory that no layer of ours uses; to be closed.

    Args:
        hf: the Hugging Face directory.
        checkpoint: the checkpoint of ours whose it is; None: it is one of its own.
    """
    return HFDirectory(hf) if checkpoint is None else open_passthrough(open_checkpoint(checkpoint))


def check_sparse(shape: ModelShape, name: str, *, adapters: object, chat: object) -> None:
    """Raises ConfigError for a model that cannot give sparse vectors.

    Args:
        name: its directory, for messages.
        adapters: those that it has, or None.
        chat: the chat template that it puts every text into, or None.
    """
    check_family(shape)
    if adapters is not None:
        raise ConfigError(f"embedding.head = 'sparse': {name} has adapters, which leave the vocabulary head as it is, "
                          "and it has to be trained; merge them first", key="embedding.head")
    if chat is not None:
        raise ConfigError(f"embedding.head = 'sparse': {name} puts every text into a chat template; take a model "
                          "without one", key="embedding.head")


def load_vocabulary_head(head: torch.nn.Module | None, hf: Path, checkpoint: Path | None, shape: ModelShape,
                         seed: int) -> None:
    """Fill the head from the directory's tensors, or make a new one. Called by all ranks.

    Args:
        head: on the last stage; None elsewhere.

    Raises:
        ConfigError: a decoder without a language-model head, on every rank alike.
    """
    names = {ours: name for ours, name in vocabulary_names(shape.family).items()
             if ours != "weight" or not shape.tie_word_embeddings}
    with passthrough_tensors(hf, checkpoint) as source:
        stored = {ours: name for ours, name in names.items() if name in source.passthrough}
        if shape.family not in MASKED_LM and names and not stored:
            raise ConfigError(f"embedding.head = 'sparse': {hf} has no {names['weight']}, and its word embeddings are "
                              "not tied to one; take a model with a language-model head", key="embedding.head")
        if shape.family in MASKED_LM and not {"dense.weight", "norm.weight", "bias"} <= set(stored):
            logger.info("%s has no masked-language-model head: the vocabulary head begins with new weights, over the "
                        "model's own word embeddings", checkpoint or hf)
            stored = {}
        if head is None:
            return
        assert isinstance(head, VocabularyHead)
        if names and not stored:
            initialize_vocabulary_head(head, seed, shape.initializer_range)
        with torch.no_grad():
            for ours, name in stored.items():
                parameter = head.get_parameter(ours)
                parameter.copy_(_own_share(head, ours, source, name, parameter))


def _own_share(head: VocabularyHead, ours: str, source: HFDirectory | PassthroughFile, name: str,
               parameter: Tensor) -> Tensor:
    """A tensor of the head, or this rank's share of the vocabulary, 0 where that is padded."""
    if ours not in ("weight", "bias"):
        return source.read(name)
    first = head.topology.tp_rank * head.rows
    values = torch.zeros(parameter.shape)
    values[: head.own_rows] = source.read_slice(name, 0, first, first + head.own_rows)
    return values
