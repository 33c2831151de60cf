"""A model as a joint one: with the heads that its directory has, or with new ones."""

import dataclasses
from typing import TYPE_CHECKING

from megatron_embed.config.schema import EmbeddingConfig
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.errors import ConfigError
from megatron_embed.models.joint_files import VECTORS_FILE, WEIGHTS_FILE, find_joint_heads
from megatron_embed.names import JOINT_POOLINGS, ModelPooling, Pooling

if TYPE_CHECKING:
    from megatron_embed.loading.model_directory import ModelDirectory


def with_joint_heads(model: "ModelDirectory", config: EmbeddingConfig,
                     score_weights: tuple[float, ...] | None = None) -> "ModelDirectory":
    """The same model with joint heads.

    Args:
        config: of the run.
        score_weights: of the scores in their sum; None: the directory's own, else BGE-M3's.
    Raises:
        ConfigError: the model has what a joint one has not, or heads of another size.
        CheckpointError: its heads cannot be read.
    """
    key, saved, wanted = "embedding.head", model.saved, config.embedding_dim
    heads = find_joint_heads(model.hf)
    own = None if heads is None else heads.dim
    others = {"Dense modules": bool(saved.dense), "a vector for every token": saved.vectors is not None,
              "sparse vectors": saved.sparse, "a chat template around every text": saved.chat is not None,
              "adapters": model.adapters is not None}
    for what, has in others.items():
        if has:
            raise ConfigError(f"{key} = 'joint': {model.path} has {what}, and a joint model has not; take a model "
                              "without", key=key)
    if own is not None and wanted not in (None, own):
        raise ConfigError(f"embedding.embedding_dim = {wanted}: the model's own heads give vectors of {own} numbers; "
                          "remove the setting", key="embedding.embedding_dim")
    weights = score_weights or (JointFormat.score_weights if heads is None else heads.score_weights)
    hidden = model.shape.hidden_size
    return dataclasses.replace(model, joint=JointFormat(hidden_size=hidden, token_dim=wanted or own or hidden,
                                                        score_weights=weights))


def joint_pooling(own: Pooling) -> ModelPooling:
    """The pooling of a joint model, by that of its texts' vectors. Raises ConfigError if these cannot have it."""
    if own not in JOINT_POOLINGS:
        raise ConfigError(f"embedding.pooling = {own!r}: a joint model's texts are pooled by "
                          f"{', '.join(JOINT_POOLINGS)}; set one of them", key="embedding.pooling")
    return JOINT_POOLINGS[own]


def as_joint_model(model: "ModelDirectory", key: str, *, normalize: bool) -> "ModelDirectory":
    """A model that has joint heads, with them.

    Raises:
        ConfigError: it has none, beginning with the option `key`; or its vectors are to keep their length.
    """
    if not normalize:
        raise ConfigError("--no-normalize: vectors of joint heads always have unit length; leave it out, or --head",
                          key="--no-normalize")
    if find_joint_heads(model.hf) is None:
        raise ConfigError(f"{key} {model.path}: has no joint heads ({VECTORS_FILE} and {WEIGHTS_FILE}); leave out "
                          "--head, or give a model that was trained with embedding.head: joint", key="--head")
    return with_joint_heads(model, EmbeddingConfig(head="joint"))
