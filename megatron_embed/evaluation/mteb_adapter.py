"""Adapter that lets `mteb` evaluate our models (the EncoderProtocol of mteb 2)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from torch import Tensor
from torch.nn.functional import normalize

from megatron_embed.names import Role, Similarity

Encode = Callable[[list[str], Role], "np.ndarray | Tensor"]


class MtebEncoder:
    """`mteb.evaluate(MtebEncoder(megatron_embed.load(DIR).encode, name="us/model"), tasks)`

    Queries are embedded as queries, documents of a corpus as documents. All texts of tasks without these roles
    (similarity, classification, clustering) are embedded as queries, as the E5 and Qwen3 models expect.
    """

    def __init__(self, encode: Encode, *, name: str, revision: str = "local",
                 similarity: Similarity = "cosine") -> None:
        """
        Args:
            encode: texts and their role -> [texts, dim].
            name: organization/model, under which mteb stores the results.
            revision: model revision; mteb stores results by it, so another model needs another revision.
            similarity: comparison of the vectors.
        """
        self._encode, self._similarity = encode, similarity
        scoring = ScoringFunction.COSINE if similarity == "cosine" else ScoringFunction.DOT_PRODUCT
        self._meta = ModelMeta.create_empty({"name": name, "revision": revision, "similarity_fn_name": scoring,
                                             "framework": ["PyTorch"]})

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Metadata that mteb writes beside the results."""
        return self._meta

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: PromptType | None = None,
               **_: Any) -> np.ndarray:
        """Embeddings [texts, dim] float32 of all batches; task, split and batch size are ignored."""
        texts = [text for batch in inputs for text in batch["text"]]
        role: Role = "document" if prompt_type == PromptType.document else "query"
        return np.asarray(self._encode(texts, role), dtype=np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Similarity of every vector with every other, [first, second]."""
        return self._scaled(embeddings1) @ self._scaled(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Similarity of the vectors at equal positions, [pairs]."""
        return (self._scaled(embeddings1) * self._scaled(embeddings2)).sum(dim=-1)

    def _scaled(self, embeddings: Any) -> Tensor:
        """Vectors [texts, dim], L2-normalized for cosine similarity."""
        vectors = torch.atleast_2d(torch.as_tensor(embeddings)).float()
        return normalize(vectors, dim=-1) if self._similarity == "cosine" else vectors
