"""Tensors of a reranker's head: their names and shapes. Imports neither torch nor Megatron."""

from megatron_embed.models.model_shape import ModelShape
from megatron_embed.names import HeadKind


def reranker_head_shapes(kind: HeadKind, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's tensors by our names; none of a yes_no head that is tied to the word embeddings."""
    hidden = shape.hidden_size
    if kind == "yes_no":
        return {} if shape.tie_word_embeddings else {"weight": (2, hidden)}
    own = shape.classifier
    if own is None:
        return {"weight": (1, hidden)}
    shapes: dict[str, tuple[int, ...]] = {"weight": (1, hidden), "bias": (1,), "dense.weight": (hidden, hidden)}
    if own.dense_bias:
        shapes["dense.bias"] = (hidden,)
    if own.norm:
        shapes |= {"norm.weight": (hidden,), **({"norm.bias": (hidden,)} if shape.norm_bias else {})}
    return shapes
