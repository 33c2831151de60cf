"""Dense modules between pooling and the finished vector: their settings, as a model directory or a run names them.

Imports neither torch nor Megatron.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_embed.config.schema import EmbeddingConfig
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.model_shape import ModelShape
from megatron_embed.names import JOINT_POOLINGS, DenseActivation, ModelPooling

WIDE = 1024
"""Outputs from which on a Dense module is divided over the tensor-parallel ranks."""
TOKEN_VECTOR_DIM = 128
"""Numbers of a token's vector in a new multi-vector model, as in ColBERT."""
LARGEST_FEATURES = 2**20
"""Upper bound of a Dense module's inputs and outputs."""
ACTIVATION_CLASSES: Mapping[str, DenseActivation] = {
    "torch.nn.modules.linear.Identity": "identity", "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu", "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.SiLU": "silu", "torch.nn.modules.activation.Sigmoid": "sigmoid"}
"""Classes that Sentence Transformers writes as `activation_function` -> our names."""


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """A linear layer over pooled vectors, then an activation."""

    in_features: int
    out_features: int
    bias: bool
    activation: DenseActivation
    normalize_input: bool = False
    """A Normalize module stands before it: its inputs are scaled to unit length."""
    path: str = ""
    """Name of its folder in a model directory; empty: it has none yet."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors, by our names."""
        bias = {"bias": (self.out_features,)} if self.bias else {}
        return {"weight": (self.out_features, self.in_features), **bias}

    def shards(self, tp_size: int) -> int:
        """Tensor-parallel ranks that its outputs are divided over; 1: every rank holds the whole."""
        return tp_size if self.out_features >= WIDE and self.out_features % tp_size == 0 else 1


def is_joint(pooling: ModelPooling) -> bool:
    """Whether it is a joint model's."""
    return pooling in JOINT_POOLINGS.values()


def joint_projection(joint: JointFormat) -> DenseSettings:
    """The layer that gives the vectors of a joint model's tokens, and their weights in its last row."""
    return DenseSettings(in_features=joint.hidden_size, out_features=joint.token_dim + 1, bias=True,
                         activation="identity")


def pooled_width(shape: ModelShape, pooling: ModelPooling) -> int:
    """Numbers of a pooled vector, or of a token's: one state of a token, or several in a row; of a sparse one, the
    vocabulary's."""
    if pooling == "splade":
        return shape.vocab_size
    return shape.hidden_size * (1 if is_joint(pooling) else len(pooling.split("+")))


def dense_of_run(config: EmbeddingConfig, own: Sequence[DenseSettings], shape: ModelShape,
                 pooling: ModelPooling, *, new_vectors: bool = False) -> tuple[DenseSettings, ...]:
    """The Dense modules of a run: those of the model's directory, or a new one if `embedding.embedding_dim` is set or
    the run makes a multi-vector model of another one.

    Args:
        own: those of the directory.
        pooling: the run's.
        new_vectors: the directory's model gives no vectors of tokens, and the run's does.
    Raises:
        ConfigError: `embedding.embedding_dim`, or the pooling, does not go with those of the directory.
    """
    if pooling == "splade":
        return ()
    width, wanted = pooled_width(shape, pooling), config.embedding_dim
    if is_joint(pooling):
        return (joint_projection(JointFormat(hidden_size=width, token_dim=wanted or width)),)
    if not own:
        if wanted is None and new_vectors:
            wanted = TOKEN_VECTOR_DIM
        if wanted is None:
            return ()
        return (DenseSettings(in_features=width, out_features=wanted, bias=False, activation="identity"),)
    if own[0].in_features != width:
        raise ConfigError(f"embedding.pooling = {pooling!r} gives vectors of {width} numbers, and the model's module "
                          f"{own[0].path} takes in_features = {own[0].in_features}; leave the pooling to the model's "
                          "own setting, or correct the module's config.json", key="embedding.pooling")
    if wanted not in (None, own[-1].out_features):
        raise ConfigError(f"embedding.embedding_dim = {wanted}: the model's own Dense modules give "
                          f"{own[-1].out_features} numbers; remove the setting, or begin from a model without them",
                          key="embedding.embedding_dim")
    return tuple(own)


def embedding_width(dense: Sequence[DenseSettings], shape: ModelShape, pooling: ModelPooling) -> int:
    """Numbers of a vector behind these Dense modules; of a joint model's row, whose tokens have an id besides."""
    if is_joint(pooling):
        return dense[-1].out_features + 1
    return dense[-1].out_features if dense else pooled_width(shape, pooling)


def check_chain(folder: object, dense: Sequence[DenseSettings]) -> None:
    """Raises CheckpointError if a module takes other vectors than the one before it gives."""
    for first, second in itertools.pairwise(dense):
        if first.out_features != second.in_features:
            raise CheckpointError(f"{folder}: {second.path} has in_features = {second.in_features}, and {first.path}, "
                                  f"before it, out_features = {first.out_features}; correct modules.json or their "
                                  "config.json")
