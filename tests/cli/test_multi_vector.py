"""Multi-vector models in directories, runs, checkpoints and exports, held against Sentence Transformers."""

import json

import numpy as np
from sentence_transformers import MultiVectorEncoder

from tests.helpers.foreign_directories_helpers import save_directory
from tests.helpers.multi_vector_reference import FORMATS, add_token_modules
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, train

TEXTS = ["The quick brown fox", "jumps over; or: it does not!", "the lazy dog, and over a longer text that follows"]


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


def test_vectors_are_the_stock_library_s(tmp_path):
    directories = {name: str(add_token_modules(save_directory(tmp_path / name, kind="bert"), name))
                   for name in FORMATS}
    (ours,) = run_on_ranks(vectors_of, 1, directories)
    for name, directory in directories.items():
        assert_equal(ours[name], directory, name)
    lengths = {name: [len(row) for row in rows["document"]] for name, rows in ours.items()}
    assert lengths["plain"][1] > lengths["colbert"][1], "no punctuation was skipped"
    assert len(ours["colbert"]["query"][0]) == FORMATS["colbert"].expansion["length"]


def run_values(model, directory, **objective):
    """A run of a multi-vector model on real rows."""
    values = configuration(model, directory, objective={"temperature": 1.0, **objective}, train_steps=3,
                           checkpoint={"export_at_end": f"{directory}-export"})
    values["embedding"] = {"head": "multi_vector", "embedding_dim": 16, "query_expansion": 24}
    values["data"] |= {"query_prompt": "query: ", "document_prompt": "document: "}
    return values


def train_and_load(values):
    """Called by all ranks."""
    metrics = train(values)
    return metrics, vectors_of({"export": values["checkpoint"]["export_at_end"]})["export"]


def test_a_run_trains_saves_and_exports(tmp_path):
    model = str(save_directory(tmp_path / "model", kind="bert"))
    directory = tmp_path / "run"
    results = run_on_ranks(train_and_load, 2, run_values(model, directory))
    assert results[0][0]["loss"] == results[1][0]["loss"]
    assert_equal(results[0][1], f"{directory}-export", "export")
    losses = [line[0] for line in curve(directory)]
    assert losses[-1] < losses[0]
    settings = json.loads((tmp_path / "run-export" / "sentence_bert_config.json").read_text())
    assert settings["query_expansion"] == {"strategy": "fixed", "attend": False, "token": None, "length": 24}
