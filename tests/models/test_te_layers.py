"""A step with Transformer Engine's layers equals one with torch's: through stand-ins that check their arguments."""

import dataclasses
import math

import pytest
import torch
import transformers

from megatron_embed.models import encoder
from tests.helpers import te_linears, te_stand_in
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import difference, objective_settings
from tests.helpers.toys import BASES, copy_tokenizer, layout, run_config, save_model

LORA = {"rank": 3, "alpha": 6.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    directories = {kind: save_model(folder / kind, kind, tokenizer=True) for kind in ("bert", "qwen3")}
    for kind in ("Qwen2", "Qwen3Moe"):
        directories[kind] = save_mild(folder / kind, kind)
    return directories


def save_mild(path, kind):
    """A model whose weights do not amplify rounding, as those of `save_toy` do, biases and norms random too."""
    torch.manual_seed(5)
    settings = BASES[kind] | {"vocab_size": 30522}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    copy_tokenizer(path)
    return str(path)


def with_settings(config, **model):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def step(config, backend):
    """(loss, this rank's gradients by global name, keys of its checkpoint, forward passes of its linears)."""
    from megatron_embed.checkpoint.load import model_state
    from tests.helpers.step_reference import build

    original, encoder.layer_backend = encoder.layer_backend, lambda config: backend
    te_linears.counted.clear()
    try:
        built, batch = build(config)
    finally:
        encoder.layer_backend = original
    loss = built.gradients(batch).metrics()["loss"]
    gradients = {name: parameter.main_grad.clone() for chunk in built.chunks
                 for name, parameter in chunk.global_parameters().items() if parameter.requires_grad}
    keys = {value.key for value in model_state(built.chunks)["chunk0"].values()}
    return loss, gradients, keys, list(te_linears.counted)


def steps(config, *runs):
    with te_stand_in.installed():
        return [step(with_settings(config, **settings), backend) for backend, settings in runs]


def assert_equal(ours, theirs):
    assert abs(ours[0] - theirs[0]) < 1e-6 * ours[0]
    assert ours[1].keys() == theirs[1].keys() and ours[2] == theirs[2]
    assert sum(bool(gradient.any()) for gradient in ours[1].values()) > 10
    assert difference(theirs[1], ours[1]) < 1e-5
    assert distance(theirs[1], ours[1]) < 1e-6


def distance(gradients, expected):
    """The norm of the whole difference, relative to that of the whole gradient."""
    squares = sum(float((gradients[name] - gradient).square().sum()) for name, gradient in expected.items())
    return math.sqrt(squares / sum(float(gradient.square().sum()) for gradient in expected.values()))


CASES = {"qwen3": ("qwen3", 1, layout(), {}), "qwen3-tp2": ("qwen3", 2, layout(2), {}),
         "qwen3-tp2-lora": ("qwen3", 2, layout(2), {"lora": LORA}),
         "bert-tp2": ("bert", 2, layout(2), {}), "qwen2-tp2-no-sp": ("Qwen2", 2, layout(2, sp=False), {}),
         "qwen3-pp2": ("qwen3", 2, layout(1, 2), {}), "moe": ("Qwen3Moe", 1, layout(), {}),
         "qwen3-cp2": ("qwen3", 2, layout(1, 1, 2), {}),
         "qwen3-recompute": ("qwen3", 1, layout(), {"training": {"recompute": "full"}})}


@pytest.mark.parametrize("case", [
    pytest.param(name, marks=[] if name in ("qwen3-tp2", "bert-tp2", "qwen3-tp2-lora") else pytest.mark.slow)
    for name in CASES])
def test_loss_gradients_and_checkpoints_are_those_of_torch(models, case):
    kind, ranks, sizes, settings = CASES[case]
    settings = {**settings, "training": {"micro_batch_size": 3, **settings.get("training", {})}}
    config = run_config(models[kind], parallel=sizes, objective=objective_settings(), **settings)
    for ours, theirs in run_on_ranks(steps, ranks, config, ("torch", {}), ("te", {})):
        assert_equal(ours, theirs)
        assert not ours[3] and {kind for kind, *_ in theirs[3]} >= {"Linear"}
        fused = "lora" not in case and kind != "bert"
        assert any(kind == "LayerNormLinear" for kind, *_ in theirs[3]) == fused
