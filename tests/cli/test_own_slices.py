"""A rank of a run that starts from a Hugging Face directory reads its own slices of the weights, counted in bytes."""

import argparse
import os
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import MINILM, save_model

SPLIT = {"qwen3": ("embed_tokens", "_proj."),
         "bert": ("word_embeddings", "query", "key", "value", "intermediate.dense", "attention.output.dense.weight",
                  "output.dense.weight")}
"""Parts of the names of tensors that tensor-parallel ranks share among them."""


def bytes_read(directory, tp_size):
    """Bytes that this rank reads while it opens the model, by `preadv`, headers included."""
    from megatron_embed.loading.model_directory import open_encoder

    read, plain = [], os.preadv

    def counting(descriptor, buffers, offset):
        count = plain(descriptor, buffers, offset)
        read.append(count)
        return count

    arguments = argparse.Namespace(model=directory, dtype="float32", pooling="mean", max_length=None,
                                   no_normalize=False, overrides=[f"parallel.tensor_model_parallel_size={tp_size}"])
    with mock.patch("os.preadv", counting):
        open_encoder(arguments, prompts=False)
    return sum(read)


@pytest.mark.parametrize("name", ["qwen3", "qwen3, sharded", "bert"])
def test_two_ranks_read_half_each(name, tmp_path):
    from megatron_embed.convert.hf_directory import HFDirectory

    directory = str(MINILM)
    if name != "bert":
        directory = save_model(tmp_path / "model", "qwen3", tokenizer=True)
    if name == "qwen3, sharded":
        from transformers import AutoModel, AutoTokenizer

        AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "shards")
        AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "shards", max_shard_size="1MB")
        directory = str(tmp_path / "shards")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    with HFDirectory(directory) as source:
        sizes = {name: source.entry(name).nbytes for name in source.stored_names if name not in source.passthrough}
        # Twice: sizes are compared with config.json before memory is taken.
        headers = 2 * sum(int.from_bytes(file.read_bytes()[:8], "little")
                          for file in Path(directory).glob("*.safetensors"))
    parts = SPLIT[name.split(",")[0]]
    split = sum(size for name, size in sizes.items() if any(part in name for part in parts) and ".bias" not in name)
    split += sum(size for name, size in sizes.items()
                 if name.endswith(("query.bias", "key.bias", "value.bias", "intermediate.dense.bias")))
    whole = sum(sizes.values()) - split
    assert split > 20 * whole
    (one,) = run_on_ranks(bytes_read, 1, directory, 1)
    assert one == headers + whole + split
    for two in run_on_ranks(bytes_read, 2, directory, 2):
        # One row or one padding row more or less: 30,522 words do not divide by the padding's multiple.
        assert two == pytest.approx(headers + whole + split / 2, rel=0.01)
        assert two < 0.56 * one
