"""Fewer vectors of a document: similar ones become their mean (Clavié et al. 2024, arXiv:2409.14683)."""

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn import functional

from megatron_embed.batch import TextVectors

PROTECTED = 1
"""Leading vectors of a text that stay as they are: that of [CLS]."""


def pool_tokens(texts: TextVectors, factor: int) -> TextVectors:
    """About one vector in `factor` of each text, of unit length, as Sentence Transformers' HierarchicalTokenPooling;
    with a factor of 1 the texts themselves."""
    if factor == 1:
        return texts
    pooled = [_pooled(own, factor) for own in texts.vectors.split(texts.counts.tolist())]
    return TextVectors(vectors=torch.cat(pooled) if pooled else texts.vectors,
                       counts=torch.tensor([len(own) for own in pooled], dtype=torch.int64))


def _pooled(vectors: Tensor, factor: int) -> Tensor:
    """[fewer vectors, dim]: the first, then the means of Ward's clusters of the others by cosine distance."""
    first, others = vectors[:PROTECTED], vectors[PROTECTED:]
    wanted = max(len(others) // factor, 1)
    if wanted >= len(others):
        return functional.normalize(vectors, dim=1)
    distance = (1 - others @ others.T).clamp_(0, 2).double().numpy()
    tree = hierarchy.linkage(squareform(distance, checks=False), method="ward")
    labels = hierarchy.fcluster(tree, t=wanted, criterion="maxclust")
    _, cluster = np.unique(labels, return_inverse=True)
    rows = torch.from_numpy(cluster)
    sums = others.new_zeros(int(rows.max()) + 1, others.shape[1]).index_add_(0, rows, others)
    means = sums / torch.bincount(rows)[:, None]
    return functional.normalize(torch.cat([first, means]), dim=1)
