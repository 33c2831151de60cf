"""Vectors of texts that another model gave, looked up by the ids of the texts (`text_id`)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.evaluation.search import for_similarity
from megatron_embed.names import Similarity

Rows = Callable[[NDArray[np.int64]], Tensor]
"""[rows] indices -> [rows, dim] float32."""


class TextVectors:
    """The vectors of some texts, which stay on the disk.

    Attributes:
        dim: components of a vector.
    """

    def __init__(self, ids: NDArray[np.int64], rows: Rows, dim: int, similarity: Similarity) -> None:
        """
        Args:
            ids: [texts] of the texts, ascending.
            rows: reads the vectors of texts, by their places in `ids`.
            similarity: cosine scales vectors to unit length.
        """
        self._ids, self._rows, self.dim, self._similarity = ids, rows, dim, similarity

    def __call__(self, ids: Tensor) -> Tensor:
        """[texts, dim] float32 on the CPU of the texts with these ids, [texts] int64, all of which are known."""
        wanted = ids.numpy()
        places = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        assert (self._ids[places] == wanted).all(), "a text without a vector: all are known before training"
        return for_similarity(self._rows(places), self._similarity)
