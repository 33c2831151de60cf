"""`search`: from an encoded corpus and queries to the hits that exact comparison of the vectors gives."""

import io
import json
import sys

import numpy as np
import pytest

from tests.helpers.refusals import assert_refused, command, model  # noqa: F401  a fixture
from tests.helpers.toys import MINI_EN

pytest.importorskip("faiss")
TEXTS = [json.loads(line)["positive"][0] for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:30]]
QUERIES = ["the history of a town", "a chemical element", "a river in Europe"]


@pytest.fixture(scope="module")
def corpus(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"_id": f"d{row}", "text": text} for row, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    code, _, err, _ = command(["encode", "--model", model, "--input", str(folder / "texts.jsonl"), "--output",
                               str(folder / "vectors.npy"), "--role", "document", "--pooling", "mean"])
    assert code == 0, err
    return folder


def arguments(model, corpus, *more):
    return ["search", "--model", model, "--vectors", str(corpus / "vectors.npy"), "--texts",
            str(corpus / "texts.jsonl"), "--pooling", "mean", *more]


def test_hits_of_every_source_of_queries(model, corpus, monkeypatch, caplog):
    (corpus / "queries.jsonl").write_text(json.dumps({"query": QUERIES[1]}) + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUERIES[2]}\n\n"))
    code, out, err, _ = command(arguments(model, corpus, "--query", QUERIES[0], "--queries", "-", "--top-k", "4",
                                          "--format", "jsonl"))
    assert code == 0, err
    assert "another model" not in "".join(caplog.messages)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["query"] for answer in answers] == [QUERIES[0], QUERIES[2]]
    vectors = np.load(corpus / "vectors.npy")
    for answer in answers:
        hits = answer["hits"]
        assert [hit["rank"] for hit in hits] == [1, 2, 3, 4]
        assert [(hit["id"], hit["text"]) for hit in hits] == [(f"d{hit['row']}", TEXTS[hit["row"]]) for hit in hits]
    asked = embedded(model, [QUERIES[0], QUERIES[2]])
    scores = asked @ vectors.T
    assert [[hit["row"] for hit in answer["hits"]] for answer in answers] == np.argsort(-scores)[:, :4].tolist()
    np.testing.assert_allclose([answer["hits"][0]["score"] for answer in answers], scores.max(axis=1), atol=1e-5)


def embedded(model, texts):
    import megatron_embed

    return megatron_embed.load(model, pooling="mean").encode(texts, "query")


def test_graph_and_table(model, corpus, caplog):
    (corpus / "queries.jsonl").write_text(json.dumps({"query": QUERIES[1]}) + "\n")
    code, out, err, _ = command(arguments(model, corpus, "--queries", str(corpus / "queries.jsonl"), "--index", "hnsw",
                                          "--top-k", "3", "--dim", "16"))
    assert code == 0, err
    assert "recall@3 of HNSW against the exact search: 1.0000 (1 queries)" in caplog.messages
    lines = out.splitlines()
    assert lines[0] == f"query: {QUERIES[1]}" and [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert lines[1].split()[2].startswith("d") and all(len(line) <= 120 for line in lines)
    assert (corpus / "vectors.npy.hnsw-16.faiss").is_file()
    code, other, err, _ = command(arguments(model, corpus, "--queries", str(corpus / "queries.jsonl"), "--index", "ivf",
                                            "--top-k", "3", "--dim", "16"))
    assert code == 0, err
    assert "recall@3 of IVF against the exact search: 1.0000 (1 queries)" in caplog.messages
    assert other.splitlines() == lines and (corpus / "vectors.npy.ivf-16" / "000000.faiss").is_file()


def test_texts_of_all_hits_begin_in_one_column():
    from megatron_embed.run.search_command import table

    hits = [{"rank": rank, "score": 0.5, "row": rank, "id": name, "text": "x" * 200}
            for rank, name in enumerate(("a", "document 22", "c"), start=1)]
    lines = table("q", hits, 80)[1:4]
    assert [line.index("x") for line in lines] == [lines[0].index("x")] * 3
    assert all(len(line) == 80 and line.endswith("x…") for line in lines)


@pytest.mark.parametrize("more, words", [
    ([], ["--query", "there is no query"]),
    (["--query", "a", "--ef-search", "9"], ["--ef-search", "--index hnsw"]),
    (["--query", "a", "--probes", "9"], ["--probes", "--index ivf"]),
    (["--query", "a", "--dim", "33"], ["--dim 33", "have 32 components"]),
    (["--queries", "missing.txt"], ["--queries", "no such file"]),
])
def test_refusals(model, corpus, more, words):
    assert_refused([command(arguments(model, corpus, *more))], *words)


def test_texts_of_another_number_are_refused(model, corpus, tmp_path):
    other = tmp_path / "texts.jsonl"
    other.write_text('{"text": "one"}\n')
    given = arguments(model, corpus, "--query", "a")
    given[given.index("--texts") + 1] = str(other)
    assert_refused([command(given)], "30 vectors for the 1 texts")


def test_vectors_of_another_model_are_noticed(model, corpus, tmp_path, caplog):
    given = arguments(model, corpus, "--query", "a")
    np.save(tmp_path / "vectors.npy", np.load(corpus / "vectors.npy")[::-1])
    given[given.index("--vectors") + 1] = str(tmp_path / "vectors.npy")
    assert command(given)[0] == 0
    assert "was it encoded by another model" in "".join(caplog.messages)


def test_without_faiss(model, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert_refused([command(arguments(model, corpus, "--query", "a"))], "megatron_embed[search]")
