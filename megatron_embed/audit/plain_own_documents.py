"""Losses of a query with its own documents, and of labelled pairs, written out query by query in float64."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.audit.global_batch import GlobalBatch
from megatron_embed.audit.variation import Variation
from megatron_embed.config.objective import ObjectiveConfig
from megatron_embed.config.schema import RerankerConfig
from megatron_embed.names import Precision

TRIPLET_MARGIN, PAIR_MARGIN = 5.0, 0.5
LAMBDA_WEIGHT = 10.0
Weight = tuple[int | None, Precision, float]
"""Dimension or None, precision, and weight of one of the losses."""
Sums = dict[str, list[Tensor]]


class PlainHardNegatives:
    """`triplet`, `margin_mse` and `kl_distillation` of an embedding model, at one dimension."""

    def __init__(self, config: ObjectiveConfig, variation: Variation) -> None:
        self.loss = config.loss
        self.margin = TRIPLET_MARGIN if config.margin is None else config.margin
        self.temperature = variation.temperature or config.temperature
        self.teacher_temperature = config.teacher_temperature or config.temperature

    def sums(self, query: Tensor, document: Tensor, batch: GlobalBatch) -> Sums:
        """Metric -> [sum, divisor]."""
        losses, positives, hardest, negatives = [], [], [], []
        for row, columns in groups(batch):
            similarity = document[columns] @ query[row]
            losses += self._losses(query[row], document[columns], similarity,
                                   None if batch.teacher is None else batch.teacher[columns])
            positives.append(similarity[0].detach())
            negatives += similarity[1:].detach().unbind()
            if len(columns) > 1:
                hardest.append(positives[-1] - similarity[1:].detach().max())
        queries, some = float(len(query)), float(len(hardest))
        terms = queries if self.loss == "kl_distillation" else float(len(negatives))
        return {"loss": pair(_total(losses), terms),
                "accuracy": pair(_total([(value > 0).double() for value in hardest]), some),
                "positive_similarity": pair(_total(positives), queries),
                "negative_similarity": pair(_total(negatives), float(len(negatives))),
                "margin": pair(_total(hardest), some),
                "negatives_per_query": pair(torch.tensor(float(len(negatives)), dtype=torch.float64), queries)}

    def _losses(self, query: Tensor, documents: Tensor, similarity: Tensor, teacher: Tensor | None) -> list[Tensor]:
        if self.loss == "triplet":
            near = (query - documents[0]).norm()
            return [functional.relu(near - (query - other).norm() + self.margin) for other in documents[1:]]
        assert teacher is not None
        if self.loss == "margin_mse":
            wanted = teacher[0] - teacher[1:]
            return list((similarity[0] - similarity[1:] - wanted).square().unbind())
        target = torch.softmax(teacher / self.teacher_temperature, dim=0)
        predicted = torch.log_softmax(similarity / self.temperature, dim=0)
        return [(target * (target.log() - predicted)).sum() * self.temperature**2]


class PlainPairs:
    """Losses of labelled pairs, at one dimension."""

    def __init__(self, config: ObjectiveConfig, variation: Variation) -> None:
        self.loss, self.margin = config.loss, PAIR_MARGIN if config.margin is None else config.margin
        self.temperature = variation.temperature or config.temperature
        self.shift = variation.label_shift

    def sums(self, query: Tensor, document: Tensor, batch: GlobalBatch) -> Sums:
        """Metric -> [sum, divisor]."""
        assert batch.scores is not None
        label = batch.scores.roll(-self.shift)
        one, other = functional.normalize(query, dim=1), functional.normalize(document, dim=1)
        similarity = _angle(one, other) if self.loss == "angle" else (one * other).sum(dim=1)
        loss, terms = self._loss(similarity, label)
        found = {"loss": pair(loss, terms), "similarity": pair(similarity.detach().sum(), float(len(label)))}
        if self.loss not in ("cosent", "angle"):
            for name, chosen in (("positive", label > 0.5), ("negative", label < 0.5)):
                found[f"{name}_similarity"] = pair(similarity.detach()[chosen].sum(), float(chosen.sum()))
        return found

    def _loss(self, similarity: Tensor, label: Tensor) -> tuple[Tensor, float]:
        """(sum, divisor)."""
        distance, count = 1 - similarity, float(len(label))
        if self.loss == "cosine_similarity":
            return (similarity - label).square().sum(), count
        far = functional.relu(self.margin - distance).square()
        if self.loss == "contrastive":
            return 0.5 * (label * distance.square() + (1 - label) * far).sum(), count
        if self.loss == "online_contrastive":
            positive, negative, plain = label == 1, label == 0, distance.detach()
            furthest = plain[positive].max() if positive.any() else plain[negative].mean()
            closest = plain[negative].min() if negative.any() else plain[positive].mean()
            hard = (positive & (plain > closest)) | (negative & (plain < furthest))
            return torch.where(positive, distance.square(), far)[hard].sum(), 1.0
        higher = label[:, None] > label[None, :]
        differences = (similarity[None, :] - similarity[:, None]) / self.temperature
        return torch.cat([differences[higher], similarity.new_zeros(1)]).logsumexp(dim=0), 1.0


class PlainReranking:
    """Losses of the scores of each query's documents."""

    def __init__(self, loss: str, config: RerankerConfig, variation: Variation) -> None:
        self.loss, self.margin = loss, config.margin
        self.temperature = variation.temperature or config.temperature
        self.shift = variation.label_shift

    def sums(self, query: Tensor, document: Tensor, batch: GlobalBatch) -> Sums:
        """Metric -> [sum, divisor]. `document`: [documents, 1] scores."""
        assert batch.labels is not None
        losses, terms, correct, positive, negative, margins = [], 0.0, [], [], [], []
        labels = batch.labels.double().roll(-self.shift)
        for _, columns in groups(batch):
            scores, label = document[columns, 0], labels[columns]
            loss, count = self._loss(scores, label, None if batch.teacher is None else batch.teacher[columns])
            losses.append(loss)
            terms += count
            plain, relevant = scores.detach(), label > 0
            positive.append(plain[relevant].sum())
            negative.append(plain[~relevant].sum())
            if relevant.any() and not relevant.all():
                correct.append((label[plain.argmax()] == label.max()).double())
                margins.append(plain[relevant].min() - plain[~relevant].max())
        relevant = float((labels > 0).sum())
        return {"loss": pair(_total(losses), max(1.0, terms)), "accuracy": pair(_total(correct), float(len(correct))),
                "positive_score": pair(_total(positive), relevant),
                "negative_score": pair(_total(negative), len(labels) - relevant),
                "margin": pair(_total(margins), float(len(margins)))}

    def _loss(self, scores: Tensor, label: Tensor, teacher: Tensor | None) -> tuple[Tensor, float]:
        """(sum, terms) of one query."""
        if self.loss == "pointwise":
            return (functional.softplus(scores) - scores * label).sum(), float(len(scores))
        if self.loss == "listwise":
            weights = label.clamp(min=0)
            if not weights.sum() > 0:
                return scores.sum() * 0, 0.0
            return -(weights / weights.sum() * torch.log_softmax(scores / self.temperature, dim=0)).sum(), 1.0
        if self.loss == "kl_distillation":
            assert teacher is not None
            target = torch.softmax(teacher.double() / self.temperature, dim=0)
            predicted = torch.log_softmax(scores / self.temperature, dim=0)
            return (target * (target.log() - predicted)).sum() * self.temperature**2, 1.0
        better = label[:, None] > label[None, :]
        differences = (scores[:, None] - scores[None, :])[better]
        if self.loss == "margin_ranking":
            return functional.relu(self.margin - differences).sum(), float(better.sum())
        pairs = functional.softplus(-differences) / math.log(2)
        weights = _lambda_weights(scores.detach(), label)[better] if self.loss == "lambda_loss" else 1.0
        return (pairs * weights).sum(), float(better.sum())


def groups(batch: GlobalBatch) -> Iterator[tuple[int, Tensor]]:
    """(query, its documents in order) of every query."""
    sizes = torch.bincount(batch.document_query, minlength=len(batch.query_texts)).tolist()
    yield from enumerate(torch.arange(len(batch.document_query)).split(sizes))


def over_dimensions(loss_at: Callable[[Tensor, Tensor, GlobalBatch], Sums], query: Tensor, document: Tensor,
                    batch: GlobalBatch, weights: Sequence[Weight], *, normalize: bool) -> dict[str, Tensor]:
    """Metric -> [2] sum and divisor: the weighted loss over the dimensions and precisions, the other metrics of the
    first."""
    result: dict[str, Tensor] = {}
    total = query.new_zeros(())
    for index, (dim, precision, weight) in enumerate(weights):
        sides = [cut(side, dim, normalize=normalize) for side in (query, document)]
        sums = {name: torch.stack(values) for name, values in loss_at(*rounded(*sides, precision), batch).items()}
        total = total + sums["loss"][0] * weight
        result |= {name: value.detach() for name, value in sums.items()} if index == 0 else {}
        label = "@".join(str(part) for part in (dim, precision) if part not in (None, "float32" if dim else None))
        if len(weights) > 1 or label != "float32":
            result[f"loss@{label}"] = sums["loss"].detach()
    return {**result, "loss": torch.stack([total, result["loss"][1]])}


def rounded(query: Tensor, document: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """(queries, documents) as a store keeps them, with the gradient of the vectors before. Decided in float32, as
    training does."""
    if precision == "float32":
        return query, document
    if precision == "binary":
        return _with_values(query, _signs(query)), _with_values(document, _signs(document))
    if precision == "rescore":
        return query, _with_values(document, _signs(document))
    numbers = document.detach().float()
    low, high = numbers.min(dim=0).values, numbers.max(dim=0).values
    step = (high - low) / 254
    start = low - step / 2
    step[step == 0] = 1.0
    return query, _with_values(document, ((numbers - start) / step).floor() * step + start)


def _signs(vectors: Tensor) -> Tensor:
    return ((vectors > 0).double() - (vectors <= 0).double()) / math.sqrt(vectors.shape[1])


def _with_values(vectors: Tensor, values: Tensor) -> Tensor:
    """Other values with the vectors' graph."""
    return vectors + (values.double() - vectors).detach()


def cut(vectors: Tensor, dim: int | None, *, normalize: bool) -> Tensor:
    """[rows, dim] leading components, at unit length again if asked for; all as they are without a dimension."""
    if dim is None:
        return vectors
    leading = vectors[:, :dim]
    return leading / leading.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else leading


def pair(value: Tensor, divisor: float) -> list[Tensor]:
    """[sum, divisor] as scalars."""
    return [value, torch.tensor(float(divisor), dtype=torch.float64)]


def _total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).sum() if values else torch.zeros((), dtype=torch.float64)


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """[pairs] of unit rows as dim/2 complex numbers: |sum of real and imaginary parts of one * conjugate(other)|."""
    odd = one.shape[1] % 2
    left, right = (functional.pad(side, (0, odd)).chunk(2, dim=1) for side in (one, other))
    product = torch.complex(*left) * torch.complex(*right).conj()
    return (product.real + product.imag).sum(dim=1).abs()


def _lambda_weights(scores: Tensor, label: Tensor) -> Tensor:
    """[documents, documents] weights of the pairs by the change of nDCG if they are exchanged."""
    order = scores.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1)
    gain = 2.0 ** label.clamp(min=0) - 1
    places = torch.arange(1, len(order) + 1, dtype=torch.float64)
    gain = gain / (gain.sort(descending=True).values / torch.log2(1 + places)).sum().clamp(min=1e-10)
    apart = (rank[:, None] - rank[None, :]).abs().clamp(min=1).double()
    by_distance = (1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)).abs()
    discount = 1 / torch.log2(1 + rank.double())
    return (gain[:, None] - gain[None, :]).abs() * (
        LAMBDA_WEIGHT * by_distance + (discount[:, None] - discount[None, :]).abs())
