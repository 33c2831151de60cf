"""What a joint model gives for texts, taken apart into what other models give."""

from torch import Tensor

from megatron_embed.batch import TextVectors
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.losses.joint import JointTexts


def text_vectors(rows: TextVectors, joint: JointFormat) -> Tensor:
    """[texts, hidden], each text's own vector."""
    return JointTexts(rows, joint.dense_rows).dense[:, : joint.hidden_size]


def token_vectors(rows: TextVectors, joint: JointFormat) -> TextVectors:
    """The tokens' vectors."""
    return JointTexts(rows, joint.dense_rows).tokens
