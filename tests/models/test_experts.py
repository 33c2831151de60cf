"""Qwen3-MoE: the forward pass equals Transformers', and converted and training checkpoints are one format."""

import json

import pytest
import torch
import transformers

from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.convert.checkpoint_directory import write_sidecar_files
from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.backbone import check_divisible
from megatron_embed.models.families import model_shape
from tests.helpers.embedding_reference import save_model
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tensor_files import assert_bit_equal, edit_config, tensors_of
from tests.helpers.toys import Opened, open_model, pack_all, random_texts, run_config

LENGTHS = (5, 17, 3, 40, 41, 2, 16, 64)
LAYOUTS = {
    "1 rank": (1, {}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 ETP2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "TP2 EP2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "PP2 VPP2 EP2": (4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
                         "expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "moe", "qwen3_moe")


def embed_texts(config: RunConfig) -> tuple[torch.Tensor | None, Opened]:
    from megatron_embed.models.encoder import to_device
    from megatron_embed.models.passes import embed

    opened = open_model(config)
    for chunk in opened.chunks:
        chunk.eval()
    micro = pack_all(random_texts(LENGTHS), config)
    batch = to_device(micro, opened.topology, "mean", kernel="sdpa", causal=True)
    rows = embed(opened.chunks, [batch] * opened.topology.pp_size, opened.topology)
    return rows, opened


def embed_and_save(config: RunConfig, folder: str | None = None) -> torch.Tensor | None:
    """Embeddings of the texts on the last stage; the weights go into `folder`, as a training checkpoint has them."""
    from megatron_embed.checkpoint.load import model_state
    from megatron_embed.platform.compat import dist_checkpointing

    rows, opened = embed_texts(config)
    if folder is not None:
        dist_checkpointing.save({"model": model_state(opened.chunks)}, folder)
    return rows


def expected_rows(directory):
    model = transformers.AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in random_texts(LENGTHS)]
    return torch.nn.functional.normalize(torch.stack(states), dim=1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_embeddings_and_checkpoints_equal_transformers_under_every_layout(name, directory, tmp_path):
    ranks, sizes = LAYOUTS[name]
    (tmp_path / "saved" / "model").mkdir(parents=True)
    config = run_config(str(directory), parallel=sizes)
    results = run_on_ranks(embed_and_save, ranks, config, str(tmp_path / "saved" / "model"))
    expected = expected_rows(directory)
    for rows in results:
        if rows is not None:
            assert (rows - expected).abs().max() < 1e-5
    assert results[-1] is not None
    # What training saves and what a conversion writes is the same.
    hf_to_megatron(directory, tmp_path / "megatron")
    with DcpReader(tmp_path / "megatron" / "model") as ours, DcpReader(tmp_path / "saved" / "model") as saved:
        keys = {key for key in saved.keys() if "_extra_state" not in key}  # noqa: SIM118  no dictionary
        assert keys == set(ours.keys())
        for key in keys:
            assert torch.equal(ours.read(key), saved.read(key)), key
    write_sidecar_files(directory, tmp_path / "saved")
    megatron_to_hf(tmp_path / "saved", tmp_path / "back")
    assert_bit_equal(tensors_of(tmp_path / "back"), tensors_of(directory))
    # And it is read at this layout.
    loaded = run_on_ranks(embed_and_save, ranks, run_config(str(tmp_path / "megatron"), parallel=sizes))
    assert torch.equal(loaded[-1], results[-1])


def test_defaults_of_head_dim_are_those_of_transformers(directory, tmp_path):
    for model_type, expected in (("qwen3_moe", 32 // 8), ("qwen3", 128)):
        values = json.loads((directory / "config.json").read_text())
        del values["head_dim"]
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert getattr(config, "head_dim", 32 // 8) == expected
        assert model_shape(tmp_path).head_dim == expected


def test_released_spelling_of_the_number_of_experts(directory, tmp_path):
    values = json.loads((directory / "config.json").read_text())
    values["num_experts"] = values.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_shape(tmp_path) == model_shape(directory)
    edit_config(tmp_path, mlp_only_layers=[1])
    with pytest.raises(CheckpointError, match="mlp_only_layers = .1. is not supported"):
        model_shape(tmp_path)


@pytest.mark.parametrize("sizes, match", [
    ({"expert_model_parallel_size": 3}, "expert_model_parallel_size = 3 does not divide the model's 4 experts; nearest "
                                        "valid: 2"),
    ({"expert_tensor_parallel_size": 5}, "expert_tensor_parallel_size = 5 does not divide the model's 24 columns of an "
                                         "expert; nearest valid: 4"),
    ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, "sequence_parallel = False: a mixture of experts "
                                                                    "under tensor parallelism"),
    ({"tensor_model_parallel_size": 8}, "tensor_model_parallel_size = 8 does not divide the model's 4 key/value heads; "
                                        "nearest valid: 4"),
])
def test_layouts_that_cannot_be_are_refused(directory, sizes, match):
    with pytest.raises(ConfigError, match=match):
        check_divisible(model_shape(directory), ParallelConfig(**sizes))


def test_experts_of_a_dense_model_are_refused(tmp_path):
    shape = model_shape(save_model(tmp_path / "bert", "bert"))
    with pytest.raises(ConfigError, match="expert_model_parallel_size = 2, but the model has dense layers"):
        check_divisible(shape, ParallelConfig(expert_model_parallel_size=2))
