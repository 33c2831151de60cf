"""Weights of Dense modules, from a model directory or new."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_embed.checkpoint.load import keys_of
from megatron_embed.checkpoint.safe_unpickler import DENSE_KEYS
from megatron_embed.convert.dense_tensors import open_dense, read_dense
from megatron_embed.errors import CheckpointError
from megatron_embed.models.dense import initialize_dense
from megatron_embed.models.dense_settings import DenseSettings
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.models.joint_files import (
    SETTINGS_FILE,
    VECTORS_FILE,
    WEIGHTS_FILE,
    find_joint_heads,
    read_joint_heads,
)

if TYPE_CHECKING:
    from megatron_embed.loading.model_directory import ModelDirectory

logger = logging.getLogger(__name__)


def holds_dense_weights(model: "ModelDirectory", dense: Sequence[DenseSettings]) -> bool:
    """Whether the weights of these Dense modules are among the checkpoint's tensors, not in the model's directory.

    Those of a joint model are not these modules, unless the model is used as one.
    """
    if model.joint is None and (model.hf / SETTINGS_FILE).is_file():
        return False
    return (model.checkpoint is not None and bool(dense) and model.dense_directory == model.root
            and any(key.startswith(DENSE_KEYS) for key in keys_of(model.checkpoint)))


def load_dense_weights(model: "ModelDirectory", chunks: Sequence[EmbeddingModel], seed: int,
                       dense: Sequence[DenseSettings]) -> None:
    """Dense modules of the model's directory, or those that a run adds, which the log names."""
    if model.joint is not None:
        _load_joint_heads(model, chunks, seed)
        return
    if model.saved.dense:
        for settings in dense:  # on every rank, so that what does not fit is refused by all
            open_dense(model.dense_directory, settings).close()
    elif dense:
        sizes = ", ".join(f"{settings.in_features} -> {settings.out_features}" for settings in dense)
        logger.info("%s has no Dense module: the run adds one with new weights, %s", model.peft or model.path, sizes)
    modules = chunks[-1].dense
    if modules is None:
        return
    if not model.saved.dense:
        initialize_dense(modules, seed)
        return
    with torch.no_grad():
        for layer in modules.layers():
            tensors = read_dense(model.dense_directory, layer.settings)
            for name, parameter in layer.named_parameters():
                parameter.copy_(layer.own_rows(tensors[name]))


def _load_joint_heads(model: "ModelDirectory", chunks: Sequence[EmbeddingModel], seed: int) -> None:
    """The heads of a joint model's directory, or new ones."""
    assert model.joint is not None
    tensors = read_joint_heads(model.hf)
    if tensors is None:
        if find_joint_heads(model.hf) is not None:
            raise CheckpointError(f"{model.hf / VECTORS_FILE}: no such file, and {SETTINGS_FILE} beside it says that "
                                  f"the model has joint heads; fetch it and {WEIGHTS_FILE} too, or remove "
                                  f"{SETTINGS_FILE} to train new heads")
        logger.info("%s has no heads of a joint model: the run adds new ones, a weight and a vector of %d numbers for "
                    "every token", model.path, model.joint.token_dim)
    elif tensors["weight"].shape[1] != model.joint.hidden_size:
        raise CheckpointError(f"{model.hf / VECTORS_FILE}: takes {tensors['weight'].shape[1]} numbers, and the model's "
                              f"states have {model.joint.hidden_size}; take the file that belongs to the model")
    modules = chunks[-1].dense
    if modules is None:
        return
    if tensors is None:
        initialize_dense(modules, seed)
        return
    with torch.no_grad():
        for layer in modules.layers():
            for name, parameter in layer.named_parameters():
                parameter.copy_(layer.own_rows(tensors[name]))
