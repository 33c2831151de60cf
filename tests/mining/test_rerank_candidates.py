"""Mining with a reranker equals Sentence Transformers' `mine_hard_negatives` with a `cross_encoder`."""

import dataclasses
import zlib

import pytest
import torch

from megatron_embed.errors import UserError
from megatron_embed.mining import rerank_candidates as reranking
from megatron_embed.mining.dense import mine_vectors
from megatron_embed.mining.filters import MiningOptions
from megatron_embed.mining.task import build_task
from tests.helpers.given_vectors import CORPUS, GivenVectors, record, rows, theirs
from tests.helpers.mining_runs import corpus_of

OPTIONS = {
    "max score": {"max_score": 0.6},
    "min score": {"min_score": 0.3, "num_negatives": 8},
    "absolute margin": {"absolute_margin": 0.05, "num_negatives": 4},
    "relative margin": {"relative_margin": 0.1, "num_negatives": 2},
    "all": {"relative_margin": 0.02, "absolute_margin": 0.01, "max_score": 0.9, "min_score": 0.2, "range_min": 2,
            "num_negatives": 4},
    "range": {"max_score": 0.8, "range_min": 1, "range_max": 12, "num_negatives": 5},
}


def opinion(query, document):
    """A probability for each pair, unrelated to the vectors."""
    return zlib.crc32(f"{query} {document}".encode()) / 2**32


class Opinions:
    """The part of a CrossEncoder that mining uses."""

    def predict(self, pairs, **options):
        assert options["convert_to_tensor"]
        return torch.tensor([opinion(*pair) for pair in pairs])


def score(pairs):
    return torch.tensor([opinion(pair.query, pair.document) for pair in pairs])


def ours(records, corpus, prompt="", **options):
    task = build_task(records, [prompt] * len(records), None if corpus is None else corpus_of(corpus))
    queries, documents = (torch.from_numpy(GivenVectors().encode_document(texts, normalize_embeddings=True))
                          for texts in ([text.removeprefix(prompt) for text in task.queries], task.documents))
    settings = MiningOptions(**options, reranked=True)
    mined = mine_vectors(queries, documents.split(17), task.positives, settings)
    results = reranking.rerank_candidates(mined, task, records, score, settings)
    for query, result in enumerate(results):
        text = records[task.row_of_query[query]].query
        for document, value in result.negatives:
            assert value == pytest.approx(opinion(text, task.documents[document]), abs=1e-6)
        assert result.positive_scores == pytest.approx(
            [opinion(text, task.documents[document]) for document in task.positives[query]], abs=1e-6)
    return {records[task.row_of_query[query]].query: [task.documents[document] for document, _ in result.negatives]
            for query, result in enumerate(results) if result.negatives}


@pytest.mark.parametrize("corpus", [None, CORPUS], ids=["own documents", "corpus"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_mine_hard_negatives(name, corpus, monkeypatch):
    monkeypatch.setattr(reranking, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr("megatron_embed.evaluation.search.DOCUMENTS_PER_CHUNK", 5)
    records, options = rows(), OPTIONS[name]
    expected = theirs(records, corpus, cross_encoder=Opinions(), **options)
    assert len(expected) > 4 and sum(map(len, expected.values())) > 10
    assert expected != theirs(records, corpus, **options)
    assert ours(records, corpus, **options) == expected
    assert ours(records, corpus, prompt="ask: ", **options) == expected


def test_without_bounds_the_best_of_ten_candidates_a_negative():
    records = rows()
    most_positives = build_task(records, [""] * len(records), corpus_of(CORPUS)).most_positives
    wide = ours(records, CORPUS, num_negatives=20, range_max=20 + most_positives)
    few = ours(records, CORPUS, num_negatives=2)
    assert {query: texts[:2] for query, texts in wide.items()} == few


def test_rows_with_other_instructions_are_reranked_by_themselves():
    records = [record("q1", ("d1.0",)), record("q1", ("d1.0",), instruction="other"), record("q1", ("d1.0",))]
    task = build_task(records, [""] * 3, corpus_of(CORPUS[:4]))
    assert task.query_of_row == [0, 1, 0] and task.row_of_query == [0, 1]
    pairs = [reranking.pair_of(task, records, query, 0) for query in (0, 1)]
    assert [(pair.query, pair.instruction, pair.source) for pair in pairs] == [("q1", None, "q1:1"),
                                                                              ("q1", "other", "q1:1")]


def test_scores_that_are_not_finite_are_refused():
    records = rows()[:3]
    task = build_task(records, [""] * 3, corpus_of(CORPUS[:6]))
    options = MiningOptions(reranked=True)
    queries = torch.eye(len(task.documents))[:len(task.queries)]
    mined = mine_vectors(queries, [torch.eye(len(task.documents))], task.positives, options)
    with pytest.raises(UserError, match="--reranker: 1 of .* scores are not finite"):
        reranking.rerank_candidates(
            mined, task, records, lambda pairs: torch.tensor([float("nan"), *[0.0] * (len(pairs) - 1)]), options)


def test_the_filters_wait_for_the_reranker():
    options = MiningOptions(reranked=True, max_score=-2.0, range_max=9)
    records = rows()
    task = build_task(records, [""] * len(records), corpus_of(CORPUS))
    queries, documents = (torch.from_numpy(GivenVectors().encode_document(texts, normalize_embeddings=True))
                          for texts in (task.queries, task.documents))
    mined = mine_vectors(queries, [documents], task.positives, options)
    assert all(9 <= len(result.negatives) <= 9 + task.most_positives for result in mined)
    assert not any(result.negatives for result in reranking.rerank_candidates(mined, task, records, score, options))
    assert dataclasses.replace(options, reranked=False).last_rank(1) == 9
