"""Metrics and mined negatives as they follow from the stock library's scores of every document."""

import json

import pytest

from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command


def stock_metrics(run, folder):
    """Metrics of a BEIR folder. `run`: query id -> document id -> score."""
    from megatron_embed.evaluation.retrieval import retrieval_metrics

    qrels = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, label = line.split("\t")
        qrels.setdefault(query, {})[document] = int(label)
    return retrieval_metrics(qrels, {query: run[query] for query in qrels})


def mine_and_compare(directory, run, folder, tmp_path, overrides=(), **tolerance):
    """The negatives of each query are its best documents but its positive."""
    texts = {row["_id"]: f"{row['title']} {row['text']}" if row.get("title") else row["text"]
             for row in map(json.loads, (folder / "corpus.jsonl").read_text().splitlines())}
    queries = {row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").read_text().splitlines())}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(
        {"query": text, "positive": texts[max(run[query], key=run[query].get)]}) + "\n"
        for query, text in queries.items()))
    output = tmp_path / "mined.jsonl"
    results = run_on_ranks(command, 2, ["mine", "--model", str(directory), "--data", str(tmp_path / "rows.jsonl"),
                                        "--corpus", str(folder / "corpus.jsonl"), "--output", str(output),
                                        "--num-negatives", "3", "--range-min", "0",
                                        *overrides])
    assert all(code == 0 for code, *_ in results), results[0][2]
    for (query, scores), line in zip(run.items(), output.read_text().splitlines(), strict=True):
        row, ranked = json.loads(line), sorted(scores, key=scores.get, reverse=True)
        assert row["query"] == queries[query]
        assert row["negatives"] == [texts[name] for name in ranked[1:4]]
        assert row["teacher_scores"] == pytest.approx([scores[name] for name in ranked[:4]], **tolerance)
