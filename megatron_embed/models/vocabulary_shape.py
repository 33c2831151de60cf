"""Which models have a vocabulary head, for sparse vectors, and the sizes of it. Imports neither torch nor Megatron."""

from megatron_embed.errors import ConfigError
from megatron_embed.models.model_shape import ModelShape

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
    return -(-vocab_size // tp_size) * tp_size


def vocabulary_head_parameters(shape: ModelShape, tp_size: int) -> int:
    """Parameters of the head on a tensor-parallel rank of the last stage."""
    rows, hidden, count = padded_vocabulary(shape.vocab_size, tp_size) // tp_size, shape.hidden_size, 0
    if shape.family in MASKED_LM:
        dense_bias = shape.classifier is None or shape.classifier.dense_bias or shape.family != "modernbert"
        count = hidden * (hidden + dense_bias + 1 + shape.norm_bias) + rows
    return count if shape.tie_word_embeddings else count + rows * hidden
