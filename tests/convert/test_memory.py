"""Peak memory of the conversion commands, measured by the kernel: near the largest tensors, whatever the layers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.tables.transforms import Context
from megatron_embed.models.families import model_shape
from tests.helpers.tensor_files import assert_bit_equal, tensors_of

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CONFIG = """{"architectures": ["Qwen3Model"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": %d,
"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 40000,
"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": true,
"attention_bias": false, "dtype": "bfloat16"}"""
LARGEST = 40000 * 1024 * 2
"""Bytes of the word embeddings."""


def write_model(directory, layers):
    """Write a model of random bits and return the bytes of all tensors."""
    directory.mkdir()
    (directory / "config.json").write_text(CONFIG % layers)
    shape = model_shape(directory)
    generator = np.random.default_rng(0)
    tensors = {}
    for rule, context in rules_for("qwen3").applied_rules(shape):
        assert isinstance(context, Context)
        for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True):
            sizes = context.sizes(words)
            bits = np.frombuffer(generator.bytes(2 * int(np.prod(sizes))), dtype=np.int16).copy()
            tensors[name] = torch.from_numpy(bits).view(torch.bfloat16).reshape(sizes)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()},
              directory / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_of(arguments):
    """Peak resident memory of a command, in bytes; without arguments: of a process that only loads the libraries."""
    libraries = "import megatron_embed.export.formats, torch.distributed.checkpoint"
    command = ["-m", "megatron_embed", *arguments] if arguments else ["-c", libraries]
    # A small process starts it: the kernel counts what the parent holds as the child's first peak.
    script = ("import os, subprocess, sys; process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL); "
              "_, status, usage = os.wait4(process.pid, 0); print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)")
    finished = subprocess.run([sys.executable, "-c", script, sys.executable, *command], cwd=REPOSITORY, check=True,
                              stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    code, kib = finished.stdout.split()
    assert code == "0"
    return int(kib) * 1024


@pytest.mark.slow
def test_peak_memory_does_not_depend_on_the_number_of_layers(tmp_path):
    libraries = peak_of([])
    peaks = {}
    for layers in (2, 16):
        total = write_model(tmp_path / f"source{layers}", layers)
        there, back = str(tmp_path / f"megatron{layers}"), str(tmp_path / f"back{layers}")
        peaks[layers] = (peak_of(["convert", "hf-to-megatron", str(tmp_path / f"source{layers}"), there]),
                         peak_of(["convert", "megatron-to-hf", "--no-compare", there, back]))
    assert_bit_equal(tensors_of(tmp_path / "back16"), tensors_of(tmp_path / "source16"))
    assert total > 10 * LARGEST
    for few, many in zip(peaks[2], peaks[16], strict=True):
        assert many < libraries + LARGEST / 2
        assert many < few + LARGEST / 2
