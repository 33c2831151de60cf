"""Scores of pairs and a teacher's scores on their way into batches, and rows that lack what a loss needs."""

import json

import pytest
import torch

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.record import require_fields
from megatron_embed.data.records import open_records
from megatron_embed.errors import DataError
from tests.toys import MINILM, batch_of


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
    found = batch(records, 0)
    assert torch.equal(found.scores, torch.tensor([2.6, 0.0], dtype=torch.float64))
    assert (found.num_queries, found.num_documents, found.teacher_scores) == (2, 2, None)
    assert found.is_positive.tolist() == [True, True]


def test_teacher_scores_follow_the_documents_that_are_embedded(tmp_path):
    _, records = records_of(tmp_path, [
        {"query": "q", "positive": ["a", "b"], "negatives": ["c", "d"], "teacher_scores": [1, 2, 3, 4]},
        {"query": "r", "positive": ["e"], "negatives": ["f"], "teacher_scores": [5, 6]}])
    found = batch(records, 1)
    assert found.teacher_scores.tolist() == [1, 3, 5, 6]
    assert found.is_positive.tolist() == [True, False, True, False]
    assert found.scores is None


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
