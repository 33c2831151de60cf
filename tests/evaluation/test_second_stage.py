"""A reranker's order of the documents found, against formulas written out; the same on every number of ranks."""


import pytest
import torch
from torch.nn.functional import normalize

from megatron_embed.errors import UserError
from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.retrieval import evaluate_retrieval, retrieval_metrics
from megatron_embed.evaluation.second_stage import SecondStage
from tests.helpers.commands import small_beir  # noqa: F401  a fixture
from tests.helpers.ranks import run_on_ranks
from tests.helpers.second_stage_helpers import embed, score, vector


def brute_force(data, candidates, weight):
    """Metrics of a run that a reranker made of the nearest documents."""
    run = {}
    for query, text in zip(data.query_ids, data.query_texts, strict=True):
        similarity = normalize(embed(data.document_texts, "document"), dim=1) @ normalize(vector(text), dim=0)
        best = similarity.argsort(descending=True)[:candidates]
        first, second = similarity[best], score([(text, data.document_texts[number]) for number in best])
        if weight < 1:
            first, second = ((scores - scores.min()) / (scores.max() - scores.min()) for scores in (first, second))
        mixed = second if weight == 1 else (1 - weight) * first + weight * second
        run[query] = {data.document_ids[number]: float(value) for number, value in zip(best, mixed, strict=True)}
    return retrieval_metrics(data.qrels, run)


def measured(folder):
    import torch.distributed as dist

    return evaluate_retrieval(embed, load_beir(str(folder)), group=dist.group.WORLD, second_stage=SecondStage(
        score=score, candidates=7, weights=(0.25, 0.5)))


def test_orders_are_the_formulas(small_beir, monkeypatch):
    monkeypatch.setattr("megatron_embed.evaluation.second_stage.PAIRS_AT_ONCE", 20)
    data = load_beir(str(small_beir))
    found = evaluate_retrieval(embed, data, second_stage=SecondStage(score=score, candidates=7, weights=(0.25, 0.5)))
    for prefix, weight in (("reranked/", 1), ("reranked_0.25/", 0.25), ("reranked_0.5/", 0.5)):
        expected = brute_force(data, 7, weight)
        assert {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)} == (
            pytest.approx(expected, abs=1e-6))
        assert 0 < expected["ndcg@10"] != found["ndcg@10"]
    plain = {name: value for name, value in found.items() if "/" not in name}
    assert plain == pytest.approx(evaluate_retrieval(embed, data), abs=1e-9)


def test_ranks_share_the_queries(small_beir):
    first, second = run_on_ranks(measured, 2, small_beir)
    assert first == second
    assert first == pytest.approx(run_on_ranks(measured, 1, small_beir)[0], abs=1e-9)


def test_equal_scores_leave_the_other_order(small_beir):
    """A reranker that has no opinion changes nothing where its weight is below 1."""
    data = load_beir(str(small_beir))
    found = evaluate_retrieval(embed, data, second_stage=SecondStage(
        score=lambda pairs: torch.full((len(pairs),), 3.5), candidates=20, weights=(0.9,)))
    assert found["reranked_0.9/ndcg@10"] == pytest.approx(found["ndcg@10"], abs=1e-9)


def test_scores_that_are_not_finite_are_refused(small_beir):
    stage = SecondStage(score=lambda pairs: torch.full((len(pairs),), float("inf")), candidates=3)
    with pytest.raises(UserError, match="--reranker: .* scores are not finite"):
        evaluate_retrieval(embed, load_beir(str(small_beir)), second_stage=stage)
