"""Models of the tests for GPUs, and the CPU's curves to compare with."""

import functools
import json
import os
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from tests.helpers.device_runs import SECONDS, train
from tests.helpers.families import save_family
from tests.helpers.ranks import RankPool
from tests.helpers.sparse_reference import save_sparse_model
from tests.helpers.toys import BERT, MINI_EN, save_model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A decoder, an encoder, and a mixture of experts without balancing loss, which depends on the micro-batch."""
    folder = tmp_path_factory.mktemp("models")
    # The width of heads is one that flash kernels take.
    dense = save_model(folder / "qwen3", "qwen3", tokenizer=True, head_dim=32)
    vocabulary = AutoConfig.from_pretrained(dense).vocab_size
    experts = save_family(folder / "qwen3_moe", "Qwen3-MoE", head_dim=32, router_aux_loss_coef=0.0,
                          vocab_size=vocabulary)
    AutoTokenizer.from_pretrained(dense).save_pretrained(experts)
    return {"qwen3": dense, "qwen3_moe": experts, "bert": save_model(folder / "bert", "bert", tokenizer=True)}


@pytest.fixture(scope="session")
def cpu_pool():
    """Ranks that see no GPU."""
    pool = RankPool()
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # its process starts with the first call
        assert pool.run(sees_gpu, 1, (), {}, SECONDS) == [False]
    yield pool
    pool.shutdown()


def sees_gpu() -> bool:
    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def cpu_curve(models, cpu_pool, tmp_path_factory):
    """The curve of a run on one CPU rank in float32, by the name of its model."""
    folder = tmp_path_factory.mktemp("cpu")

    @functools.cache
    def run(kind):
        return train(models[kind], folder / kind, pool=cpu_pool)

    return run


@pytest.fixture(scope="session")
def directories(models, tmp_path_factory):
    """Models by name: those of all tests for GPUs, one with an output layer, one whose layers two do not divide, one as
    wide as nf4 needs."""
    folder = tmp_path_factory.mktemp("kinds")
    wide = save_model(folder / "wide", "qwen3", tokenizer=True, head_dim=32, hidden_size=64, intermediate_size=128)
    three = save_model(folder / "three", "qwen3", tokenizer=True, num_hidden_layers=3, head_dim=32)
    return models | {"sparse": str(save_sparse_model(folder / "sparse", "BertConfig", BERT)), "three_layers": three,
                     "wide": wide}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Rows with one positive or two, a negative and a teacher's scores; a document comes several times in a step."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:48]]
    positives = [row["positive"][0] for row in found]
    for index, row in enumerate(found):
        row["positive"] = [positives[index], positives[index - 9]][: 1 + index % 2]
        row["negatives"] = [positives[index - 43]]
        row["teacher_scores"] = [(2 - index * place) % 7 for place in range(len(row["positive"]) + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)
