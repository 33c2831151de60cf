"""Megatron-style distributed training of text embedding models and rerankers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_embed.api import Embedder, Reranker

__version__ = "0.1.0"


def load(directory: str, *, pooling: str | None = None, max_length: int | None = None, dtype: str | None = None,
         normalize: bool = True) -> "Embedder | Reranker":
    """A model in this process: `load(DIR).encode(texts, role="query")`, or `.rerank(query, documents)` of a reranker.

    The libraries are loaded here, not with the package. Under torchrun every rank loads and calls alike.

    Args:
        directory: Hugging Face or Sentence Transformers directory, one of our checkpoints, or a hub name.
        pooling: None: the model's own setting, else lasttoken.
        max_length: longest text in tokens, special tokens included; None: the model's own setting.
        dtype: computation dtype: auto, float32 or bfloat16; None: the model's own setting, else float32. auto:
            bfloat16 where the GPU or processor has instructions for it, else float32.
        normalize: unit vectors, unless the directory says otherwise; False: as the pooling gives them.
    Raises:
        UserError: the model does not exist, or cannot do that.
    """
    from megatron_embed.api import open_any

    return open_any(directory, pooling=pooling, max_length=max_length, dtype=dtype, normalize=normalize)
