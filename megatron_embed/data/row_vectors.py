"""The vectors of a multi-vector model's rows, numbered row after row, as micro-batches hold them."""

from collections.abc import Sequence
from itertools import chain
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_embed.batch import JointOutputs
from megatron_embed.data.tokenized import TokenizedRows


class RowVectors:
    """Which token of which row gives which vector.

    Attributes:
        counts: [rows] int64, vectors of each row, those of a joint model's texts included.
        joint: see TokenizedRows.
    """

    def __init__(self, kept: Sequence[Sequence[bool]], key_lengths: Sequence[int] | None,
                 joint: JointOutputs | None = None) -> None:
        """See TokenizedRows."""
        masks = [np.array(row, dtype=bool) for row in kept]
        self.joint = joint
        counts = np.array([mask.sum() + self.dense_rows for mask in masks], dtype=np.int64)
        self.counts = torch.from_numpy(counts)
        self._masks, self._key_lengths = masks, key_lengths
        self._starts = np.cumsum(counts) - counts + self.dense_rows

    @classmethod
    def of(cls, *parts: TokenizedRows) -> Self | None:
        """Those of the texts of all parts, in order; None if a text gives one vector."""
        kept = [part.kept for part in parts if part.kept is not None]
        if not kept:
            return None
        lengths = None
        if any(part.key_lengths is not None for part in parts):
            lengths = list(chain.from_iterable(part.key_lengths or [len(ids) for ids in part.token_ids]
                                               for part in parts))
        return cls(list(chain.from_iterable(kept)), lengths, next((part.joint for part in parts if part.joint), None))

    @property
    def dense_rows(self) -> int:
        """Rows of a joint model's text before those of its tokens; 0 of another model."""
        return 0 if self.joint is None else self.joint.dense_rows

    def of_tokens(self, rows: Sequence[int], tokens: int) -> Tensor:
        """[tokens] int64, the vector of each token of a micro-batch of these rows, -1 for none and in the padding."""
        result, first = np.full(tokens, -1, dtype=np.int64), 0
        for row in rows:
            mask = self._masks[row]
            own = result[first : first + len(mask)]
            own[mask] = self._starts[row] + np.arange(mask.sum())
            first += len(mask)
        return torch.from_numpy(result)

    def weighted_ids(self, token_ids: Sequence[Sequence[int]]) -> Tensor | None:
        """[ids] int64, ascending: the tokens that the first rows contain and that have a weight; None: not of a joint
        model.

        Args:
            token_ids: those of each of these rows.
        """
        if self.joint is None:
            return None
        kept = [np.asarray(ids, dtype=np.int64)[mask] for ids, mask in zip(token_ids, self._masks, strict=False)]
        ids = np.unique(np.concatenate(kept))
        return torch.from_numpy(ids[~np.isin(ids, sorted(self.joint.unweighted))])

    def key_lengths(self, rows: Sequence[int]) -> Tensor | None:
        """[rows] int32, see MicroBatch."""
        lengths = self._key_lengths
        return None if lengths is None else torch.tensor([lengths[row] for row in rows], dtype=torch.int32)
