"""Commands of the program on GPUs, pretended or real, and training curves of the CPU to compare them with."""

import functools
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer

from tests.helpers.families import save_family
from tests.helpers.ranks import RankPool, run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.toys import save_model

STEPS = 3
SECONDS = 300.0


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def cpu_pool():
    """Ranks that see no GPU."""
    pool = RankPool()
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # its process starts with the first call
        assert pool.run(sees_gpu, 1, (), {}, SECONDS) == [False]
    yield pool
    pool.shutdown()


def sees_gpu() -> bool:
    return torch.cuda.is_available()


@pytest.fixture(scope="module")
def cpu_curve(models, cpu_pool, tmp_path_factory):
    """The curve of a run on one CPU rank in float32, by the name of its model."""
    folder = tmp_path_factory.mktemp("cpu")

    @functools.cache
    def run(kind):
        results = cpu_pool.run(command, 1, (train_arguments(models[kind], folder / kind),), {}, SECONDS)
        return curve_of(results, folder / kind)

    return run


def train_arguments(path: str, directory: Path, /, *overrides: str, **sections: dict[str, Any]) -> list[str]:
    """Arguments of a run of `STEPS` steps of two micro-batches in float32; writes its YAML beside `directory`."""
    values = settings(path, directory)
    values["training"] |= {"learning_rate": 1e-3, "lr_decay_style": "constant", "train_steps": STEPS}
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ["train", str(file), *overrides]


def call(arguments: list[Any], ranks: int = 1) -> str:
    """Standard output of a command that must succeed, on pooled ranks."""
    results = run_on_ranks(command, ranks, [str(argument) for argument in arguments], timeout_seconds=SECONDS)
    assert all(code == 0 for code, *_ in results), results[0][2]
    return results[0][1]


def train(path: str, directory: Path, /, *overrides: str, ranks: int = 1, **sections: dict[str, Any]) -> list[float]:
    """The curve of a run on `ranks` GPUs."""
    arguments = train_arguments(path, directory, *overrides, **sections)
    return curve_of(run_on_ranks(command, ranks, arguments, timeout_seconds=SECONDS), directory)


def curve_of(results: list[tuple[int, str, str, float]], directory: Path) -> list[float]:
    """Loss and gradient norm of every step."""
    assert all(code == 0 for code, *_ in results), results[0][2]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len({row["loss"] for row in rows}) == len(rows) and all(row["grad_norm"] > 0.01 for row in rows)
    return [row[name] for row in rows for name in ("loss", "grad_norm")]
