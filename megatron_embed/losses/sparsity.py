"""Regularizers of sparse vectors, from sums over texts: what they are and their gradient. No communication.

Vectors are >= 0, and the gradient where they are 0 has no effect, since log(1 + relu) has none there.
"""

import torch
from torch import Tensor

from megatron_embed.names import Regularizer


def regularizer(kind: Regularizer, sums: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """(scalar value, [vocabulary] gradient with respect to each text's vector).

    flops: the sum over the vocabulary of the squared mean weight (Paria et al. 2020, arXiv:2004.05665). l1: the mean
    over texts of the sum of their weights.

    Args:
        sums: [vocabulary] sum of the weights over all texts; a share of the vocabulary gives its share of the value.
        count: texts, > 0.
    """
    mean = sums / count
    if kind == "flops":
        return mean.square().sum(), 2.0 * mean / count
    return mean.sum(), torch.ones_like(mean) / count
