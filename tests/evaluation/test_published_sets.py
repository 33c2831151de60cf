"""Retrieval sets as they are published: judgements of texts that are missing, and queries that are documents.

The right values are those of Sentence Transformers' vectors and pytrec_eval.
"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from megatron_embed.__main__ import main
from megatron_embed.config.load import load_config
from megatron_embed.errors import ConfigError, DataError
from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.rerank_stage import RerankStage
from megatron_embed.evaluation.retrieval import Rankings, evaluate_retrieval, retrieval_metrics
from tests.helpers.beir_helpers import CORPUS, QUERIES, write_folder
from tests.helpers.commands import evaluated
from tests.helpers.rerank_stage_helpers import embed, score
from tests.helpers.toys import MINI_EN, MINILM

HEADER = "query-id\tcorpus-id\tscore\n"
MEASURES = {"ndcg_cut.10": "ndcg@10", "recall.100": "recall@100", "map": "map", "P.5": "precision@5"}


def stock_scores(folder: str) -> list[dict[str, float]]:
    """Sentence Transformers' vectors through pytrec_eval, with own ids and without; the files read here alone."""
    texts = {name: {str(row["_id"]): f"{row['title']} {row['text']}" if row.get("title") else row["text"]
                    for row in map(json.loads, Path(folder, f"{name}.jsonl").read_text().splitlines())}
             for name in ("corpus", "queries")}
    qrels: dict[str, dict[str, int]] = {}
    for line in Path(folder, "qrels", "test.tsv").read_text().splitlines()[1:]:
        query, document, label = line.split("\t")
        qrels.setdefault(query, {})[document] = int(label)
    model = SentenceTransformer(str(MINILM), device="cpu")
    query_ids = [query for query in texts["queries"] if query in qrels]
    scores = (model.encode([texts["queries"][query] for query in query_ids])
              @ model.encode(list(texts["corpus"].values())).T)
    metrics = []
    for drop_own_id in (False, True):
        run = {query: {name: float(value) for name, value in zip(texts["corpus"], row, strict=True)
                       if not (drop_own_id and name == query)} for query, row in zip(query_ids, scores, strict=True)}
        results = pytrec_eval.RelevanceEvaluator(qrels, set(MEASURES)).evaluate(run)
        metrics.append({ours: float(np.mean([values[theirs.replace(".", "_")] for values in results.values()]))
                        for theirs, ours in MEASURES.items()})
    return metrics


def published(folder: Path) -> str:
    """Twelve queries, each a document of the corpus too as in Quora, with judgements of texts that are not there."""
    rows = [json.loads(line) for line in MINI_EN.read_text().splitlines()[:24]]
    corpus = [{"_id": f"d{index}", "title": "", "text": row["positive"][0]} for index, row in enumerate(rows)]
    queries = [{"_id": f"q{index}", "text": row["query"]} for index, row in enumerate(rows[:12])]
    lines = []
    for index in range(12):
        lines.append(f"q{index}\td{index}\t{1 + index % 2}")
        lines += [f"q{index}\tgone{index}\t1"] * (index % 3 == 0) + [f"q{index}\tq{index}\t1"] * (index == 4)
    lines += ["ghost\td1\t1", "ghost\td2\t1"]
    return write_folder(folder, [*corpus, *queries], queries, HEADER + "\n".join(lines) + "\n")


def test_the_stock_libraries_numbers(tmp_path):
    folder = published(tmp_path / "set")
    stock = stock_scores(folder)
    for options, expected in zip(([], ["--drop-own-id"]), stock, strict=True):
        metrics = evaluated(["--model", str(MINILM), "--data", folder, *options], 1)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
        assert expected["recall@100"] < 1
    assert abs(stock[0]["ndcg@10"] - stock[1]["ndcg@10"]) > 0.05


def test_a_missing_document_is_never_found(tmp_path, caplog):
    """The case as it was reported: pytrec_eval gives 0.8066."""
    corpus = [{"_id": "d1", "title": "", "text": "The fox jumps over the dog"},
              {"_id": "d2", "title": "", "text": "Paris is the capital of France"},
              {"_id": "d3", "title": "", "text": "Berlin is in Germany"}]
    queries = [{"_id": "q1", "text": "capital of France"}, {"_id": "q2", "text": "which animal jumps"}]
    folder = write_folder(tmp_path / "set", corpus, queries, HEADER + "q1\td2\t1\nq2\td1\t1\nq2\tdX\t1\n")
    model = SentenceTransformer(str(MINILM), device="cpu")
    with caplog.at_level(logging.WARNING):
        data = load_beir(folder)
    metrics = evaluate_retrieval(lambda texts, role: torch.from_numpy(model.encode(list(texts))), data)
    assert metrics["ndcg@10"] == pytest.approx(0.8066, abs=1e-4)
    assert "test.tsv: 1 judgements name a document that corpus.jsonl lacks, the first at line 4; they count" in (
        caplog.text)


def test_a_query_without_text_is_left_out_of_the_mean(tmp_path, caplog):
    data = load_beir(write_folder(tmp_path / "set", qrels="q9\td1\t1\nq1\td1\t1\nq9\td2\t1\nq8\td7\t1\n"))
    assert (data.query_ids, data.qrels) == (["q1"], {"q1": {"d1": 1}})
    assert "left out 2 queries that queries.jsonl lacks, the first at line 1" in caplog.text
    assert "never found" not in caplog.text


@pytest.mark.parametrize("qrels, words", [
    ("q8\td1\t1\nq9\td1\t1\n", r"test\.tsv:1: none of the 2 judged queries is in queries\.jsonl; the files belong to"),
    ("q1\td8\t1\nq2\td9\t1\nq2\td1\t0\n", r"test\.tsv:1: none of the 2 documents with a label above 0 is in corpus"),
])
def test_files_of_different_sets_are_refused(tmp_path, qrels, words):
    with pytest.raises(DataError, match=words):
        load_beir(write_folder(tmp_path / "set", qrels=qrels))


def test_ids_with_blanks_are_the_files_own(tmp_path):
    """An id that the file spells with a blank is that one, not one that is missing."""
    corpus, queries = [{"_id": "d1 ", "text": "a"}, *CORPUS[1:]], [{"_id": " q1", "text": "b"}, *QUERIES[1:]]
    data = load_beir(write_folder(tmp_path / "set", corpus, queries, " q1\td1 \t1\r\nq2 \t d2\t 2\n"))
    assert data.qrels == {" q1": {"d1 ": 1}, "q2": {"d2": 2}}


def ranked_by_hand(data, width, candidates, full):
    """Metrics of the best `candidates` other documents by short vectors, with their scores by full ones if `full`."""
    run, documents = {}, embed(list(data.document_texts), "document")
    others = [[index for index, name in enumerate(data.document_ids) if name != query] for query in data.query_ids]
    for query, text, there in zip(data.query_ids, data.query_texts, others, strict=True):
        vector = embed([text], "query")
        short = (normalize(documents[:, :width], dim=1) @ normalize(vector[:, :width], dim=1).T)[there, 0]
        best = short.argsort(descending=True)[:candidates]
        scores = (normalize(documents, dim=1) @ normalize(vector, dim=1).T)[there, 0] if full else short
        run[query] = {data.document_ids[there[row]]: float(scores[row]) for row in best.tolist()}
    return retrieval_metrics(data.qrels, run)


def test_own_documents_are_in_no_ranking(tmp_path, monkeypatch):
    """Short vectors, two stages and a reranker's candidates too, where the corpus is smaller than the depth."""
    data = load_beir(published(tmp_path / "set"), drop_own_id=True)
    monkeypatch.setattr("megatron_embed.evaluation.search.DOCUMENTS_PER_CHUNK", 9)
    scored = []

    def recorded_score(pairs):
        scored.extend(pairs)
        return score(pairs)

    stage = RerankStage(score=recorded_score, candidates=100, weights=(0.5,))
    metrics = evaluate_retrieval(embed, data, rankings=Rankings(dims=(4,), two_stage=4, candidates=7, rerank=stage))
    for prefix, expected in (("", ranked_by_hand(data, 8, 100, False)), ("dim_4/", ranked_by_hand(data, 4, 100, False)),
                             ("two_stage_4/", ranked_by_hand(data, 4, 7, True))):
        assert {name: metrics[f"{prefix}{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert scored and all(query != document for query, document in scored)
    whole = evaluate_retrieval(embed, load_beir(str(tmp_path / "set")))
    assert whole["ndcg@10"] != metrics["ndcg@10"] > 0


def test_a_corpus_of_the_query_alone_has_no_ranking(tmp_path):
    data = load_beir(write_folder(tmp_path / "set", [{"_id": "q1", "text": "warm?"}], qrels="q1\tq1\t1\n"),
                     drop_own_id=True)
    assert set(evaluate_retrieval(embed, data).values()) == {0.0}


def test_the_setting(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\nevaluation: {drop_own_id: true}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: evaluation\.drop_own_id = True: nothing is searched; name a"):
        load_config(str(path), [])
    assert load_config(str(path), ["evaluation.retrieval=set"]).evaluation.drop_own_id
    (tmp_path / "pairs.jsonl").write_text('{"text_a": "a", "text_b": "b", "score": 1}\n')
    assert main(["evaluate", "--model", str(MINILM), "--data", str(tmp_path / "pairs.jsonl"), "--drop-own-id"]) == 2
    assert "--drop-own-id: has no effect on a file of pairs; leave it out" in capsys.readouterr().err
