"""Reranking losses against Sentence Transformers' own classes, torch's, and formulas written out pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as functional

from megatron_embed.losses.rerank import (
    kl_distillation,
    lambda_loss,
    listwise,
    margin_ranking,
    pad_groups,
    pointwise,
    ranknet,
)

SIZES = (4, 1, 16, 2, 7)
LOSSES = {"pointwise": pointwise, "listwise": listwise, "margin_ranking": margin_ranking, "ranknet": ranknet,
          "lambda_loss": lambda_loss, "kl_distillation": kl_distillation}


def groups(highest=3):
    """([documents] scores, [documents] graded labels) of lists of 1 to 16 documents."""
    generator = torch.Generator().manual_seed(4)
    count = sum(SIZES)
    scores = torch.randn(count, generator=generator, dtype=torch.float64).requires_grad_(True)
    labels = torch.randint(0, highest + 1, (count,), generator=generator).double()
    labels[4] = 0.0  # a list of one without a positive
    return scores, labels


def value_and_gradient(loss, scores):
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.detach(), gradient


def of_ours(name, scores, labels, **settings):
    padded, valid = pad_groups(scores, SIZES)
    return value_and_gradient(LOSSES[name](padded, pad_groups(labels, SIZES)[0], valid, **settings).mean, scores)


class _Scores(torch.nn.Module):
    """Stands for a CrossEncoder whose scores of all pairs are given."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs, **options):
        return {"input_ids": torch.tensor([pair_id for _, pair_id in pairs])}

    def forward(self, features):
        return {"scores": self.scores[features["input_ids"]][:, None]}


def of_sentence_transformers(loss_class, scores, labels, **settings):
    numbers = iter(range(len(scores)))
    documents = [[next(numbers) for _ in range(size)] for size in SIZES]
    loss = loss_class(_Scores(scores), **settings)
    return value_and_gradient(loss([[""] * len(SIZES), documents], list(labels.split(SIZES))), scores)


def assert_same(ours, theirs, tolerance):
    assert theirs[0] > 0.01 and float(theirs[1].norm()) > 1e-3
    torch.testing.assert_close(ours[0].double(), theirs[0].double(), rtol=tolerance, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance * float(theirs[1].norm()))


@pytest.mark.parametrize("name", ["lambda_loss", "ranknet"])
def test_pairs_equal_sentence_transformers(name):
    from sentence_transformers.cross_encoder.losses import LambdaLoss, RankNetLoss

    scores, labels = groups()
    theirs = of_sentence_transformers({"lambda_loss": LambdaLoss, "ranknet": RankNetLoss}[name], scores, labels)
    assert_same(of_ours(name, scores, labels), theirs, 2e-6)


def test_lambda_loss_written_out():
    scores, labels = groups()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for mine, grades in zip(scores.split(SIZES), labels.split(SIZES), strict=True):
        rank = {document: index + 1 for index, document in enumerate(mine.detach().argsort(descending=True).tolist())}
        ideal = sum((2 ** grade - 1) / math.log2(2 + index)
                    for index, grade in enumerate(sorted(grades.tolist(), reverse=True)))
        for i in range(len(mine)):
            for j in range(len(mine)):
                if grades[i] <= grades[j]:
                    continue
                apart = abs(rank[i] - rank[j])
                gain = float(2 ** grades[i] - 2 ** grades[j]) / ideal
                weight = gain * (10 * abs(1 / math.log2(1 + apart) - 1 / math.log2(2 + apart))
                                 + abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j])))
                total = total + weight * torch.log2(1 + torch.exp(mine[j] - mine[i]))
                count += 1
    assert_same(of_ours("lambda_loss", scores, labels), value_and_gradient(total / count, scores), 1e-10)


def test_pointwise_is_binary_cross_entropy_over_all_documents():
    scores, labels = groups(highest=1)
    theirs = functional.binary_cross_entropy_with_logits(scores, labels)
    assert_same(of_ours("pointwise", scores, labels), value_and_gradient(theirs, scores), 1e-10)


def test_pointwise_of_two_logits_is_the_cross_entropy_of_yes_and_no():
    logits = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 1])
    ours = pointwise((logits[:, 0] - logits[:, 1])[None], labels[None], torch.ones(1, 9, dtype=torch.bool)).mean
    torch.testing.assert_close(ours, functional.cross_entropy(logits, 1 - labels))


def test_listwise_with_one_positive_is_cross_entropy():
    scores = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    labels = functional.one_hot(torch.tensor([0, 3, 2]), 5)
    ours = value_and_gradient(listwise(scores, labels, torch.ones(3, 5, dtype=torch.bool), 0.5).mean, scores)
    theirs = value_and_gradient(functional.cross_entropy(scores / 0.5, torch.tensor([0, 3, 2])), scores)
    assert_same(ours, theirs, 1e-10)


def test_listwise_of_graded_labels_written_out():
    scores, labels = groups()
    losses = [-(grades / grades.sum() * torch.log_softmax(mine, dim=0)).sum()
              for mine, grades in zip(scores.split(SIZES), labels.split(SIZES), strict=True) if grades.any()]
    assert len(losses) == 4
    assert_same(of_ours("listwise", scores, labels), value_and_gradient(torch.stack(losses).mean(), scores), 1e-10)


def test_margin_ranking_equals_torch():
    scores, labels = groups()
    better, worse = [], []
    for mine, grades in zip(scores.split(SIZES), labels.split(SIZES), strict=True):
        for i, j in torch.nonzero(grades[:, None] > grades[None, :]).tolist():
            better.append(mine[i])
            worse.append(mine[j])
    theirs = functional.margin_ranking_loss(torch.stack(better), torch.stack(worse), torch.ones(len(better)),
                                            margin=0.7)
    assert_same(of_ours("margin_ranking", scores, labels, margin=0.7), value_and_gradient(theirs, scores), 1e-10)


def test_kl_distillation_equals_torch():
    scores, teacher = groups()
    teacher = teacher * 1.3
    losses = [functional.kl_div(torch.log_softmax(mine / 2, dim=0), torch.softmax(theirs / 2, dim=0), reduction="sum")
              for mine, theirs in zip(scores.split(SIZES), teacher.split(SIZES), strict=True)]
    assert_same(of_ours("kl_distillation", scores, teacher, temperature=2.0),
                value_and_gradient(torch.stack(losses).mean() * 4, scores), 1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_add_up(name):
    """Micro-batches rely on it: totals and counts of groups of lists sum to those of all."""
    scores, labels = groups(highest=1)
    whole_scores, valid = pad_groups(scores, SIZES)
    whole = LOSSES[name](whole_scores, pad_groups(labels, SIZES)[0], valid)
    parts = []
    for first, last, sizes in ((0, 5, SIZES[:2]), (5, 30, SIZES[2:])):
        padded, valid = pad_groups(scores[first:last], sizes)
        parts.append(LOSSES[name](padded, pad_groups(labels[first:last], sizes)[0], valid))
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(float(part.terms) for part in parts) == float(whole.terms) > 1


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_is_zero_and_not_nan(name):
    scores = torch.tensor([0.3], requires_grad=True)
    padded, valid = pad_groups(scores, [1])
    loss = LOSSES[name](padded, torch.zeros(1, 1), valid)
    (gradient,) = torch.autograd.grad(loss.total, scores)
    assert torch.isfinite(loss.mean) and torch.isfinite(gradient).all()
    assert name == "pointwise" or float(gradient) == 0.0 == float(loss.total.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_scores_are_computed_in_float32(name):
    scores, labels = groups(highest=1)
    low, exact = scores.detach().bfloat16(), scores.detach().bfloat16().float()
    losses = []
    for values in (low, exact):
        padded, valid = pad_groups(values, SIZES)
        losses.append(LOSSES[name](padded, pad_groups(labels, SIZES)[0], valid).mean)
    assert losses[0].dtype == torch.float32
    assert losses[0] == losses[1]
