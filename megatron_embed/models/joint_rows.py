"""The rows that a joint model gives for the texts of a micro-batch; see JointFormat."""

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.batch import MicroBatch


def joint_rows(texts: Tensor, projected: Tensor, ids: Tensor) -> Tensor:
    """[rows, dim + 2] float32: those of the texts' own vectors, then those of the tokens.

    Args:
        texts: [texts, hidden], pooled.
        projected: [tokens, dim + 1], vectors and, last, weights before ReLU.
        ids: [tokens] that the weights belong to, -1: none.
    """
    vectors, weights = functional.normalize(projected[:, :-1], dim=-1), functional.relu(projected[:, -1:])
    rows = torch.cat([vectors, weights, ids.to(weights.dtype)[:, None]], dim=1)
    own = functional.normalize(texts, dim=-1)
    own = functional.pad(own, (0, -own.shape[1] % rows.shape[1]))
    return torch.cat([own.view(-1, rows.shape[1]), rows])


def weight_ids(micro_batch: MicroBatch) -> Tensor | None:
    """[tokens with a vector] float32, the id that each one's weight belongs to, -1: none; None: not of a joint model.

    Exact, since vocabularies are smaller than 2^24.
    """
    if micro_batch.joint is None or micro_batch.vectors is None:
        return None
    ids = micro_batch.token_ids[micro_batch.vectors >= 0]
    unweighted = torch.tensor(sorted(micro_batch.joint.unweighted))
    return torch.where(torch.isin(ids, unweighted), -1, ids).float()
