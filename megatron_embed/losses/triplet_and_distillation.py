"""Losses of a query with its own positive and hard negatives: triplet loss, and distillation from a teacher (autograd).

All pure: no communication.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.names import TeacherDistance


def triplet(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """[triplets] max(0, |anchor - positive| - |anchor - negative| + margin), Euclidean (Schroff et al. 2015,
    arXiv:1503.03832)."""
    near, far = (torch.linalg.vector_norm(anchor - other, dim=1) for other in (positive, negative))
    return functional.relu(near - far + margin)


def margin_mse(positive: Tensor, negative: Tensor, teacher_positive: Tensor, teacher_negative: Tensor) -> Tensor:
    """[negatives] squared difference of student's and teacher's margins, positive minus negative (Hofstätter et al.
    2020, arXiv:2010.02666).

    Args:
        positive: [negatives], similarity of the query to its positive, one per negative.
        negative: [negatives], similarity of the query to that negative.
        teacher_positive, teacher_negative: [negatives], the teacher's scores of the same.
    """
    return ((positive - negative) - (teacher_positive - teacher_negative)).square()


def teacher_distance(student: Tensor, teacher: Tensor, kind: TeacherDistance) -> Tensor:
    """[texts] distance of each vector to a teacher's: 1 - cosine, the mean over components of the squared difference
    (Reimers and Gurevych 2020, arXiv:2004.09813), or Euclidean (EmbedDistill, Kim et al. 2023, arXiv:2301.12005).

    Args:
        student, teacher: [texts, dim].
    """
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student, teacher, dim=1)
    if kind == "mse":
        return (student - teacher).square().mean(dim=1)
    distance: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
    return distance


def kl_distillation(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float,
                    teacher_temperature: float) -> Tensor:
    """[queries] temperature^2 * KL(teacher || student) of the two softmaxes over a query's documents (Lin et al. 2020,
    arXiv:2010.11386).

    Args:
        student: [queries, most documents], similarities.
        teacher: [queries, most documents], scores.
        valid: [queries, most documents] bool, false in the padding.
        temperature: divides the student's similarities, > 0.
        teacher_temperature: divides the teacher's scores, > 0.
    """
    absent = float("-inf")
    predicted = torch.log_softmax((student / temperature).masked_fill(~valid, absent), dim=1).masked_fill(~valid, 0.0)
    wanted = torch.log_softmax((teacher / teacher_temperature).masked_fill(~valid, absent), dim=1)
    weight = wanted.exp()
    return (weight * (wanted.masked_fill(~valid, 0.0) - predicted)).sum(dim=1) * temperature**2
