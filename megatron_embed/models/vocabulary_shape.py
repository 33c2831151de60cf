"""Which models have a vocabulary head, for sparse vectors, and the sizes of it. Imports neither torch nor Megatron."""

import math

from megatron_embed.errors import ConfigError
from megatron_embed.models.model_shape import ModelShape
from megatron_embed.rounding import round_up

MASKED_LM = ("bert", "roberta", "xlm-roberta", "modernbert")
"""Encoders whose masked-language-model head is known."""
CAUSAL_LM = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral")
"""Decoders whose language-model head is one linear layer without a bias."""


def check_family(shape: ModelShape) -> None:
    """Raises ConfigError for a model whose vocabulary head is not known."""
    if shape.family not in (*MASKED_LM, *CAUSAL_LM):
        raise ConfigError(f"embedding.head = 'sparse': the vocabulary head of a {shape.family} model is not supported; "
                          f"one of {', '.join((*MASKED_LM, *CAUSAL_LM))} is", key="embedding.head")


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of the word embedding: the vocabulary, rounded up to a multiple of the tensor-parallel size."""
    return round_up(vocab_size, tp_size)


def vocabulary_head_shapes(shape: ModelShape, rows: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's tensors by our names.

    Args:
        rows: of the vocabulary; None: all.
    """
    rows, hidden = shape.vocab_size if rows is None else rows, shape.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if shape.family in MASKED_LM:
        has_bias = {"dense.bias": shape.family != "modernbert" or shape.classifier is None
                    or shape.classifier.dense_bias, "norm.bias": shape.norm_bias, "bias": shape.vocabulary_bias}
        sizes: dict[str, tuple[int, ...]] = {"dense.weight": (hidden, hidden), "dense.bias": (hidden,),
                                             "norm.weight": (hidden,), "norm.bias": (hidden,), "bias": (rows,)}
        shapes = {name: size for name, size in sizes.items() if has_bias.get(name, True)}
    return shapes if shape.tie_word_embeddings else {**shapes, "weight": (rows, hidden)}


def vocabulary_head_parameters(shape: ModelShape, tp_size: int) -> int:
    """Parameters of the head on a tensor-parallel rank of the last stage."""
    rows = padded_vocabulary(shape.vocab_size, tp_size) // tp_size
    return sum(math.prod(size) for size in vocabulary_head_shapes(shape, rows).values())
