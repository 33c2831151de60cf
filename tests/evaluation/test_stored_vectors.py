"""Vectors in the bytes of Sentence Transformers, and searches that rank as its searches do."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss

from megatron_embed.errors import CheckpointError, DataError
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.retrieval import Rankings, evaluate_retrieval, retrieval_metrics
from megatron_embed.evaluation.stored_vectors import as_dtype, ranges_of, ranges_text, read_ranges
from megatron_embed.names import RANGES_FILE
from tests.helpers.ranks import run_on_ranks

DIM, DOCUMENTS, CANDIDATES = 40, 260, 20


def unit_vectors(rows, width=DIM, seed=1):
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("width", [DIM, 13])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_bytes_are_those_of_sentence_transformers(dtype, width):
    vectors = unit_vectors(500, width)
    vectors[:, 3], vectors[0, 0], vectors[:, 5] = 0.5, 0.0, vectors[:, 5] * 3
    for ranges in (ranges_of(vectors), ranges_of(vectors[:20])):  # also vectors beyond their ranges
        ours, stock = as_dtype(vectors, dtype, ranges), quantize_embeddings(vectors, dtype, ranges=ranges)
        assert ours.dtype == stock.dtype and ours.shape == stock.shape and ours.tobytes() == stock.tobytes()
    assert np.array_equal(as_dtype(vectors, "int8", ranges_of(vectors)), quantize_embeddings(vectors, "int8"))
    assert len(set(as_dtype(vectors, dtype, ranges_of(vectors)).ravel().tolist())) > 50


def test_ranges_are_read_as_they_were_written(tmp_path):
    assert read_ranges(tmp_path) == {}
    ranges = {width: ranges_of(unit_vectors(50)[:, :width]) for width in (DIM, 8)}
    (tmp_path / RANGES_FILE).write_text(ranges_text(ranges))
    for source in (tmp_path, tmp_path / RANGES_FILE):
        read = read_ranges(source)
        assert read.keys() == ranges.keys() and all(np.array_equal(read[width], ranges[width]) for width in ranges)


def test_numbers_that_overflow_are_refused():
    vectors = torch.tensor([[1.0, 65504.0], [-7e4, 1.0]])
    assert np.isfinite(as_dtype(vectors[:1], "float16")).all()
    with pytest.raises(DataError, match="--output-dtype float16: a component is too large for it .*7e.04"):
        as_dtype(vectors, "float16")
    with pytest.raises(DataError, match="--output-dtype int8: the range of a component is too large"):
        as_dtype(vectors, "int8", np.array([[-3e38, 0], [3e38, 1]], dtype=np.float32))


@pytest.mark.parametrize("content", [{"2": [[0, 1]]}, {"2": [[0, 1], [1, 0]]}, {"3": [[0, 1], [1, 2]]}, {"2": "x"},
                                     {"2": [[-3e38, 0], [3e38, 1]]},
                                     {"2": [[0, 1], [1, 1e99]]}, {"2": [[0], [1, 2]]}, {"x": [[0, 1], [1, 2]]}])
def test_damaged_ranges_are_refused(tmp_path, content):
    (tmp_path / RANGES_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{RANGES_FILE}: '.' must be .smallest, largest., two lists of"):
        read_ranges(tmp_path)


def data_without_ties():
    """(vectors of queries, vectors of documents, set): queries whose candidates by Hamming distance are certain."""
    documents = unit_vectors(DOCUMENTS)
    wanted = torch.arange(0, DOCUMENTS, 2)
    queries = torch.nn.functional.normalize(documents[wanted] + 0.22 * torch.randn(
        len(wanted), DIM, generator=torch.Generator().manual_seed(3)), dim=1)
    distances = (queries[:, None].sign() != documents[None].sign()).sum(dim=2).sort(dim=1).values
    chosen = (distances[:, CANDIDATES - 1] < distances[:, CANDIDATES]).nonzero()[:, 0]
    assert len(chosen) >= 10
    names = [f"d{index:03}" for index in range(DOCUMENTS)]
    qrels = {f"q{index}": {names[int(wanted[index])]: 1} for index in chosen.tolist()}
    data = BeirData(directory="toy", name="toy", document_ids=names, document_texts=names, query_ids=list(qrels),
                    query_texts=list(qrels), qrels=qrels)
    return queries[chosen], documents, data


def evaluated(queries, documents, data, **rankings):
    by_name = dict(zip([*data.query_ids, *data.document_ids], [*queries, *documents], strict=True))
    return evaluate_retrieval(lambda texts, role: torch.stack([by_name[text] for text in texts]), data,
                              rankings=Rankings(**rankings))


def stock_metrics(queries, documents, data, precision, ranges=None, **options):
    """By Sentence Transformers' exact search."""
    corpus = quantize_embeddings(documents, precision, ranges=ranges)
    hits, _ = semantic_search_faiss(queries.numpy(), corpus_embeddings=corpus, corpus_precision=precision,
                                    ranges=ranges, **options)
    sign = 1.0 if options["rescore"] else -1.0  # of distances, the smallest is the best
    run = {query: {data.document_ids[hit["corpus_id"]]: sign * hit["score"] for hit in best}
           for query, best in zip(data.query_ids, hits, strict=True)}
    return retrieval_metrics(data.qrels, run)


def test_rankings_are_those_of_sentence_transformers():
    queries, documents, data = data_without_ties()
    metrics = evaluated(queries, documents, data, dims=(16,), candidates=CANDIDATES,
                        precisions=("float32", "int8", "binary", "rescore"))
    prefixes = {name.rpartition("/")[0] for name in metrics}
    stored = {"int8", "binary", "rescore"}
    assert prefixes == {"", "dim_16", *stored, *(f"dim_16/{precision}" for precision in stored)}
    expected = {
        "binary": stock_metrics(queries, documents, data, "ubinary", top_k=DOCUMENTS, rescore=False),
        "rescore": stock_metrics(queries, documents, data, "ubinary", top_k=10, rescore=True, rescore_multiplier=2),
        "int8": stock_metrics(queries, documents, data, "uint8", ranges_of(documents), top_k=DOCUMENTS, rescore=True,
                              rescore_multiplier=1)}
    for precision, stock in expected.items():
        for name in ("ndcg@10", "mrr@10", "recall@10", "precision@1", *(["map"] if precision != "rescore" else [])):
            assert metrics[f"{precision}/{name}"] == pytest.approx(stock[name], abs=1e-9), (precision, name)
    assert metrics["binary/ndcg@10"] < metrics["rescore/ndcg@10"] < metrics["ndcg@10"]
    cut = evaluated(torch.nn.functional.normalize(queries[:, :16], dim=1),
                    torch.nn.functional.normalize(documents[:, :16], dim=1), data, candidates=CANDIDATES,
                    precisions=("int8", "binary", "rescore"))
    for precision in stored:
        assert metrics[f"dim_16/{precision}/ndcg@10"] == cut[f"{precision}/ndcg@10"]


def test_given_ranges_are_used():
    queries, documents, data = data_without_ties()
    own = evaluated(queries, documents, data, precisions=("int8",))
    narrow = ranges_of(documents) * np.float32(0.02)
    metrics = evaluated(queries, documents, data, precisions=("int8",), ranges={DIM: narrow})
    assert metrics["int8/ndcg@10"] != own["int8/ndcg@10"] and metrics["ndcg@10"] == own["ndcg@10"]
    stock = stock_metrics(queries, documents, data, "uint8", narrow, top_k=DOCUMENTS, rescore=True,
                          rescore_multiplier=1)
    assert metrics["int8/ndcg@10"] == pytest.approx(stock["ndcg@10"], abs=1e-9)


def evaluated_by_ranks():
    import torch.distributed as dist

    from megatron_embed.evaluation import retrieval

    queries, documents, data = data_without_ties()
    by_name = dict(zip([*data.query_ids, *data.document_ids], [*queries, *documents], strict=True))
    retrieval.DOCUMENTS_AT_ONCE, retrieval.CALIBRATION_VECTORS = 60, 50
    try:
        return evaluate_retrieval(lambda texts, role: torch.stack([by_name[text] for text in texts]), data,
                                  rankings=Rankings(dims=(16,), precisions=("int8", "binary", "rescore")),
                                  group=dist.group.WORLD)
    finally:
        retrieval.DOCUMENTS_AT_ONCE, retrieval.CALIBRATION_VECTORS = 4096, 4096


def test_ranks_agree_on_ranges_and_rankings():
    one, two = run_on_ranks(evaluated_by_ranks, 1)[0], run_on_ranks(evaluated_by_ranks, 2)
    assert two[0] == two[1] == pytest.approx(one, abs=1e-12)
