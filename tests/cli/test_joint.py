"""Joint heads in runs, checkpoints, exports and commands, held against Transformers and BGE-M3's two files."""

import json

import numpy as np
import pytest
import scipy.sparse
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from tests.helpers.commands import evaluated, small_beir  # noqa: F401
from tests.helpers.foreign_directories_helpers import save_directory
from tests.helpers.joint_reference import SPECIAL, TOKEN_DIM, JointHeads, add_joint_heads, largest_weights
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import configuration, curve, train

TEXTS = ["the quick brown fox jumps over the lazy dog", "a fox, the dog; and the other dog", "quick"]
WEIGHTS = (1.0, 0.5, 0.8)


def run_values(model, directory, **training):
    values = configuration(model, directory, train_steps=3, **training)
    values["embedding"] = {"head": "joint", "pooling": "cls", "embedding_dim": 10}
    values["objective"] = {"temperature": 0.2, "score_weights": list(WEIGHTS)}
    return values


def train_and_export(values):
    """Called by all ranks; the run is resumed for one more step, and then exported."""
    train(values)
    directory = values["checkpoint"]["directory"]
    export = {"directory": directory, "export_at_end": f"{directory}-export"}
    return train(values | {"checkpoint": export, "training": values["training"] | {"train_steps": 4}})


def stock(directory):
    """What Transformers and the two files give for TEXTS: (dense, [ids without special ones], weights, vectors)."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).double().eval()
    heads, rows = JointHeads(directory), []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            own, given = heads.of(ids, model(torch.tensor([ids])).last_hidden_state[0], "cls")
        rows.append((own, *(value.detach() for value in given)))
    return rows


@pytest.mark.slow
def test_a_run_trains_saves_resumes_and_exports(tmp_path, small_beir):  # noqa: F811
    model = str(save_directory(tmp_path / "model", kind="bert"))
    directory = tmp_path / "run"
    metrics = run_on_ranks(train_and_export, 2, run_values(model, directory))
    assert metrics[0]["loss"] == metrics[1]["loss"]
    assert {"dense_loss", "sparse_loss", "multi_vector_loss", "sum_loss", "distillation_loss"} <= metrics[0].keys()
    whole = run_values(model, tmp_path / "whole")
    run_on_ranks(train, 2, whole | {"training": whole["training"] | {"train_steps": 4}})
    assert curve(directory) == curve(tmp_path / "whole")
    export = tmp_path / "run-export"
    for name, shape in (("colbert_linear", (10, 32)), ("sparse_linear", (1, 32))):
        state = torch.load(export / f"{name}.pt", weights_only=True)
        assert tuple(state["weight"].shape) == shape
        assert tuple(state["bias"].shape) == shape[:1]
    assert json.loads((export / "joint_heads.json").read_text()) == {
        "embedding_dim": 10, "score_weights": list(WEIGHTS)}
