"""Joint heads in runs, checkpoints, exports and commands, held against Transformers and BGE-M3's two files."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.joint_files import JointHeads as StoredHeads
from megatron_embed.models.joint_files import write_settings_file
from tests.helpers.commands import evaluated, small_beir  # noqa: F401
from tests.helpers.foreign_directories_helpers import save_directory
from tests.helpers.joint_reference import JointHeads, add_joint_heads, largest_weights, scores_of_texts
from tests.helpers.ranked_documents import stock_metrics
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import configuration, curve, train
from tests.helpers.toys import layout

TEXTS = ["the quick brown fox jumps over the lazy dog", "a fox, the dog; and the other dog", "quick"]
WEIGHTS = (1.0, 0.5, 0.8)


def run_values(model, directory, **training):
    values = configuration(model, directory, train_steps=3, **training)
    values["embedding"] = {"head": "joint", "pooling": "cls", "embedding_dim": 10}
    values["objective"] = {"temperature": 0.2, "score_weights": list(WEIGHTS)}
    return values


def train_and_export(values):
    """Called by all ranks; the run is resumed for one more step, tensor-parallel, and then exported."""
    train(values)
    directory = values["checkpoint"]["directory"]
    export = {"directory": directory, "export_at_end": f"{directory}-export"}
    return train(values | {"checkpoint": export, "training": values["training"] | {"train_steps": 4},
                           "parallel": layout(2)})


def stock(directory, texts):
    """What Transformers and the two files give: (ids, -1 without a weight; (dense, weights before ReLU, vectors))."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).double().eval()
    heads, rows = JointHeads(directory), []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=256)["input_ids"]
        with torch.no_grad():
            rows.append(heads.of(ids, model(torch.tensor([ids])).last_hidden_state[0], "cls"))
    return tuple(zip(*rows, strict=True))


@pytest.mark.slow
def test_a_run_trains_saves_resumes_and_exports(tmp_path):
    model = str(save_directory(tmp_path / "model", kind="bert"))
    directory = tmp_path / "run"
    metrics = run_on_ranks(train_and_export, 2, run_values(model, directory, lr_decay_style="constant"))
    assert metrics[0]["loss"] == metrics[1]["loss"]
    assert {"dense_loss", "sparse_loss", "multi_vector_loss", "sum_loss", "distillation_loss"} <= metrics[0].keys()
    whole = run_values(model, tmp_path / "whole", lr_decay_style="constant")
    run_on_ranks(train, 2, whole | {"training": whole["training"] | {"train_steps": 4}})
    np.testing.assert_allclose(curve(directory), curve(tmp_path / "whole"), rtol=2e-5)
    export = tmp_path / "run-export"
    for name, shape in (("colbert_linear", (10, 32)), ("sparse_linear", (1, 32))):
        state = torch.load(export / f"{name}.pt", weights_only=True)
        assert tuple(state["weight"].shape) == shape
        assert tuple(state["bias"].shape) == shape[:1]
    assert json.loads((export / "joint_heads.json").read_text()) == {
        "embedding_dim": 10, "score_weights": list(WEIGHTS)}
    dense = SentenceTransformer(str(export), device="cpu")
    ids, given = stock(export, TEXTS)
    np.testing.assert_allclose(dense.encode(TEXTS), torch.stack([own for own, *_ in given]), atol=1e-6)
    assert_encoded(export, tmp_path, TEXTS, ids, given)
    assert_encoded(directory, tmp_path, TEXTS, ids, given)  # by the checkpoint's own tensors
    refuse_other_heads(run_values(model, directory))


def refuse_other_heads(values):
    """A run keeps its heads, and a dense one gets none."""
    for embedding, key in (({"head": "dense"}, "embedding.head = 'dense'"), (
            values["embedding"] | {"embedding_dim": 11}, "embedding.embedding_dim = 11")):
        changed = values | {"embedding": embedding, "training": values["training"] | {"train_steps": 5}}
        changed["objective"] = {"temperature": 0.2} if embedding["head"] == "dense" else values["objective"]
        with pytest.raises(ConfigError, match=key):
            run_on_ranks(train, 2, changed)


def encoded(directory, tmp_path, head, suffix, texts):
    """The file that `encode --head` writes on two ranks."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = tmp_path / f"{head}-{len(list(tmp_path.iterdir()))}{suffix}"
    results = run_on_ranks(command, 2, ["encode", "--model", str(directory), "--input", str(tmp_path / "texts.jsonl"),
                                        "--output", str(output), "--role", "document", "--head", head])
    assert all(code == 0 for code, *_ in results), results[0][2]
    return output


def assert_encoded(directory, tmp_path, texts, ids, given):
    matrix = scipy.sparse.load_npz(encoded(directory, tmp_path, "sparse", ".npz", texts)).toarray()
    assert matrix.shape == (len(texts), 30522)
    assert matrix.any()
    for row, own, (_, weights, _) in zip(matrix, ids, given, strict=True):
        largest = {token: float(weight) for token, weight in largest_weights(own, weights).items() if weight > 0}
        assert dict(zip(row.nonzero()[0].tolist(), row[row.nonzero()], strict=True)) == pytest.approx(largest, abs=1e-6)
    output = encoded(directory, tmp_path, "multi_vector", ".npy", texts)
    np.testing.assert_allclose(np.load(output), torch.cat([vectors for *_, vectors in given]), atol=1e-6)
    offsets = np.load(str(output).replace(".npy", ".offsets.npy"))
    assert offsets.tolist() == [0, *np.cumsum([len(vectors) for *_, vectors in given])]


def rows_of(folder, name):
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {row["_id"]: f"{row['title']} {row['text']}" if row.get("title") else row["text"] for row in rows}


@pytest.mark.slow
def test_evaluate_and_encode_a_directory_as_bge_m3_s(small_beir, tmp_path):
    directory = add_joint_heads(save_directory(tmp_path / "model", kind="bert", pooling="cls",
                                               sbert={"max_seq_length": 256, "do_lower_case": False}))
    queries, documents = rows_of(small_beir, "queries"), rows_of(small_beir, "corpus")
    (query_ids, of_query), (ids, of_document) = (stock(directory, list(texts.values())) for texts in (
        queries, documents))
    scores = scores_of_texts(query_ids, of_query, ids, of_document)
    total = sum(weight * score for weight, score in zip((1.0, 0.3, 1.0), scores, strict=True))
    expected = {}
    for prefix, score in zip(("", "dense/", "sparse/", "multi_vector/"), (total, *scores), strict=True):
        run = {query: dict(zip(documents, map(float, row), strict=True)) for query, row in zip(
            queries, score, strict=True)}
        expected |= {f"{prefix}{name}": value for name, value in stock_metrics(run, small_beir).items()}
    assert len({expected[f"{prefix}map"] for prefix in ("", "dense/", "sparse/", "multi_vector/")}) == 4
    arguments = ["--model", str(directory), "--data", str(small_beir)]
    assert evaluated([*arguments, "--head", "joint"], 2) == pytest.approx(expected, abs=1e-6)
    for axis in ("pipeline", "tensor"):
        assert evaluated([*arguments, "--head", "joint", f"parallel.{axis}_model_parallel_size=2"], 2) == pytest.approx(
            expected, abs=1e-6)
    plain = evaluated(arguments, 1)
    assert plain == pytest.approx({name: expected[f"dense/{name}"] for name in plain}, abs=1e-6)
    assert_encoded(directory, tmp_path, list(documents.values())[:5], ids[:5], of_document[:5])
    lists = [{"query": text, "documents": list(documents.values())[row : row + 4], "labels": [1, 0, 0, 2]}
             for row, text in enumerate(queries.values())]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    ranked = evaluated(["--model", str(directory), "--data", str(tmp_path / "lists.jsonl"), "--head", "joint"], 2)
    first = [total[row, row : row + 4].argmax().item() in (0, 3) for row in range(len(lists))]
    assert ranked["mrr@1"] == pytest.approx(np.mean(first))


def planned_and_held(config_values):
    """Called by all ranks: (parameters by `plan`, held by this rank, numbers of a row by both)."""
    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.loading.model_directory import find_model, load_model_chunks
    from megatron_embed.parallel.topology import initialize
    from megatron_embed.planning.parameters import held_parameters, vector_width

    config = config_of_overrides(config_values)
    model = find_model(config.model.path).of_run(config.embedding)
    chunks = load_model_chunks(model, config, initialize(config.parallel), new_weights=True)
    held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    return (held_parameters(config, model.shape, 0).total, vector_width(config, model.shape)), (
        held, model.dim(config.embedding))


@pytest.mark.slow
@pytest.mark.parametrize("embedding_dim, width", [(None, 14), (48, 50)])
def test_plan_counts_the_heads(embedding_dim, width, tmp_path):
    directory = save_directory(tmp_path / "model", kind="bert", pooling="cls")
    values = [f"model.path={directory}", "model.dtype=float32", "embedding.head=joint"]
    if embedding_dim is None:
        add_joint_heads(directory)
    else:
        values.append(f"embedding.embedding_dim={embedding_dim}")
    ((planned, held),) = run_on_ranks(planned_and_held, 1, values)
    assert planned == held
    assert held[1] == width


def test_sizes_of_the_heads_are_the_directory_s_else_the_hidden_size(tmp_path):
    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.loading.model_directory import find_model
    from megatron_embed.planning.parameters import dense_parameters, vector_width

    plain = save_directory(tmp_path / "plain", kind="bert", pooling="cls")
    several = add_joint_heads(save_directory(tmp_path / "several", kind="bert", pooling="cls"))
    for directory, more, dim in ((plain, [], 32), (plain, ["embedding.embedding_dim=48"], 48), (several, [], 12)):
        config = config_of_overrides([f"model.path={directory}", "embedding.head=joint", *more])
        model = find_model(config.model.path)
        assert model.of_run(config.embedding).dim(config.embedding) == vector_width(config, model.shape) == dim + 2
        assert dense_parameters(config, model.shape) == 33 * (dim + 1)
    with pytest.raises(ConfigError, match="embedding.embedding_dim = 48: the model's own heads give vectors of 12"):
        find_model(str(several)).of_run(config_of_overrides([
            f"model.path={several}", "embedding.head=joint", "embedding.embedding_dim=48"]).embedding)


def test_options_of_heads_that_a_model_has_not(tmp_path):
    from megatron_embed.config.vector_format import JointFormat
    from megatron_embed.loading.dense_weights import load_dense_weights
    from megatron_embed.loading.joint_heads import as_joint_model
    from megatron_embed.loading.model_directory import find_model

    plain = find_model(str(save_directory(tmp_path / "plain", kind="bert")))
    with pytest.raises(ConfigError, match=r"--model .*plain: has no joint heads \(colbert_linear.pt"):
        as_joint_model(plain, "--model", normalize=True)
    directory = add_joint_heads(save_directory(tmp_path / "several", kind="bert", pooling="weightedmean"))
    several = find_model(str(directory))
    with pytest.raises(ConfigError, match="--no-normalize: vectors of joint heads"):
        as_joint_model(several, "--model", normalize=False)
    with pytest.raises(ConfigError, match="embedding.pooling = 'weightedmean'.*cls, mean, lasttoken"):
        as_joint_model(several, "--model", normalize=True).pooling(None)
    chunk = SimpleNamespace(dense=None)
    load_dense_weights(dataclasses.replace(plain, joint=JointFormat(hidden_size=32, token_dim=12)), [chunk], 1, ())
    write_settings_file(plain.hf, StoredHeads(dim=12))
    with pytest.raises(CheckpointError, match="colbert_linear.pt: no such file, and joint_heads.json beside it"):
        load_dense_weights(as_joint_model(plain, "--model", normalize=True), [chunk], 1, ())
    (directory / "sparse_linear.pt").write_bytes(b"damaged")
    assert find_model(str(directory)).pooling(None) == "weightedmean", "a dense model reads no heads"
    with pytest.raises(CheckpointError, match="sparse_linear.pt: not readable"):
        as_joint_model(find_model(str(directory)), "--model", normalize=True)


def test_the_heads_in_a_checkpoint_are_no_dense_module(tmp_path, monkeypatch):
    """A layer of as many outputs that a dense run adds to a joint run's checkpoint begins with weights of its own."""
    from megatron_embed.loading import dense_weights
    from megatron_embed.models.dense_settings import DenseSettings

    monkeypatch.setattr(dense_weights, "keys_of", lambda checkpoint: {f"{dense_weights.DENSE_KEYS}0.weight"})
    settings = [DenseSettings(in_features=32, out_features=13, bias=False, activation="identity")]
    model = SimpleNamespace(checkpoint=tmp_path, hf=tmp_path, root=tmp_path, dense_directory=tmp_path, joint=None)
    assert dense_weights.holds_dense_weights(model, settings)
    write_settings_file(tmp_path, StoredHeads(dim=12))
    assert not dense_weights.holds_dense_weights(model, settings)
    model.joint = StoredHeads(dim=12)
    assert dense_weights.holds_dense_weights(model, settings)
