"""Multi-vector models in directories, runs, checkpoints and exports, held against Sentence Transformers."""

import json
import shutil

import numpy as np
import pytest
from sentence_transformers import MultiVectorEncoder

from tests.helpers.commands import evaluated, small_beir  # noqa: F401
from tests.helpers.foreign_directories_helpers import save_directory, without_sep
from tests.helpers.multi_vector_reference import FORMATS, add_token_modules
from tests.helpers.ranked_documents import mine_and_compare, stock_metrics
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.runs import configuration, curve, train

TEXTS = ["The quick brown fox", "jumps over; or: it does not!", "the lazy dog, and over a longer text that follows",
         "... !"]


def stock(directory, role):
    model = MultiVectorEncoder(str(directory), device="cpu")
    encode = model.encode_query if role == "query" else model.encode_document
    return [row.numpy() for row in encode(TEXTS, batch_size=1)]


def vectors_of(directories):
    """Called by all ranks."""
    import megatron_embed

    return {name: {role: megatron_embed.load(directory).encode(TEXTS, role) for role in ("query", "document")}
            for name, directory in directories.items()}


def assert_equal(ours, directory, name, tolerance=5e-6):
    for role, rows in ours.items():
        for row, expected in zip(rows, stock(directory, role), strict=True):
            assert row.shape == expected.shape, f"{name} {role}"
            np.testing.assert_allclose(row, expected, atol=tolerance, err_msg=f"{name} {role}")


def without_dense(directory, path):
    """A copy whose token vectors are the transformer's own."""
    shutil.copytree(directory, path)
    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps([module for module in modules if "Dense" not in module["type"]]))
    return str(path)


def test_vectors_are_the_stock_library_s(tmp_path):
    directories = {name: str(add_token_modules(save_directory(tmp_path / name, kind="bert"), name))
                   for name in FORMATS}
    directories["no Dense"] = without_dense(directories["plain"], tmp_path / "no Dense")
    (ours,) = run_on_ranks(vectors_of, 1, directories)
    for name, directory in directories.items():
        assert_equal(ours[name], directory, name)
    lengths = {name: [len(row) for row in rows["document"]] for name, rows in ours.items()}
    assert lengths["plain"][1] > lengths["colbert"][1], "no punctuation was skipped"
    assert lengths["colbert"][3] == 2, "[CLS] and [SEP] of a text of punctuation give vectors"
    assert ours["no Dense"]["query"][0].shape[1] == 32
    assert len(ours["colbert"]["query"][0]) == FORMATS["colbert"].expansion["length"]


def run_values(model, directory, **objective):
    """A run of a multi-vector model on real rows."""
    values = configuration(model, directory, objective={"temperature": 1.0, **objective}, train_steps=3,
                           checkpoint={"export_at_end": f"{directory}-export"})
    values["embedding"] = {"head": "multi_vector", "embedding_dim": 16, "query_expansion": 24}
    values["data"] |= {"query_prompt": "[unused0] ", "document_prompt": "[unused1] "}
    return values


def train_and_load(values):
    """Called by all ranks; the run is resumed for one more step."""
    train(values | {"checkpoint": {"directory": values["checkpoint"]["directory"]}})
    metrics = train(values | {"training": values["training"] | {"train_steps": 4}})
    return metrics, vectors_of({"export": values["checkpoint"]["export_at_end"]})["export"]


@pytest.mark.slow
def test_a_run_trains_saves_and_exports(tmp_path):
    model = str(save_directory(tmp_path / "model", kind="bert"))
    directory = tmp_path / "run"
    results = run_on_ranks(train_and_load, 2, run_values(model, directory))
    assert results[0][0]["loss"] == results[1][0]["loss"]
    assert_equal(results[0][1], f"{directory}-export", "export")
    losses = [line[0] for line in curve(directory)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    settings = json.loads((tmp_path / "run-export" / "sentence_bert_config.json").read_text())
    assert settings["query_expansion"] == {"strategy": "fixed", "attend": False, "token": None, "length": 24}


def dimensions(directory, **embedding):
    """Numbers of a token's vector in a run, by the model and by the plan."""
    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.config.vector_format import with_format
    from megatron_embed.loading.model_directory import find_model
    from megatron_embed.planning.parameters import vector_width

    config = config_of_overrides([f"model.path={directory}", *(
        f"embedding.{key}={value}" for key, value in embedding.items())])
    model = find_model(directory)
    settings = with_format(config.embedding, model.saved.vectors)
    return model.of_run(settings).dim(settings), vector_width(config, model.shape)


def test_a_run_adds_a_projection_to_a_model_without_vectors_of_tokens_alone(tmp_path):
    plain = str(save_directory(tmp_path / "plain", kind="bert"))
    several = add_token_modules(save_directory(tmp_path / "several", kind="bert"), "plain")
    none = without_dense(several, tmp_path / "none")
    assert dimensions(plain, head="multi_vector") == (128, 128)
    assert dimensions(str(several)) == dimensions(str(several), head="multi_vector") == (12, 12)
    assert dimensions(none) == dimensions(none, head="multi_vector") == (32, 32)
    assert dimensions(none, embedding_dim=16) == (16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("width, modules", [(None, ["MultiVectorMask", "Normalize"]),
                                            (16, ["Dense", "MultiVectorMask", "Normalize"])])
def test_a_run_of_a_model_without_dense_modules(width, modules, tmp_path):
    whole = add_token_modules(save_directory(tmp_path / "model", kind="bert"), "plain")
    values = run_values(without_dense(whole, tmp_path / "none"), tmp_path / "run")
    values["embedding"] = {} if width is None else {"embedding_dim": width}
    results = run_on_ranks(train_and_load, 2, values)
    assert_equal(results[0][1], tmp_path / "run-export", "export")
    assert results[0][1]["query"][0].shape[1] == (width or 32)
    entries = json.loads((tmp_path / "run-export" / "modules.json").read_text())
    assert [entry["type"].rpartition(".")[2] for entry in entries[1:]] == modules


def maxsim_orders(folder, directory):
    """[(query id, document ids, scores)] by Sentence Transformers, best first."""
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("queries", "corpus")}
    model = MultiVectorEncoder(str(directory), device="cpu")
    texts = [f"{row['title']} {row['text']}" if row.get("title") else row["text"] for row in rows["corpus"]]
    scores = model.similarity(model.encode_query([row["text"] for row in rows["queries"]]),
                              model.encode_document(texts))
    return {query["_id"]: {document["_id"]: float(score) for document, score in zip(rows["corpus"], line, strict=True)}
            for query, line in zip(rows["queries"], scores, strict=True)}


@pytest.mark.slow
def test_evaluate_mine_and_encode(small_beir, tmp_path):
    directory = add_token_modules(save_directory(tmp_path / "model", kind="bert"), "colbert")
    run = maxsim_orders(small_beir, directory)
    expected = stock_metrics(run, small_beir)
    ours = evaluated(["--model", str(directory), "--data", str(small_beir)], 2)
    assert ours == pytest.approx(expected, abs=1e-6)
    mine_and_compare(directory, run, small_beir, tmp_path, abs=1e-5)
    encode_and_compare(directory, tmp_path)


def encode_and_compare(directory, tmp_path):
    """The two files hold each text's vectors, pooled or not."""
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    model = MultiVectorEncoder(str(directory), device="cpu")
    for factor, options in ((1, []), (3, ["--token-pooling", "3"])):
        output = tmp_path / f"vectors-{factor}.npy"
        results = run_on_ranks(command, 2, [
            "encode", "--model", str(directory), "--input", str(tmp_path / "texts.jsonl"), "--output", str(output),
            "--role", "document", *options])
        assert all(code == 0 for code, *_ in results), results[0][2]
        vectors, offsets = np.load(output), np.load(tmp_path / f"vectors-{factor}.offsets.npy")
        expected = model.encode_document(TEXTS, token_pooling=HierarchicalTokenPooling(factor))
        assert offsets.tolist() == [0, *np.cumsum([len(row) for row in expected])]
        np.testing.assert_allclose(vectors, np.concatenate([row.numpy() for row in expected]), atol=5e-6)
    assert not list(tmp_path.glob("*.tmp"))


def test_options_and_texts_that_give_no_vectors_are_refused(small_beir, tmp_path):
    directory = str(add_token_modules(without_sep(save_directory(tmp_path / "model", kind="qwen3")), "colbert"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the fox"}\n{"text": "..."}\n')
    encode = ["encode", "--model", directory, "--input", str(texts), "--output", str(tmp_path / "vectors.npy")]
    evaluate = ["evaluate", "--model", directory, "--data", str(small_beir)]
    for arguments, words in (
            ([*encode, "--role", "document"], ("texts.jsonl:2: the text '...'", "only ones of the skip list",
                                                 "shorter skip list (embedding.skiplist_words of a run")),
            ([*evaluate, "--precision", "int8"], ("--precision: ", "a multi-vector model", "leave it out")),
            ([*evaluate, "--dims", "4"], ("--dims: ", "leave it out"))):
        assert_refused(run_on_ranks(command, 1, arguments), *words)
