"""Losses of labelled pairs, over similarities of rows (autograd). All pure: no communication."""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """[pairs] cosine similarity of the rows of two [pairs, dim] tensors."""
    return functional.cosine_similarity(first, second, dim=1)


def angle_similarity(first: Tensor, second: Tensor) -> Tensor:
    """[pairs] similarity of AnglE (Li and Li 2023, arXiv:2309.12871) as its authors' code computes it.

    A unit row is read as dim/2 complex numbers (real parts first, a last 0 where dim is odd); the similarity is
    |sum of real and imaginary parts of the products first * conjugate(second)|.
    """
    width = first.shape[1] + first.shape[1] % 2
    units = [functional.pad(functional.normalize(rows, dim=1), (0, width - rows.shape[1])) for rows in (first, second)]
    (real, imaginary), (other_real, other_imaginary) = (rows.chunk(2, dim=1) for rows in units)
    parallel = real * other_real + imaginary * other_imaginary
    across = imaginary * other_real - real * other_imaginary
    return (parallel + across).sum(dim=1).abs()


def cosine_similarity(similarity: Tensor, label: Tensor) -> Tensor:
    """[pairs] squared distance of each pair's cosine similarity to its label (Reimers and Gurevych 2019,
    arXiv:1908.10084)."""
    return (similarity - label).square()


def contrastive(similarity: Tensor, label: Tensor, margin: float) -> Tensor:
    """[pairs] half the squared distance d = 1 - cosine where the label is 1, half of max(0, margin - d)^2 where it is 0
    (Hadsell et al. 2006, doi:10.1109/CVPR.2006.100); between the two, both in proportion."""
    distance = 1.0 - similarity
    return 0.5 * (label * distance.square() + (1.0 - label) * functional.relu(margin - distance).square())


def online_contrastive(similarity: Tensor, label: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The same without the halves, summed over the hard pairs alone: positives further apart than the closest negative,
    and negatives closer than the furthest positive.

    Args:
        similarity: [pairs] cosine, of the whole batch.
        label: [pairs], 1 or 0.
        margin: distance that a negative should have.
    Returns:
        (scalar sum, [pairs] bool true at the hard pairs). Without any negative, hard positives are those further apart
        than their mean; the same for negatives.
    """
    distance, positive, negative = 1.0 - similarity, label == 1, label == 0
    furthest = torch.where(positive, distance.detach(), -math.inf).max()
    closest = torch.where(negative, distance.detach(), math.inf).min()
    furthest = torch.where(positive.any(), furthest, _mean_where(negative, distance.detach()))
    closest = torch.where(negative.any(), closest, _mean_where(positive, distance.detach()))
    hard = (positive & (distance > closest)) | (negative & (distance < furthest))
    terms = torch.where(positive, distance.square(), functional.relu(margin - distance).square())
    return torch.where(hard, terms, 0.0).sum(), hard


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Scalar, the mean of the values where the mask is true; NaN if it is nowhere."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def cosent(similarity: Tensor, label: Tensor, temperature: float) -> Tensor:
    """log(1 + sum over pairs i, j with label i > label j of exp((similarity j - similarity i) / temperature)).

    CoSENT (Huang et al. 2024, doi:10.1109/TASLP.2024.3402087); with `angle_similarity` AnglE. Labels are compared with
    each other alone, so their range does not matter. Memory O(pairs): sorted by label, what a pair adds is its
    similarity plus the log-sum-exp of minus those with higher labels, which is a cumulative one from the end.

    Args:
        similarity: [pairs], of the whole batch.
        label: [pairs], graded.
        temperature: > 0.
    """
    label, order = label.sort()
    logits = similarity[order] / temperature
    above = torch.logcumsumexp(-logits.flip(0), dim=0).flip(0)
    above = torch.cat([above, logits.new_full((1,), float("-inf"))])
    first_higher = torch.searchsorted(label, label, right=True)
    return torch.logsumexp(torch.cat([logits.new_zeros(1), logits + above[first_higher]]), dim=0)
