"""Reranked metrics against formulas written out; the same on every number of ranks."""

import pytest
import torch
from torch.nn.functional import normalize

from megatron_embed.errors import UserError
from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.rerank_stage import RerankStage
from megatron_embed.evaluation.retrieval import Rankings, evaluate_retrieval, retrieval_metrics
from tests.helpers.commands import small_beir  # noqa: F401  a fixture
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rerank_stage_helpers import embed, score, vector


def brute_force(data, candidates, weight):
    """Metrics of a reranker's order of the nearest documents."""
    run = {}
    for query, text in zip(data.query_ids, data.query_texts, strict=True):
        similarity = normalize(embed(data.document_texts, "document"), dim=1) @ normalize(vector(text), dim=0)
        best = similarity.argsort(descending=True)[:candidates]
        first, second = similarity[best], score([(text, data.document_texts[document]) for document in best])
        if weight < 1:
            first, second = ((scores - scores.min()) / (scores.max() - scores.min()) for scores in (first, second))
        mixed = second if weight == 1 else (1 - weight) * first + weight * second
        run[query] = {data.document_ids[document]: float(value) for document, value in zip(best, mixed, strict=True)}
    return retrieval_metrics(data.qrels, run)


def reranked(candidates, weights=(), score=score):
    return Rankings(rerank=RerankStage(score=score, candidates=candidates, weights=weights))


def measured(folder):
    import torch.distributed as dist

    return evaluate_retrieval(embed, load_beir(str(folder)), rankings=reranked(7, (0.25, 0.5)),
                              group=dist.group.WORLD)


def test_orders_are_the_formulas(small_beir, monkeypatch):
    monkeypatch.setattr("megatron_embed.evaluation.rerank_stage.PAIRS_AT_ONCE", 20)
    data = load_beir(str(small_beir))
    metrics = evaluate_retrieval(embed, data, rankings=reranked(7, (0.25, 0.5)))
    for prefix, weight in (("reranked/", 1), ("reranked_0.25/", 0.25), ("reranked_0.5/", 0.5)):
        expected = brute_force(data, 7, weight)
        assert {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)} == (
            pytest.approx(expected, abs=1e-6))
        assert 0 < expected["ndcg@10"] != metrics["ndcg@10"]
    plain = {name: value for name, value in metrics.items() if "/" not in name}
    assert plain == pytest.approx(evaluate_retrieval(embed, data), abs=1e-9)


def test_ranks_share_the_queries(small_beir):
    first, second = run_on_ranks(measured, 2, small_beir)
    assert first == second
    assert first == pytest.approx(run_on_ranks(measured, 1, small_beir)[0], abs=1e-9)


def test_equal_scores_leave_the_other_order(small_beir):
    """A reranker that has no opinion changes nothing where its weight is below 1."""
    data = load_beir(str(small_beir))
    rankings = reranked(20, (0.9,), score=lambda pairs: torch.full((len(pairs),), 3.5))
    metrics = evaluate_retrieval(embed, data, rankings=rankings)
    assert metrics["reranked_0.9/ndcg@10"] == pytest.approx(metrics["ndcg@10"], abs=1e-9)


def test_scores_that_are_not_finite_are_refused(small_beir):
    rankings = reranked(3, score=lambda pairs: torch.full((len(pairs),), float("inf")))
    with pytest.raises(UserError, match="--reranker: .* scores are not finite"):
        evaluate_retrieval(embed, load_beir(str(small_beir)), rankings=rankings)
