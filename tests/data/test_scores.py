"""Scores of pairs and a teacher's scores on their way into batches, and rows that lack what a loss needs."""

import json

import pytest
import torch

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import open_records
from megatron_embed.data.number_checks import LARGEST_EXPONENT, check_labels
from megatron_embed.data.records import require_fields
from megatron_embed.errors import DataError
from tests.helpers.toys import MINILM, batch_of


def records_of(tmp_path, rows, kind="contrastive"):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, open_records((TrainFile(path=str(path)),), kind)


def batch(records, num_negatives):
    return batch_of(str(MINILM), list(records), micro_batch_size=2, num_negatives=num_negatives, alignment=1,
                    uniform_size=False)


def test_pairs_bring_their_scores(tmp_path):
    _, records = records_of(tmp_path, [{"text_a": "one", "text_b": "two", "score": 2.6},
                                       {"text_a": "three", "text_b": "four", "score": 0}], "pairs")
    built = batch(records, 0)
    assert torch.equal(built.scores, torch.tensor([2.6, 0.0], dtype=torch.float64))
    assert (built.num_queries, built.num_documents, built.teacher_scores) == (2, 2, None)
    assert built.is_positive.tolist() == [True, True]


def test_teacher_scores_follow_the_documents_that_are_embedded(tmp_path):
    _, records = records_of(tmp_path, [
        {"query": "q", "positive": ["a", "b"], "negatives": ["c", "d"], "teacher_scores": [1, 2, 3, 4]},
        {"query": "r", "positive": ["e"], "negatives": ["f"], "teacher_scores": [5, 6]}])
    built = batch(records, 1)
    assert built.teacher_scores.tolist() == [1, 3, 5, 6]
    assert built.is_positive.tolist() == [True, False, True, False]
    assert built.scores is None


ROW = {"query": "q", "positive": ["a"], "negatives": ["b"], "teacher_scores": [1, 2]}


@pytest.mark.parametrize("row, words", [
    ({key: value for key, value in ROW.items() if key != "teacher_scores"},
     "teacher_scores is missing, which objective.loss = 'margin_mse' learns from"),
    (ROW | {"negatives": [], "teacher_scores": [1]}, "negatives is empty, and objective.loss = 'margin_mse'"),
])
def test_rows_without_what_the_loss_needs_are_refused(tmp_path, row, words):
    path, records = records_of(tmp_path, [ROW, row])
    with pytest.raises(DataError, match=words) as caught:
        require_fields(records, "margin_mse", teacher_scores=True, negatives=True)
    assert str(caught.value).startswith(f"{path}:2: ")
    require_fields(records, "info_nce", teacher_scores=False, negatives=False)


PAIR = {"text_a": "a", "text_b": "b"}
LIST = {"query": "q", "documents": ["a", "b", "c"], "labels": [1, 1, 0]}


@pytest.mark.parametrize("row, kind, words", [
    (PAIR | {"score": 1e39}, "pairs", r"score = 1e\+39 is not finite in float32"),
    (PAIR | {"score": -(10**39)}, "pairs", r"score = -10+ is not finite in float32"),
    (PAIR | {"score": 2**53 + 1}, "pairs", "score = 9007199254740993 has more digits"),
    (LIST | {"labels": [1e39, 1, 0]}, "rerank", r"labels\[0\] = 1e\+39 is not finite in float32"),
    (ROW | {"teacher_scores": [1, 3.5e38]}, "contrastive", r"teacher_scores\[1\] = 3.5e\+38 is not finite in float32"),
    (LIST | {"teacher_scores": [0, 0, -1e39]}, "rerank", r"teacher_scores\[2\] = -1e\+39 is not finite in float32"),
])
def test_numbers_that_float32_cannot_hold_are_refused(tmp_path, row, kind, words):
    with pytest.raises(DataError, match=words) as caught:
        list(records_of(tmp_path, [row], kind)[1])
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_literals_that_are_no_finite_numbers_are_refused(tmp_path, literal):
    (tmp_path / "rows.jsonl").write_text('{"text_a": "a", "text_b": "b", "score": ' + literal + "}\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*(not valid JSON|is not finite)"):
        list(open_records((TrainFile(path=str(tmp_path / "rows.jsonl")),), "pairs"))


@pytest.mark.parametrize("loss, score, words", [
    ("cosine_similarity", 1e20, "the squared difference to a cosine is not finite in float32"),
    ("cosine_similarity", -3.0, None), ("contrastive", 1.5, "takes scores from 0 to 1"),
    ("contrastive", -0.1, "takes scores from 0 to 1"), ("contrastive", 0.5, None),
    ("online_contrastive", 0.5, "takes the scores 0 and 1 alone"), ("online_contrastive", 1.0, None),
    ("cosent", -3e38, None)])
def test_scores_of_pairs_that_a_loss_cannot_take(tmp_path, loss, score, words):
    path, records = records_of(tmp_path, [PAIR | {"score": 1}, PAIR | {"score": score}], "pairs")
    if words is None:
        require_fields(records, loss, teacher_scores=False, negatives=False, labels=True)
        return
    with pytest.raises(DataError, match=words) as caught:
        require_fields(records, loss, teacher_scores=False, negatives=False, labels=True)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_scores_beyond_a_cosine_are_warned_of(tmp_path, caplog):
    path, records = records_of(tmp_path, [PAIR | {"score": score} for score in (1, 4.2, 5, -1)], "pairs")
    require_fields(records, "cosine_similarity", teacher_scores=False, negatives=False, labels=True)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"{path}:2: score 4.2: ") and "(2 such rows)" in line and "score_range" in line
    caplog.clear()
    require_fields(records, "cosent", teacher_scores=False, negatives=False, labels=True)
    assert not caplog.records


@pytest.mark.parametrize("loss, scores, temperature, words", [
    ("margin_mse", [1e19, -1e19], 1.0, "teacher_scores lie 2e.19 apart"), ("margin_mse", [1e18, -1e18], 1.0, None),
    ("kl_distillation", [1e38, 0], 0.02, "not finite in float32 once they are divided by the temperature 0.02"),
    ("kl_distillation", [3e38, -3e38], 1.0, "not finite in float32"), ("kl_distillation", [1e38, 0], 1.0, None)])
def test_teacher_scores_that_a_loss_cannot_take(tmp_path, loss, scores, temperature, words):
    path, records = records_of(tmp_path, [ROW | {"teacher_scores": scores}])
    if words is None:
        require_fields(records, loss, teacher_scores=True, negatives=True, teacher_temperature=temperature)
        return
    with pytest.raises(DataError, match=words) as caught:
        require_fields(records, loss, teacher_scores=True, negatives=True, teacher_temperature=temperature)
    assert str(caught.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize("loss, labels, words", [
    ("lambda_loss", [1000, 1, 0], "label 1000: objective.loss = lambda_loss takes labels up to 24"),
    ("lambda_loss", [128, 1, 0], "label 128: "), ("lambda_loss", [25, 1, 0], "label 25: "),
    ("lambda_loss", [24, 1.5, 0], None), ("lambda_loss", [1, -1, 0], "label -1: .* takes labels >= 0"),
    ("listwise", [3e38, 3e38, 0], "the labels add up to 6e.38, which is not finite"), ("listwise", [1e38, 0, 0], None),
    ("listwise", [1, -1e-3, 0], "label -0.001: .* takes labels >= 0"),
    ("listwise", [1e-50, 0, 0], "label 1e-50 is 0 in float32"), ("ranknet", [2, 1e-44, 0], None),
    ("ranknet", [16777217, 16777216, 0], "16777216.0 and 16777217.0 are the same number in float32"),
    ("margin_ranking", [1, 1 + 1e-9, 0], "are the same number in float32"), ("ranknet", [-5, 1000, 1000], None)])
def test_labels_that_a_loss_cannot_take(loss, labels, words):
    if words is None:
        check_labels(labels, loss, "rows.jsonl:7")
        return
    with pytest.raises(DataError, match=words) as caught:
        check_labels(tuple(map(float, labels)), loss, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ")


def test_the_largest_label_of_lambda_loss_has_an_exact_gain():
    """As Sentence Transformers computes it (LambdaLoss: `torch.pow(2.0, labels) - 1`)."""
    labels = torch.arange(LARGEST_EXPONENT + 2, dtype=torch.float32)
    exact = [(torch.pow(2.0, label) - 1).item() == 2 ** int(label) - 1 for label in labels]
    assert exact == [True] * (LARGEST_EXPONENT + 1) + [False]
