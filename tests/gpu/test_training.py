"""Whole runs on one GPU and two, by the command line, against CPU runs and against one process.

Not run on a GPU so far, but on the pretend device (docs/pretend_device.md); on a CPU the same bodies run with gloo and
the general attention kernel. All are slow tests.
"""

import json
import os
import subprocess
import sys

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from tests.helpers.families import save_family
from tests.helpers.refusals import settings
from tests.helpers.toys import REPOSITORY, save_model

pytestmark = pytest.mark.slow
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
PAIRS = [pytest.param("cuda", marks=pytest.mark.multi_gpu), "cpu"]
STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A decoder and a mixture of experts whose balancing loss, of a micro-batch by nature, is off."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_model(folder / "qwen3", "qwen3", tokenizer=True, head_dim=32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    experts = save_family(folder / "qwen3_moe", "Qwen3-MoE", head_dim=32, router_aux_loss_coef=0.0,
                          vocab_size=AutoConfig.from_pretrained(dense).vocab_size)
    tokenizer.save_pretrained(experts)
    return {"qwen3": dense, "qwen3_moe": experts}


@pytest.fixture
def curve(models, tmp_path):
    """Loss and gradient norm of every step of a run."""

    def train(name, kind, device, *overrides, ranks=1, steps=STEPS):
        values, directory = settings(models[kind], tmp_path / name), tmp_path / name
        values["training"] |= {"learning_rate": 1e-3, "lr_decay_style": "constant", "keep_activations": 0}
        values["embedding"] = {"pooling": "lasttoken"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "megatron_embed", "train", str(tmp_path / f"{name}.yaml"),
             f"training.train_steps={steps}", *overrides], capture_output=True, text=True, check=False, timeout=600,
            cwd=REPOSITORY, env=os.environ | hidden | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert len({row["loss"] for row in rows}) == steps and all(row["grad_norm"] > 0.01 for row in rows)
        return [row[name] for row in rows for name in ("loss", "grad_norm")]

    return train


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_the_cpus(curve, kind, device):
    assert curve("one", kind, device) == pytest.approx(curve("cpu", kind, "cpu"), rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_float32(curve, device):
    """On a GPU by the flash kernel, which `auto` chooses there."""
    losses = curve("half", "qwen3", device, "model.dtype=bfloat16")
    expected = curve("whole", "qwen3", "cpu")
    assert losses == pytest.approx(expected, rel=0.1)
    assert losses != expected


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_run_repeats_bit_for_bit(curve, device):
    settings = ("model.dtype=bfloat16", "training.deterministic=true")
    assert curve("once", "qwen3", device, *settings) == curve("again", "qwen3", device, *settings)


@pytest.mark.parametrize("kind, key", [
    ("qwen3", "tensor_model"), ("qwen3", "pipeline_model"), ("qwen3", "context"), ("qwen3_moe", "expert_model")])
@pytest.mark.parametrize("device", PAIRS)
def test_two_ranks_are_one_process(curve, device, kind, key):
    two = curve("two", kind, device, f"parallel.{key}_parallel_size=2", ranks=2)
    assert two == pytest.approx(curve("one", kind, device), rel=1e-4)
