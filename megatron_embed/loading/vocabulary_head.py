"""Weights of a sparse model's vocabulary head, from a model directory or new."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.checkpoint.safe_unpickler import HEAD_KEYS
from megatron_embed.convert.checkpoint_directory import PassthroughFile, open_checkpoint, open_passthrough
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.to_hf import WORD_EMBEDDINGS
from megatron_embed.convert.vocabulary_tensors import check_vocabulary_head, stored_vocabulary_head, vocabulary_names
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.families import ModelShape
from megatron_embed.models.vocabulary_head import VocabularyHead, initialize_vocabulary_head
from megatron_embed.models.vocabulary_shape import check_family, vocabulary_head_shapes

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


def holds_vocabulary_head(checkpoint: Path, shape: ModelShape) -> bool:
    """Whether a checkpoint's tensors include a trained head. Raises CheckpointError if it is another model's."""
    with DcpReader(checkpoint / "model") as reader:
        sizes = {key.removeprefix(HEAD_KEYS): reader.shape(key) for key in reader.keys()  # noqa: SIM118
                 if key.startswith(HEAD_KEYS)}
    if sizes:
        check_vocabulary_head(sizes, shape, checkpoint)
    return bool(sizes)


def load_vocabulary_head(head: torch.nn.Module | None, hf: Path, checkpoint: Path | None, shape: ModelShape,
                         *, new_weights: bool) -> None:
    """Fill the head from the directory's tensors. Called by all ranks.

    Args:
        head: on the last stage; None elsewhere.
        new_weights: an encoder may lack some of them, which are new then; the log names them.
    Raises:
        CheckpointError, ConfigError: a tensor is missing, or is none of this model's head, on every rank alike.
    """
    path, names = str(checkpoint or hf), vocabulary_names(shape)
    with passthrough_tensors(hf, checkpoint) as source:
        stored = stored_vocabulary_head(source, shape, path)
        missing = [name for name in vocabulary_head_shapes(shape) if name not in stored]
        if "weight" in missing:
            raise ConfigError(f"embedding.head = 'sparse': {hf} has no {names['weight']}, and its word embeddings are "
                              "not tied to one; take a model with a language-model head", key="embedding.head")
        if missing:
            require_new_weights(path, [names[name] for name in missing], "masked-language-model head", new_weights)
        if head is None:
            return
        assert isinstance(head, VocabularyHead)
        if missing:
            length = _word_embeddings(source, checkpoint, shape).float().norm(dim=1).mean()
            initialize_vocabulary_head(head, missing, float(length))
        with torch.no_grad():
            for ours, name in stored.items():
                parameter = head.get_parameter(ours)
                parameter.copy_(_own_share(head, ours, source, name, parameter))


def _word_embeddings(source: HFDirectory | PassthroughFile, checkpoint: Path | None, shape: ModelShape) -> Tensor:
    """[vocabulary, hidden] of a model with a masked-language-model head; arguments as above."""
    if isinstance(source, HFDirectory):
        return source.read(dict(rules_for(shape.family).tied)[vocabulary_names(shape)["weight"]])
    assert checkpoint is not None
    with DcpReader(checkpoint / "model") as reader:
        return reader.read(rules_for(shape.family).checkpoint_key(WORD_EMBEDDINGS)[0])[: shape.vocab_size]


def require_new_weights(path: str, names: Sequence[str], what: str, new_weights: bool) -> None:
    """Log the tensors that a training run begins with as new ones.

    Args:
        path: the directory that lacks them.
        names: as Transformers names them.
        what: the part of the model to which they belong.
        new_weights: the model is to be trained.
    Raises:
        CheckpointError: it is to be used as it is.
    """
    listed = ", ".join(names)
    if not new_weights:
        raise CheckpointError(f"{path}: its weights have no {listed}, which its {what} needs: results would come from "
                              "random numbers; fetch all weight files again, or train the model first")
    logger.info("%s has no %s: new weights take their place in its %s", path, listed, what)


def _own_share(head: VocabularyHead, ours: str, source: HFDirectory | PassthroughFile, name: str,
               parameter: Tensor) -> Tensor:
    """A tensor of the head, or this rank's share of the vocabulary, 0 where that is padded."""
    if ours not in ("weight", "bias"):
        return source.read(name)
    first = head.topology.tp_rank * head.rows
    values = torch.zeros(parameter.shape)
    values[: head.own_rows] = source.read_slice(name, 0, first, first + head.own_rows)
    return values
