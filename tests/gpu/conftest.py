"""Models of the tests for GPUs, and the CPU's curves to compare with."""

import functools
import os
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from tests.helpers.device_runs import SECONDS, train
from tests.helpers.families import save_family
from tests.helpers.ranks import RankPool
from tests.helpers.toys import save_model


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
