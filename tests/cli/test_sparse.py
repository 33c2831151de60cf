"""Sparse models in directories, runs, checkpoints and exports, held against Sentence Transformers."""

import json

import numpy as np
import pytest
import scipy.sparse
from safetensors.torch import load_file
from sentence_transformers import SparseEncoder

from tests.helpers.commands import evaluated, small_beir  # noqa: F401
from tests.helpers.ranked_documents import mine_and_compare, stock_metrics
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import configuration, curve, train
from tests.helpers.sparse_reference import save_sparse_model
from tests.helpers.toys import BERT, QWEN3, layout

TEXTS = ["The quick brown fox", "jumps over; or: it does not!", "the lazy dog, and over a longer text that follows"]
MODELS = {"bert": ("BertConfig", BERT), "qwen3": ("Qwen3Config", QWEN3)}
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 0}
MODERNBERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
              "max_position_embeddings": 256, "local_attention": 10, "pad_token_id": 0, "cls_token_id": 2,
              "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}


def stock(directory, role):
    model = SparseEncoder(str(directory), device="cpu")
    encode = model.encode_query if role == "query" else model.encode_document
    return encode(TEXTS, convert_to_sparse_tensor=False, batch_size=1).numpy()


def vectors_of(directory):
    """Called by all ranks."""
    import megatron_embed

    model = megatron_embed.load(directory)
    assert model.similarity == "dot"
    return {role: model.encode(TEXTS, role).toarray() for role in ("query", "document")}


def assert_equal(ours, directory):
    for role, rows in ours.items():
        expected = stock(directory, role)
        assert (expected > 0).mean() > 0.02 and expected.std() > 0.05
        np.testing.assert_allclose(rows, expected, atol=1e-5, rtol=1e-5)


def splade_directory(path, config, settings):
    """A directory that Sentence Transformers itself writes."""
    save_sparse_model(path, config, settings)
    SparseEncoder(str(path), device="cpu").save_pretrained(str(path))
    return path


def test_a_stock_directory_gives_the_stock_vectors(tmp_path):
    directory = splade_directory(tmp_path / "bert", "BertConfig", BERT)
    (ours,) = run_on_ranks(vectors_of, 1, str(directory))
    assert_equal(ours, directory)


@pytest.mark.slow
@pytest.mark.parametrize("config, settings", [("RobertaConfig", ROBERTA), ("ModernBertConfig", MODERNBERT)])
def test_other_encoders_give_the_stock_vectors(config, settings, tmp_path):
    directory = splade_directory(tmp_path / "model", config, settings)
    (ours,) = run_on_ranks(vectors_of, 1, str(directory))
    assert_equal(ours, directory)


def run_values(model, directory, parallel, **objective):
    """A run of a sparse model on real rows."""
    values = configuration(model, directory, parallel=parallel, train_steps=3,
                           objective={"temperature": 2.0, "query_regularizer_weight": 0.01,
                                      "document_regularizer_weight": 0.01, **objective},
                           checkpoint={"export_at_end": f"{directory}-export"})
    values["embedding"] = {"head": "sparse"}
    values["data"] |= {"query_prompt": "what is ", "document_prompt": ""}
    return values


def train_and_load(values):
    """Called by all ranks; the run is resumed for one more step."""
    train(values | {"checkpoint": {"directory": values["checkpoint"]["directory"]}})
    metrics = train(values | {"training": values["training"] | {"train_steps": 4}})
    return metrics, vectors_of(values["checkpoint"]["directory"])


@pytest.mark.slow
@pytest.mark.parametrize("kind, sizes, tied", [
    ("bert", {"tp": 2}, True), ("bert", {"pp": 2}, True), ("qwen3", {"tp": 2}, False), ("qwen3", {"pp": 2}, True)])
def test_a_run_trains_saves_and_exports(kind, sizes, tied, tmp_path):
    config, settings = MODELS[kind]
    model = str(save_sparse_model(tmp_path / "model", config, settings, tied=tied))
    directory = tmp_path / "run"
    results = run_on_ranks(train_and_load, 2, run_values(model, directory, layout(**sizes)))
    assert results[0][0]["loss"] == results[1][0]["loss"]
    assert_equal(results[0][1], f"{directory}-export")
    (again,) = run_on_ranks(vectors_of, 1, f"{directory}-export")
    assert_equal(again, f"{directory}-export")
    losses = [line[0] for line in curve(directory)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    exported, first = (load_file(path / "model.safetensors") for path in (tmp_path / "run-export", tmp_path / "model"))
    head = {"bert": "cls.predictions.bias", "qwen3": "model.norm.weight" if tied else "lm_head.weight"}[kind]
    assert exported.keys() >= {head}
    assert not np.array_equal(exported[head].numpy(), first[head].numpy()), "the head was not trained"


def orders(folder, directory):
    """{query id: {document id: score}} by Sentence Transformers."""
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("queries", "corpus")}
    model = SparseEncoder(str(directory), device="cpu")
    texts = [f"{row['title']} {row['text']}" if row.get("title") else row["text"] for row in rows["corpus"]]
    scores = model.similarity(model.encode_query([row["text"] for row in rows["queries"]]),
                              model.encode_document(texts)).to_dense()
    return {query["_id"]: {document["_id"]: float(score) for document, score in zip(rows["corpus"], line, strict=True)}
            for query, line in zip(rows["queries"], scores, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(), ("parallel.tensor_model_parallel_size=2",),
                                   ("parallel.pipeline_model_parallel_size=2",)])
def test_evaluate_mine_and_encode(small_beir, sizes, tmp_path):
    directory = splade_directory(tmp_path / "bert", "BertConfig", BERT)
    run = orders(small_beir, directory)
    expected = stock_metrics(run, small_beir)
    ours = evaluated(["--model", str(directory), "--data", str(small_beir), *sizes], 2)
    assert ours == pytest.approx(expected, abs=1e-6)
    mine_and_compare(directory, run, small_beir, tmp_path, sizes, rel=1e-5)
    encode_and_compare(directory, tmp_path, sizes)


def encode_and_compare(directory, tmp_path, sizes):
    """A file, and a directory of matrices, hold the stock library's vectors."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for output in (tmp_path / "vectors.npz", tmp_path / "shards"):
        results = run_on_ranks(command, 2, [
            "encode", "--model", str(directory), "--input", str(tmp_path / "texts.jsonl"), "--output", str(output),
            "--role", "document", *sizes])
        assert all(code == 0 for code, *_ in results), results[0][2]
        file = output if output.suffix else output / "000000.npz"
        matrix = scipy.sparse.load_npz(file)
        assert matrix.dtype == np.float32
        np.testing.assert_allclose(matrix.toarray(), stock(directory, "document"), atol=1e-5)
    assert not list(tmp_path.rglob("*.tmp"))
    code, _, err, *_ = run_on_ranks(command, 1, [
        "encode", "--model", str(directory), "--input", str(tmp_path / "texts.jsonl"),
        "--output", str(tmp_path / "vectors.npy")])[0]
    assert code == 2
    assert "sparse vectors are written as .npz" in err
