"""`mine` on one and two ranks: the same rows as the library's search, a cache that knows its model, refusals."""

import itertools
import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from megatron_embed.__main__ import main
from megatron_embed.data.dataset import RecordFile
from megatron_embed.data.records import shared_keys, text_id
from tests.helpers.adapter_reference import write_adapter
from tests.helpers.mining_runs import data, mined, model  # noqa: F401  fixtures
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command


def expected_rows(model, records, num_negatives, prompt=""):
    """(negatives, teacher scores) of each row by brute force over the stock library's vectors."""
    stock = SentenceTransformer(str(model), device="cpu")
    documents = list(dict.fromkeys(text for record in records for text in (*record.positive, *record.negatives)))
    documents.sort(key=lambda text: [text in record.positive for record in records].index(True)
                   if any(text in record.positive for record in records) else len(records))
    queries = stock.encode([prompt + record.query for record in records])
    vectors = stock.encode(documents)
    rows = []
    for record, query in zip(records, queries, strict=True):
        positives = {text for other in records if other.query == record.query for text in other.positive}
        scores = vectors @ query
        order = [document for document in np.argsort(-scores) if documents[document] not in positives][:num_negatives]
        rows.append(([documents[document] for document in order],
                     [*(scores[documents.index(text)] for text in record.positive), *scores[order]]))
    return rows


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_have_the_nearest_documents_as_negatives(ranks, model, data, tmp_path):
    output = tmp_path / "mined.jsonl"
    mined(["--model", model, "--data", data, "--output", output, "--num-negatives", 2, "--query-prompt", "ask: "],
          ranks)
    before, after = list(RecordFile(str(data))), list(RecordFile(str(output)))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    expected = expected_rows(model, before, 2, "ask: ")
    for old, new, row, (negatives, scores) in zip(before, after, rows, expected, strict=True):
        assert (new.query, new.positive, new.instruction) == (old.query, old.positive, old.instruction)
        assert list(new.negatives) == negatives
        assert row["teacher_scores"] == pytest.approx(scores, abs=1e-5)
        assert len(row["teacher_scores"]) == len(new.positive) + 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["mined.jsonl"]


def test_instructions_fill_the_prompt(model, data, tmp_path, capsys):
    arguments = ["mine", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "mined.jsonl"),
                 "--query-prompt", "{instruction}: "]
    assert main(arguments) == 2
    assert f"{data}:2: the query prompt '{{instruction}}: ' needs an instruction" in capsys.readouterr().err


def test_cache_is_used_and_never_for_another_model(model, data, tmp_path):
    cache, changed = tmp_path / "cache", tmp_path / "changed"
    arguments = ["--data", data, "--cache", cache, "--num-negatives", 2, "--output"]
    mined(["--model", model, *arguments, tmp_path / "first.jsonl"], 2)
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2 and all(name.endswith(".npy") for name in files)
    vectors = np.load(next(iter(cache.glob("*.npy"))))
    assert vectors.dtype == np.float32 and np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    mined(["--model", model, *arguments, tmp_path / "again.jsonl"], 2)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "first.jsonl").read_text()
    # What is in the cache is what is searched.
    for path in cache.iterdir():
        np.save(path, np.roll(np.load(path), 1, axis=0))
    mined(["--model", model, *arguments, tmp_path / "rolled.jsonl"])
    assert (tmp_path / "rolled.jsonl").read_text() != (tmp_path / "first.jsonl").read_text()
    shutil.copytree(model, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    mined(["--model", changed, *arguments, tmp_path / "changed.jsonl"])
    assert len(list(cache.iterdir())) == 4
    mined(["--model", model, *arguments, tmp_path / "prompt.jsonl", "--document-prompt", "passage: "])
    assert len(list(cache.iterdir())) == 5


@pytest.mark.slow
def test_cache_keeps_adapters_of_one_base_apart(model, data, tmp_path):
    """Base, two adapters of it, and an adapter of the same tensors with another scale, into one cache."""
    models = {"base": model, "a": write_adapter(tmp_path / "a", model)}
    models["b"] = shutil.copytree(models["a"], tmp_path / "b")
    tensors = load_file(models["a"] / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, models["b"] / "adapter_model.safetensors")
    models["scaled"] = shutil.copytree(models["a"], tmp_path / "scaled")
    settings = json.loads((models["a"] / "adapter_config.json").read_text())
    (models["scaled"] / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 12}))
    scores = {}
    for name, path in models.items():
        arguments = ["--model", path, "--data", data, "--output", tmp_path / "out.jsonl"]
        mined(arguments)
        alone = (tmp_path / "out.jsonl").read_text()
        mined([*arguments, "--cache", tmp_path / "cache"])
        assert (tmp_path / "out.jsonl").read_text() == alone, name
        scores[name] = [json.loads(line)["teacher_scores"] for line in alone.splitlines()]
    assert all(scores[one] != scores[other] for one, other in itertools.combinations(models, 2))
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(models)


def test_bm25_writes_from_one_process(data, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    query = json.loads(data.read_text().splitlines()[0])["query"]
    corpus.write_text(json.dumps({"title": "Echo", "text": query}) + '\n{"text": "a river in Texas"}\n')
    output = tmp_path / "mined.jsonl"
    results = mined(["--model", "bm25", "--data", data, "--corpus", corpus, "--output", output], 2)
    assert "60 rows" in results[0][2] or results[0][2] == ""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 60
    assert rows[0]["negatives"][0] == f"Echo {query}"


def test_ids_of_documents_survive(tmp_path):
    """Rows with ids, with a corpus that names its documents and one that does not; what is written is read again."""
    train, corpus, output = tmp_path / "train.jsonl", tmp_path / "corpus.jsonl", tmp_path / "mined.jsonl"
    rows = [{"query": "red apple", "positive": ["apple pie", "apple"], "positive_ids": ["p1", 7]},
            {"query": "blue car", "positive": "a car", "negatives": ["blue apple"], "positive_ids": ["c"],
             "negative_ids": ["other"]},
            {"query": "a car wash", "positive": "wash"}]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [{"_id": "d1", "text": "red apple tree"}, {"docid": 2, "title": "blue", "text": "apple"},
                 {"id": "d3", "text": "a car"}, {"_id": "", "text": "car wash of a car"}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in documents))
    arguments = ["mine", "--model", "bm25", "--data", str(train), "--output", str(output), "--num-negatives", "2"]
    assert main([*arguments, "--corpus", str(corpus)]) == 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert results[0]["negatives"] == ["red apple tree", "blue apple"]
    assert (results[0]["positive_ids"], results[0]["negative_ids"]) == (["p1", "7"], ["d1", "other"])
    assert results[1]["negatives"] == ["blue apple", "car wash of a car"]
    hashed = f"text:{text_id('car wash of a car') % 2**64:016x}"
    assert (results[1]["positive_ids"], results[1]["negative_ids"]) == (["c"], ["other", hashed])
    assert results[2]["negatives"] == ["car wash of a car", "a car"]
    assert results[2]["negative_ids"] == [hashed, "c"] and results[2]["positive_ids"][0].startswith("text:")
    assert [record.document_ids for record in RecordFile(str(output))] == [
        (*row["positive_ids"], *row["negative_ids"]) for row in results]
    assert not shared_keys(RecordFile(str(output))[0], 2).isdisjoint(shared_keys(RecordFile(str(output))[1], 2))
    # Without any id nothing is invented.
    train.write_text("".join(json.dumps({key: row[key] for key in ("query", "positive")}) + "\n" for row in rows))
    assert main(arguments) == 0
    assert "_ids" not in output.read_text()


@pytest.mark.parametrize("arguments, words", [
    (["--output", "mined.txt"], "--output mined.txt: must be a .jsonl file"),
    (["--corpus", "nowhere.jsonl"], "--corpus = 'nowhere.jsonl': no such file"),
    (["--max-score", "-100"], "no candidate of any row passes the filters"),
    (["--pooling", "mean"], "--pooling: has no effect with BM25"),
    (["--num-negatives", "0"], "--num-negatives 0: must be at least 1"),
    (["parallel.tensor_model_parallel_size=2"], "parallel.*: has no effect with BM25"),
])
def test_refusals(arguments, words, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["mine", "--model", "bm25", "--data", str(data), "--output", "mined.jsonl", *arguments]
    assert main(given) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(data, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert main(["mine", "--model", "bm25", "--data", str(data), "--output", str(tmp_path / "mined.jsonl")]) == 2
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_vectors_that_are_not_finite_are_refused(model, data, tmp_path):
    """NaN would rank above every number, and become a negative's score in the output."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "What is tea?"}\n')
    for output, given in (("mined.jsonl", ["mine", "--data", str(data)]),
                          ("vectors.npy", ["encode", "--input", str(texts)])):
        code, _, err, _ = run_on_ranks(command, 1, [*given, "--model", str(broken), "--output",
                                                    str(tmp_path / output)])[0]
        assert code == 2 and "embeddings are not finite; the model has diverged or overflowed" in err, err
        assert not list(tmp_path.glob(f"{output}*"))
