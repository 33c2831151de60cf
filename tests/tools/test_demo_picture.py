"""Margins, ranks and drawing of the demonstration's picture."""

import sys

import pytest
import torch
from PIL import Image

from megatron_embed.evaluation.beir import BeirData
from tests.helpers.toys import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
from demo_picture import draw, search_result


@pytest.fixture
def data() -> BeirData:
    return BeirData(directory="none", name="toy", document_ids=["a", "b", "c"], document_texts=["a", "b", "c"],
                    query_ids=["x", "y"], query_texts=["x", "y"], qrels={"x": {"a": 1, "b": 0}, "y": {"b": 1, "c": 2}})


def test_margins_and_ranks_are_those_of_the_vectors(data):
    documents = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    result = search_result(data, torch.tensor([[0.8, 0.6], [1.0, 0.0]]), documents, 0.5)
    torch.testing.assert_close(result.right, torch.tensor([0.8, 0.6]))
    torch.testing.assert_close(result.wrong, torch.tensor([0.96, 1.0]))  # b is not relevant to x
    assert result.rank.tolist() == [2, 2] and result.ndcg == 0.5


def test_a_picture_is_drawn(data, tmp_path):
    result = search_result(data, torch.tensor([[0.8, 0.6], [1.0, 0.0]]), torch.eye(3)[:, :2], 0.5)
    draw(tmp_path / "why.png", [{"step": 1, "loss": 2.0, "in_batch_accuracy": 0.5}], result, result)
    pixels = Image.open(tmp_path / "why.png").convert("L")
    assert pixels.size == (1560, 480) and len(set(pixels.get_flattened_data())) > 50
