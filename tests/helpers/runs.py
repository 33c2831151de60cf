"""Training runs on real rows: configuration, curve, return to an earlier checkpoint, export."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_embed.checkpoint.files import step_directories
from tests.helpers.toys import MAX_LENGTH, MINI_EN, layout, save_model

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def configuration(model, directory, *, parallel=None, distributed=True, checkpoint=None, objective=None, **training):
    """Plain values of a run on real rows, as a YAML file would hold them."""
    return {
        "model": {"path": model, "dtype": "float32"}, "embedding": {"pooling": "mean"},
        "objective": {"temperature": 0.3, **(objective or {})},
        "data": {"train": [str(MINI_EN)], "num_negatives": 1, "query_max_length": MAX_LENGTH,
                 "document_max_length": MAX_LENGTH},
        "parallel": parallel or layout(), "optimizer": {"distributed": distributed},
        "training": {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, **training},
        "checkpoint": {"directory": str(directory), **(checkpoint or {})},
        "logging": {"every_steps": 1, "tensorboard": False}}


def train(values):
    """Called by all ranks."""
    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.run.assemble import run_training

    overrides = [f"{section}.{key}={json.dumps(value)}" for section, keys in values.items()
                 for key, value in keys.items()]
    return run_training(config_of_overrides(overrides))


def curve(directory):
    """Metrics of each step that a resumed run must repeat."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["loss"], line["grad_norm"], line["learning_rate"], line["margin"]) for line in lines]


def go_back(directory, target, step):
    """A copy of a run as it was after `step`."""
    shutil.copytree(directory, target)
    for steps, folder in step_directories(target).items():
        if steps > step:
            shutil.rmtree(folder)
    (target / "latest").write_text(f"step_{step:06d}\n")
    return target


def export(directory, target):
    from megatron_embed.convert.convert import megatron_to_hf

    megatron_to_hf(directory, target)
    return load_file(target / "model.safetensors")
