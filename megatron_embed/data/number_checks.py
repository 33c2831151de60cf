"""Checks of labels and scores: a row whose numbers a loss, computed in float32, cannot use is refused."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_embed.data.jsonl import shortened
from megatron_embed.errors import DataError

LARGEST = float(np.finfo(np.float32).max)
SQUARE_IS_FINITE = math.sqrt(LARGEST)
"""Largest difference whose square is still a float32."""
WITH_BOUNDS = ("cosine_similarity", "contrastive", "online_contrastive")
"""Losses of pairs that do not take every score."""
LARGEST_EXPONENT = np.finfo(np.float32).nmant + 1
"""Largest label of lambda_loss: up to 24 the gain 2^label - 1 of a whole label is exact in float32."""

LARGEST_GRADE = 10**6
"""Largest grade, either side of 0: trec_eval counts documents per grade in a table as long as the highest one. Without
memory for that, as at 2^31, it reports 0 for every metric."""


def check_grade(grade: float, name: str, source: str) -> None:
    """Refuse a grade that ranking metrics cannot take. Raises DataError, beginning with `source`."""
    if abs(grade) > LARGEST_GRADE:
        raise DataError(f"{source}: {name} = {shortened(grade)}: ranking metrics take grades up to "
                        f"{LARGEST_GRADE}; write grades such as 0 to 4")


def check_score(score: float, loss: str, source: str) -> None:
    """Refuse the label of a pair that the loss cannot take. Raises DataError, beginning with `source`."""
    if loss == "contrastive" and not 0 <= score <= 1:
        raise DataError(f"{source}: score {score:g}: objective.loss = contrastive takes scores from 0 to 1; divide by "
                        "the highest score, or choose cosent")
    if loss == "online_contrastive" and score not in (0, 1):
        raise DataError(f"{source}: score {score:g}: objective.loss = online_contrastive takes the scores 0 and 1 "
                        "alone; choose contrastive for scores between them, or cosent for any")
    if loss == "cosine_similarity" and abs(score) > SQUARE_IS_FINITE:
        raise DataError(f"{source}: score {score:g}: the squared difference to a cosine is not finite in float32; "
                        "objective.loss = cosine_similarity takes scores from -1 to 1: divide by the highest score")


def check_teacher(scores: Sequence[float], loss: str, temperature: float, source: str) -> None:
    """Refuse a teacher's scores that lie too far apart for the loss. Raises DataError, beginning with `source`.

    Args:
        temperature: divides them in kl_distillation.
    """
    apart = max(scores) - min(scores)
    if loss == "margin_mse" and apart > SQUARE_IS_FINITE:
        raise DataError(f"{source}: teacher_scores lie {apart:g} apart, whose square is not finite in float32; correct "
                        "the row, or divide all teacher scores by the same number")
    if loss == "kl_distillation" and max(apart, *map(abs, scores)) > LARGEST * min(temperature, 1.0):
        raise DataError(f"{source}: teacher_scores up to {max(scores, key=abs):g} are not finite in float32 once they "
                        f"are divided by the temperature {temperature:g}; correct the row, or divide all teacher "
                        "scores by the same number")


def check_labels(labels: Sequence[float], loss: str, source: str) -> None:
    """Refuse the labels of a query's documents that a reranker's loss cannot take. Raises DataError, beginning with
    `source`."""
    highest, lowest = max(labels), min(labels)
    if loss == "pointwise" and (highest > 1 or lowest < 0):
        raise DataError(f"{source}: label {highest if highest > 1 else lowest:g}: objective.loss = pointwise "
                        "takes labels from 0 to 1; divide by the highest grade, or choose listwise, ranknet or "
                        "lambda_loss")
    if loss in ("listwise", "lambda_loss") and lowest < 0:
        raise DataError(f"{source}: label {lowest:g}: objective.loss = {loss} takes labels >= 0; write 0 for "
                        "what is not relevant")
    if loss == "lambda_loss" and highest > LARGEST_EXPONENT:
        raise DataError(f"{source}: label {highest:g}: objective.loss = lambda_loss takes labels up to "
                        f"{LARGEST_EXPONENT}, since its gain 2^label - 1 is exact in float32 that far; write grades "
                        "such as 0 to 4, or choose ranknet")
    if loss == "listwise" and sum(labels) > LARGEST:
        raise DataError(f"{source}: the labels add up to {sum(labels):g}, which is not finite in float32; divide all "
                        "labels by the same number")
    stored = np.asarray(labels, dtype=np.float32).tolist()
    for label, other in zip(sorted(labels), sorted(stored), strict=True):
        if label > 0 and not other:
            raise DataError(f"{source}: label {label:g} is 0 in float32, in which the loss is computed; write 0, or "
                            "multiply all labels by the same number")
    if len(set(stored)) < len(set(labels)):
        first, second = next((first, second) for first, second in zip(sorted(set(labels)), sorted(set(labels))[1:],
                                                                      strict=False)
                             if np.float32(first) == np.float32(second))
        raise DataError(f"{source}: the labels {first!r} and {second!r} are the same number in float32, in which the "
                        "loss is computed; write grades that lie further apart")
