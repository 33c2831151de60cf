"""Texts that several rows of a share have: the first row is encoded, the others share its outputs.

The gradient of the loss with respect to the parameters is the same: the gradients of a text's rows are added before its
one backward pass. It is not with dropout, which drops other numbers of each copy.
"""

import torch
from torch import Tensor

from megatron_embed.data.tokenized import TokenizedRows


def first_rows(*roles: TokenizedRows) -> list[int]:
    """For each row, the roles' one after the other, the first row of its role that the model gives the same outputs.

    Queries and documents are kept apart: they may differ in more than their tokens.
    """
    result: list[int] = []
    for role in roles:
        start, first = len(result), dict[tuple[object, ...], int]()
        nothing = [None] * len(role.token_ids)
        keys = zip(role.token_ids, role.kept or nothing, role.key_lengths or nothing, strict=True)
        for row, (ids, kept, length) in enumerate(keys, start=start):
            result.append(first.setdefault((tuple(ids), None if kept is None else tuple(kept), length), row))
    return result


def encoded_rows(encoded: list[int]) -> Tensor | None:
    """`StepBatch.encoded_row`: None if every row is encoded itself."""
    return None if encoded == list(range(len(encoded))) else torch.tensor(encoded, dtype=torch.int64)
