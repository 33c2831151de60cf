"""Models to serve that need no weights: vectors and scores of shared character trigrams."""

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from megatron_embed.serving.models import Embeddings, Scores, ServedEmbedder, ServedReranker


def trigram_vectors(texts: Sequence[str], dim: int, seed: int) -> np.ndarray:
    """[texts, dim] float32 of unit length; texts with trigrams in common are similar."""
    vectors = np.zeros((len(texts), dim), dtype=np.float32)
    for row, text in enumerate(texts):
        padded = f" {text.lower()} "
        for start in range(len(padded) - 2):
            digest = hashlib.blake2b(padded[start:start + 3].encode(), digest_size=8, salt=bytes([seed])).digest()
            vectors[row, int.from_bytes(digest[:4], "little") % dim] += 1 if digest[4] & 1 else -1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


class TrigramEmbedder(ServedEmbedder):
    """An embedding model of any width. A token is a word, and two stand around the text."""

    def __init__(self, name: str, dim: int, seed: int, *, similarity: str = "cosine") -> None:
        self.name, self.dim, self.similarity, self.max_length, self._seed = name, dim, similarity, 32, seed
        self._tokenizer = SimpleNamespace(
            max_length=lambda role: 16 if role == "query" else 32,
            count_tokens=lambda texts, role: [len(text.split()) + 2 for text in texts])

    async def encode(self, queue, texts, role="document", *, dimensions=None, normalize=None, truncate=True):
        vectors = trigram_vectors(texts, self.dim, self._seed)
        return Embeddings(vectors=vectors, tokens=[len(text.split()) + 2 for text in texts])


class TrigramReranker(ServedReranker):
    """A reranker: the cosine of other trigram vectors."""

    def __init__(self, name: str) -> None:
        self.name, self.max_length = name, 64

    async def rerank(self, queue, query, documents, *, instruction=None, truncate=True):
        vectors = trigram_vectors([query, *documents], 512, 99)
        scores = vectors[1:] @ vectors[0]
        return Scores(scores=scores, raw=scores, tokens=[1] * len(documents))
