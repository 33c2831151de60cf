"""Ranking metrics of lists against formulas written out: graded labels, ties, lists without a relevant document."""

import json
import math

import pytest
import torch

from megatron_embed.data.pair_batches import pairs_of
from megatron_embed.errors import DataError, UserError
from megatron_embed.evaluation.reranking import evaluate_reranking, load_rerank_file, similarity_of_pairs

ROWS = [{"query": "a", "documents": ["p", "q", "r", "s"], "labels": [0, 3, 1, 0]},
        {"query": "b", "docs": [{"text": "t", "label": 1}, {"text": "u", "label": 0}]},
        {"query": "c", "documents": ["v", "w"], "labels": [0, 0]}]
SCORES = [0.5, 0.1, 0.9, 0.1, 0.3, 0.3, 1.0, 2.0]


@pytest.fixture
def data(tmp_path):
    for index, form in enumerate((ROWS[::2], ROWS[1:2])):
        (tmp_path / f"{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in form))
    return tmp_path


def test_metrics_written_out(data):
    lists = load_rerank_file(str(data / "0.jsonl"))
    metrics = evaluate_reranking(lambda pairs: torch.tensor(SCORES[:4] + SCORES[6:]), lists)
    # r (1), p (0), then the tie of q (3) and s (0): the later document of the list first.
    gains = [1, 0, 0, 3]
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    expected = sum(gain / math.log2(2 + rank) for rank, gain in enumerate(gains)) / ideal
    assert metrics["ndcg@10"] == pytest.approx(expected / 2, abs=1e-6)  # the second list counts 0
    assert metrics["ndcg@1"] == pytest.approx(1 / 3 / 2, abs=1e-6)
    assert metrics["mrr@10"] == pytest.approx(1 / 2, abs=1e-6)
    assert metrics["map"] == pytest.approx((1 / 1 + 2 / 4) / 2 / 2, abs=1e-6)


def test_other_spelling_and_ties(data):
    lists = load_rerank_file(str(data / "1.jsonl"))
    assert [pair.document for record in lists.lists for pair in pairs_of(record)] == ["t", "u"]
    assert evaluate_reranking(lambda pairs: torch.tensor([0.3, 0.3]), lists)["mrr@10"] == 0.5


def test_an_embedding_models_similarities(data):
    lists = load_rerank_file(str(data / "0.jsonl"))
    vectors = {text: torch.tensor([float(ord(text) - 96), 1.0]) for text in "acpqrsvw"}
    encoded = []

    def encode(texts, role):
        encoded.extend(texts)
        return torch.stack([vectors[text] for text in texts])

    pairs = [pair for record in lists.lists for pair in pairs_of(record)]
    for similarity in ("cosine", "dot"):
        similarities = similarity_of_pairs(encode, pairs, similarity=similarity)
        expected = [torch.nn.functional.cosine_similarity(vectors[pair.query], vectors[pair.document], dim=0)
                    if similarity == "cosine" else vectors[pair.query] @ vectors[pair.document] for pair in pairs]
        torch.testing.assert_close(similarities, torch.stack(expected))
    assert len(encoded) == 2 * len(set(encoded))


def test_refusals(data):
    (data / "half.jsonl").write_text('{"query": "a", "documents": ["b"], "labels": [0.5]}\n')
    with pytest.raises(DataError, match=r"half.jsonl:1: label 0.5: ranking metrics take whole numbers"):
        load_rerank_file(str(data / "half.jsonl"))
    (data / "large.jsonl").write_text('{"query": "a", "documents": ["b"], "labels": [2147483648]}\n')
    with pytest.raises(DataError, match=r"large.jsonl:1: label = 2147483648.0: ranking metrics take grades up to"):
        load_rerank_file(str(data / "large.jsonl"))
    lists = load_rerank_file(str(data / "1.jsonl"))
    with pytest.raises(UserError, match="1 of 2 scores are not finite"):
        evaluate_reranking(lambda pairs: torch.tensor([0.3, math.nan]), lists)
