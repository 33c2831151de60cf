"""Metrics against trec_eval's own numbers; search against brute force, ties included."""

import json
import lzma
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megatron_embed.errors import ConfigError, UserError
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.retrieval import (
    Rankings,
    evaluate_retrieval,
    metrics_per_query,
    retrieval_metrics,
)
from megatron_embed.evaluation.search import StreamedSearch, search
from tests.helpers.ranks import run_on_ranks

FIXTURES = Path(__file__).parent / "fixtures"
CHUNK = "megatron_embed.evaluation.search.DOCUMENTS_PER_CHUNK"
TREC_NAMES = {"map": "map", "ndcg@10": "ndcg_cut_10", "ndcg@100": "ndcg_cut_100", "recall@100": "recall_100",
              "precision@10": "P_10"}


def load_fixture(name: str) -> dict:
    """{"qrels", "run", "expected"}."""
    if name == "tiny_ties":
        return json.loads((FIXTURES / "tiny_ties.json").read_text())
    return json.loads(lzma.decompress((FIXTURES / f"{name}.json.xz").read_bytes()))


def read_lines(path: Path) -> list[str]:
    return lzma.decompress(path.read_bytes()).decode().splitlines()


@pytest.mark.parametrize("name", ["binary_b", "graded_a", "graded_c", "tiny_ties"])
def test_equal_to_trec_eval(name):
    fixture = load_fixture(name)
    qrels, run, expected = fixture["qrels"], fixture["run"], fixture["expected"]
    metrics, per_query = retrieval_metrics(qrels, run), metrics_per_query(qrels, run)
    assert per_query.keys() == qrels.keys()
    assert 0.1 < metrics["ndcg@10"] < 0.9
    # pytrec_eval's means leave out queries that the run lacks; ours count them as 0.
    answered = len(expected["per_query"]) / len(qrels)
    trec = expected["trec_eval_mean_over_run_queries"]
    for ours, theirs in TREC_NAMES.items():
        assert metrics[ours] == pytest.approx(trec[theirs] * answered, abs=1e-6), ours
        for query, values in expected["per_query"].items():
            assert per_query[query][ours] == pytest.approx(values[theirs], abs=1e-6), (query, ours)
    for k in (1, 3, 5):
        assert metrics[f"ndcg@{k}"] == pytest.approx(trec[f"ndcg_cut_{k}"] * answered, abs=1e-6)
    for query, values in expected["per_query"].items():
        rank = values["recip_rank"]
        assert per_query[query]["mrr@10"] == pytest.approx(rank if rank >= 0.1 else 0, abs=1e-6)
        assert per_query[query]["mrr@100"] == pytest.approx(rank, abs=1e-6)


@pytest.mark.parametrize("name", ["binary_b", "graded_a", "graded_c", "tiny_ties"])
def test_equal_to_ir_measures(name):
    """ir_measures averages over every query of the qrels, as we do."""
    fixture = load_fixture(name)
    metrics, expected = retrieval_metrics(fixture["qrels"], fixture["run"]), fixture["expected"]["ir_measures"]
    names = {"ndcg@3": "nDCG@3", "ndcg@10": "nDCG@10", "map": "AP@100", "recall@10": "R@10", "recall@100": "R@100",
             "precision@10": "P@10"}
    if name in ("binary_b", "graded_a"):  # on ties its RR@10 keeps the run's order, not trec_eval's: .6, ours .4
        names["mrr@10"] = "RR@10"
    assert {ours: metrics[ours] for ours in names} == pytest.approx(
        {ours: expected[theirs] for ours, theirs in names.items()}, abs=1e-6
    )


def test_known_conventions():
    """Not what other choices give: .5666 without hopeless queries, .5238 by exponential gain, .5126 over the run's
    queries only, .78615 by another rule for ties."""
    means = {name: retrieval_metrics(fixture["qrels"], fixture["run"])["ndcg@10"]
             for name in ("graded_a", "graded_c", "tiny_ties") for fixture in [load_fixture(name)]}
    assert means == pytest.approx({"graded_a": 0.5281391, "graded_c": 0.7860192, "tiny_ties": 0.4100510}, abs=1e-6)


def test_equal_to_nist_trec_eval():
    """NIST's own expected output has 4 decimals."""
    folder = FIXTURES / "nist_trec_eval"
    qrels: dict = defaultdict(dict)
    for line in read_lines(folder / "qrels.test.xz"):
        query, _, document, label = line.split()
        qrels[query][document] = int(label)
    run: dict = defaultdict(dict)
    for line in read_lines(folder / "results.test.xz"):
        query, _, document, _, score, _ = line.split()
        run[query][document] = float(score)
    expected = {name: value for name, _, value in map(str.split, (folder / "out.test.a").read_text().splitlines())}
    metrics = retrieval_metrics(dict(qrels), dict(run), ks=(5, 10, 100, 1000))
    names = {"map": "map", "mrr@1000": "recip_rank"}
    for k in (5, 10, 100, 1000):
        names |= {f"ndcg@{k}": f"ndcg_cut_{k}", f"recall@{k}": f"recall_{k}", f"precision@{k}": f"P_{k}"}
    assert len(qrels) == len(run) == 3
    for ours, theirs in names.items():
        assert f"{metrics[ours]:.4f}" == expected[theirs], ours


def test_empty_missing_and_unknown_queries():
    qrels = {"found": {"a": 2}, "missing": {"a": 1}, "empty": {"a": 1}, "hopeless": {"a": 0, "b": -1}}
    run = {"found": {"a": 0.5}, "empty": {}, "hopeless": {"a": 1.0}, "unknown": {"a": 1.0}}
    metrics = retrieval_metrics(qrels, run)
    assert metrics["ndcg@10"] == metrics["mrr@10"] == metrics["recall@1"] == metrics["map"] == 0.25
    assert retrieval_metrics({"missing": {"a": 1}}, {})["ndcg@10"] == 0.0


def test_reciprocal_rank_ties_follow_trec_eval():
    qrels = {"q": {"b": 1}}
    assert retrieval_metrics(qrels, {"q": {"b": 0.5, "c": 0.5, "a": 0.5}})["mrr@10"] == 0.5
    # Equal as float32, so the ids decide, though the float64 scores differ.
    nearly = retrieval_metrics(qrels, {"q": {"b": 1.0 + 1e-9, "c": 1.0}})
    assert nearly["mrr@10"] == nearly["map"] == 0.5
    assert retrieval_metrics(qrels, {"q": {"b": 1.0 + 1e-6, "c": 1.0}})["mrr@10"] == 1.0


def brute_force(queries, documents, k):
    """Sorted by score, then by index, both descending."""
    scores = (queries @ documents.T).tolist()
    rows = [sorted(((score + 0.0, index) for index, score in enumerate(row)), reverse=True)[:k] for row in scores]
    return [[score for score, _ in row] for row in rows], [[index for _, index in row] for row in rows]


@pytest.mark.parametrize("k", [1, 7, 64, 100])
@pytest.mark.parametrize("chunk", [1, 9, 10, 63, 64, 1000])
def test_search_equals_brute_force_with_ties(k, chunk, monkeypatch):
    monkeypatch.setattr(CHUNK, chunk)
    generator = torch.Generator().manual_seed(k * chunk)
    queries = torch.randint(-2, 3, (5, 4), generator=generator).float()  # small integers: exact scores, many equal
    queries[0] = 0
    documents = torch.randint(-2, 3, (64, 4), generator=generator).float()
    scores, indices = search(queries, documents, k)
    expected_scores, expected_indices = brute_force(queries, documents, k)
    assert any(len(set(row)) < len(row) for row in expected_scores) or k == 1
    assert scores.tolist() == expected_scores
    assert indices.tolist() == expected_indices
    assert scores.dtype == torch.float32 and scores.shape == (5, min(k, 64))


def test_search_keeps_every_bit_of_the_score(monkeypatch):
    monkeypatch.setattr(CHUNK, 50)
    queries, documents = torch.randn(3, 8), torch.randn(50, 8) * 1e-3
    scores, indices = search(queries, documents, 50)
    full = queries @ documents.T
    assert (full < 0).any() and (full > 0).any()
    assert torch.equal(scores, full.gather(1, indices))
    assert torch.equal(scores, full.sort(dim=1, descending=True).values)


def test_search_computes_in_float32():
    queries, documents = torch.randn(3, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    scores, indices = search(queries, documents, 20)
    assert torch.equal(scores, (queries.float() @ documents.float().T).gather(1, indices))


def test_blocks_equal_one_search(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (6, 3), generator=generator).float()
    documents = torch.randint(-1, 2, (40, 3), generator=generator).float()
    whole = search(queries, documents, 8)
    monkeypatch.setattr(CHUNK, 4)
    stream = StreamedSearch(queries, 8)
    for start, stop in ((0, 3), (3, 3), (3, 25), (25, 40)):  # short, empty and long blocks
        stream.add(documents[start:stop])
    for in_blocks, at_once in zip(stream.result(), whole, strict=True):
        assert torch.equal(in_blocks, at_once)


def test_negative_zero_ties_with_zero():
    scores, indices = search(torch.tensor([[1.0]]), torch.tensor([[0.0], [-0.0], [-1.0]]), 3)
    assert indices.tolist() == [[1, 0, 2]] and scores.tolist() == [[0.0, 0.0, -1.0]]


def test_two_stages_order_the_candidates_by_full_vectors(monkeypatch):
    monkeypatch.setattr(CHUNK, 6)
    generator = torch.Generator().manual_seed(2)
    queries, documents = (torch.randn(rows, 16, generator=generator) for rows in (7, 60))
    stream = StreamedSearch(queries[:, :4], 10, full_queries=queries)
    for block in documents.split(25):
        stream.add(block[:, :4], block)
    scores, indices = stream.result()
    full = queries @ documents.T
    candidates = (queries[:, :4] @ documents[:, :4].T).topk(10).indices
    expected = full.gather(1, candidates).sort(dim=1, descending=True)
    assert torch.equal(indices, candidates.gather(1, expected.indices))
    torch.testing.assert_close(scores, expected.values)
    assert not torch.equal(indices, full.topk(10).indices)


def one_hot_data(document_ids: list[str], qrels: dict[str, dict[str, int]]) -> BeirData:
    return BeirData(directory="toy", name="toy", document_ids=document_ids,
                    document_texts=[f"text of {d}" for d in document_ids], query_ids=list(qrels),
                    query_texts=[f"text of {q}" for q in qrels], qrels=qrels)


def test_evaluate_retrieval_breaks_ties_by_document_id(monkeypatch):
    """All scores are equal: trec_eval's order is z, m, c, a whatever the order of the file."""
    monkeypatch.setattr(CHUNK, 1)
    data = one_hot_data(["m", "a", "z", "c"], {"q": {"m": 1}})
    metrics = evaluate_retrieval(lambda texts, role: torch.ones(len(texts), 2), data)
    assert metrics["mrr@10"] == 0.5
    assert metrics["ndcg@10"] == pytest.approx(1 / math.log2(3))
    assert {"ndcg@10", "mrr@10", "recall@100", "map"} <= metrics.keys()


def test_evaluate_retrieval_ties_at_the_cut_follow_trec_eval(monkeypatch):
    """The 100 of largest id of 120 equal documents are found, so the relevant d020 is the last and d019 is not."""
    monkeypatch.setattr(CHUNK, 7)
    documents = [f"d{index:03}" for index in range(120)]
    data = one_hot_data(documents[::-1], {"in": {"d020": 1}, "out": {"d019": 1}})
    metrics = evaluate_retrieval(lambda texts, role: torch.ones(len(texts), 2), data, k=100)
    assert metrics["recall@100"] == 0.5
    assert metrics["map"] == pytest.approx(0.5 / 100)


def test_evaluate_retrieval_similarity_and_blocks(monkeypatch):
    vectors = {"text of long": [3.0, 3.0], "text of near": [1.0, 0.0], "text of q0": [2.0, 0.1],
               "text of q1": [2.0, 0.2], "text of q2": [0.3, 0.3]}
    roles = []

    def embed(texts, role):
        roles.append(role)
        return torch.tensor([vectors[text] for text in texts])

    data = one_hot_data(["long", "near"], {"q0": {"near": 1}, "q1": {"near": 1}, "q2": {"long": 1}})
    monkeypatch.setattr("megatron_embed.evaluation.retrieval.QUERIES_PER_BLOCK", 2)
    assert evaluate_retrieval(embed, data)["precision@1"] == 1.0
    assert evaluate_retrieval(embed, data, similarity="dot")["precision@1"] == pytest.approx(1 / 3)
    assert sorted(roles) == ["document", "document", "query", "query"]


def test_refuses_embeddings_that_are_not_finite():
    data = one_hot_data(["a", "b"], {"q": {"a": 1}})
    broken = {"document": torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]), "query": torch.ones(1, 2)}
    with pytest.raises(UserError, match="toy: 1 of 2 document embeddings are not finite"):
        evaluate_retrieval(lambda texts, role: broken[role], data)


def test_refuses_a_depth_below_the_cuts():
    with pytest.raises(ValueError, match="k = 10: the metrics look at the first 100 documents"):
        evaluate_retrieval(lambda texts, role: torch.ones(len(texts), 2), one_hot_data(["a"], {"q": {"a": 1}}), k=10)


def random_data(documents=300, queries=50):
    """Vectors whose leading numbers say less than all of them, and a set that asks for the nearest of each query."""
    generator = torch.Generator().manual_seed(5)
    vectors = {f"text of d{index}": torch.randn(16, generator=generator) for index in range(documents)}
    qrels = {}
    for index in range(queries):
        wanted = f"d{index * 3}"
        vectors[f"text of q{index}"] = vectors[f"text of {wanted}"] + torch.randn(16, generator=generator)
        qrels[f"q{index}"] = {wanted: 1 + index % 3, f"d{index * 3 + 1}": 1}
    data = one_hot_data([f"d{index}" for index in range(documents)], qrels)
    return data, lambda texts, role: torch.stack([vectors[text] for text in texts])


def test_corpus_in_blocks_and_every_width(monkeypatch):
    data, embed = random_data()
    whole = evaluate_retrieval(embed, data, k=100)
    sizes = []

    def counted(texts, role):
        sizes.append(len(texts))
        return embed(texts, role)

    monkeypatch.setattr("megatron_embed.evaluation.retrieval.DOCUMENTS_AT_ONCE", 70)
    monkeypatch.setattr(CHUNK, 33)
    metrics = evaluate_retrieval(counted, data, k=100, rankings=Rankings(dims=(2, 8), two_stage=4, candidates=20))
    assert sizes == [50, 70, 70, 70, 70, 20]
    assert {name: value for name, value in metrics.items() if "/" not in name} == pytest.approx(whole, abs=1e-12)
    for width in (2, 8):
        cut = evaluate_retrieval(lambda texts, role, width=width: embed(texts, role)[:, :width], data, k=100)
        assert {name: metrics[f"dim_{width}/{name}"] for name in cut} == pytest.approx(cut, abs=1e-12)
    assert metrics["dim_2/ndcg@10"] < metrics["dim_8/ndcg@10"] < metrics["ndcg@10"]
    assert metrics["dim_8/ndcg@10"] > 0.2
    # The second stage mends the order of the first, and cannot find what the first has missed.
    first = evaluate_retrieval(lambda texts, role: embed(texts, role)[:, :4], data, k=100)
    assert first["ndcg@10"] < metrics["two_stage_4/ndcg@10"] < metrics["ndcg@10"]
    everything = evaluate_retrieval(embed, data, k=300, rankings=Rankings(two_stage=1, candidates=300))
    assert everything["two_stage_1/map"] == pytest.approx(everything["map"])


def evaluated_by_ranks():
    import torch.distributed as dist

    data, embed = random_data()
    return evaluate_retrieval(embed, data, rankings=Rankings(dims=(4,), two_stage=4), group=dist.group.WORLD)


def test_ranks_share_the_queries_and_agree():
    one, (first, second, third) = run_on_ranks(evaluated_by_ranks, 1)[0], run_on_ranks(evaluated_by_ranks, 3)
    assert first == second == third
    assert first == pytest.approx(one, abs=1e-12) and one["ndcg@10"] > 0.3


@pytest.mark.parametrize("rankings, words", [
    (Rankings(dims=(4, 17)), "--dims 17: the model's vectors have 16 dimensions; choose 1 to 16"),
    (Rankings(two_stage=0), "--two-stage 0: the model's vectors have 16 dimensions"),
])
def test_refuses_widths_that_vectors_do_not_have(rankings, words):
    data, embed = random_data(documents=200)
    with pytest.raises(ConfigError, match=words):
        evaluate_retrieval(embed, data, rankings=rankings)
