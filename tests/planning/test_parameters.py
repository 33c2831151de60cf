"""Parameter counts against Transformers' models, and against this package's under every layout."""

import json

import pytest
import torch
import transformers

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.errors import ConfigError
from megatron_embed.planning.parameters import stage_parameters, total_parameters
from megatron_embed.planning.shapes import FOLDER, known_models, shape_of
from tests.helpers.planned_models import BERT, GEMMA3, MODERNBERT, MOE, QWEN3, T5
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import layout, run_config


def hf_parameters(values):
    """Parameters of Transformers' model without pooler and head, built without memory."""
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        # AutoModel of a T5 is encoder and decoder.
        auto = transformers.AutoModelForTextEncoding if config.model_type == "t5" else transformers.AutoModel
        model = auto.from_config(config)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("pooler."))


@pytest.mark.parametrize("name", known_models())
def test_shipped_shapes_have_the_parameters_of_the_hub_models(name):
    values = json.loads((FOLDER / name / "config.json").read_text())
    assert total_parameters(shape_of(name)) == hf_parameters(values)


@pytest.mark.parametrize("values", [BERT, QWEN3, MOE, MODERNBERT, T5, GEMMA3],
                         ids=["bert", "qwen3", "moe", "modernbert", "t5", "gemma3"])
def test_small_models(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert total_parameters(shape_of(str(tmp_path))) == hf_parameters(values)


def held(config):
    """(parameters counted by the formula, those of the model that was built, dense and expert), on this rank."""
    from megatron_embed.models.encoder import build_model
    from megatron_embed.parallel.topology import initialize

    topology, shape = initialize(config.parallel), shape_of(config.model.path)
    built = [0, 0]
    for chunk in build_model(config, shape, topology, "mean"):
        for name, parameter in chunk.named_parameters():
            built["experts" in name] += parameter.numel()
    counted = stage_parameters(shape, config.parallel, topology.pp_rank)
    return (counted.dense, counted.expert), tuple(built)


@pytest.mark.parametrize("values, sizes", [
    (BERT, layout(2)), (BERT, layout(pp=2)), (QWEN3, layout(2)), (QWEN3, layout(pp=2, vpp=2)), (QWEN3, layout(cp=2)),
    (QWEN3 | {"num_hidden_layers": 5}, layout(pp=2)), (MODERNBERT, layout(pp=2)), (T5, layout(2)), (GEMMA3, layout(2)),
    (T5, layout(pp=2, vpp=2)),
    (MOE, layout(2)), (MOE, layout(2) | {"expert_tensor_parallel_size": 2}),
    (MOE, layout() | {"expert_model_parallel_size": 2}), (MOE, layout(pp=2))])
def test_every_rank_holds_what_is_counted(values, sizes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    for counted, built in run_on_ranks(held, 2, run_config(str(tmp_path), parallel=sizes)):
        assert counted == built
        assert built[0] > 1000


def test_unknown_model_is_refused():
    words = r"model.path = 'Qwen/Nothing': not a directory with a model .* Qwen/Qwen3-Embedding-0.6B"
    with pytest.raises(ConfigError, match=words):
        shape_of("Qwen/Nothing")
    assert stage_parameters(shape_of("Qwen/Qwen3-Embedding-8B"), ParallelConfig(), 0).expert == 0
