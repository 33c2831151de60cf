"""A step with Transformer Engine's layers equals one with torch's: through stand-ins that check their arguments."""

import dataclasses
import math
import sys

import pytest
import torch
import transformers
from packaging.version import Version

from megatron_embed.errors import ConfigError
from megatron_embed.models import layer_backend, te_layers
from megatron_embed.planning.shapes import shape_of
from tests.helpers import te_linears, te_stand_in
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, go_back, train
from tests.helpers.step_reference import difference, objective_settings
from tests.helpers.toys import BASES, copy_tokenizer, layout, open_model, run_config, save_model

LORA = {"rank": 3, "alpha": 6.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    directories = {kind: save_model(folder / kind, kind, tokenizer=True) for kind in ("bert", "qwen3")}
    for kind in ("Qwen2", "Qwen3Moe", "ModernBert", "Gemma3Text"):
        directories[kind] = save_mild(folder / kind, kind)
    return directories


def save_mild(path, kind, **settings):
    """A model whose weights do not amplify rounding, as those of `save_toy` do, biases and norms random too."""
    torch.manual_seed(5)
    settings = BASES[kind] | {"vocab_size": 30522} | settings
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    copy_tokenizer(path)
    return str(path)


def with_settings(config, **model):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def step(config):
    """(loss, this rank's gradients by global name, keys of its checkpoint, forward passes of its linears)."""
    from megatron_embed.checkpoint.load import model_state
    from tests.helpers.step_reference import build

    te_linears.counted.clear()
    built, batch = build(config)
    for layer in built.chunks[0].decoder.layers:
        layer.register_forward_hook(refuse_views)
    loss = built.gradients(batch).metrics()["loss"]
    keys = {value.key for value in model_state(built.chunks)["chunk0"].values()}
    return loss, gradients_of(built), keys, list(te_linears.counted)


def refuse_views(layer, inputs, outputs):
    """As Megatron's pipeline schedules on GPUs do (deallocate_output_tensor)."""
    assert outputs[0]._base is None


def gradients_of(built):
    return {name: parameter.main_grad.detach().clone().cpu() for chunk in built.chunks
            for name, parameter in chunk.global_parameters().items() if parameter.requires_grad}


def steps(config, *runs):
    """The results of `step` with each of these settings of the section `model`."""
    with te_stand_in.usable():
        return [step(with_settings(config, **settings)) for settings in runs]


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
         "moe-ep2": ("Qwen3Moe", 2, {"expert_model_parallel_size": 2}, {}),
         "moe-etp2": ("Qwen3Moe", 2, layout(2) | {"expert_tensor_parallel_size": 2}, {}),
         "moe-ep2-lora": ("Qwen3Moe", 2, {"expert_model_parallel_size": 2}, {"lora": LORA}),
         "moe-recompute": ("Qwen3Moe", 1, layout(), {"training": {"recompute": "full"}}),
         "gemma3-tp2": ("Gemma3Text", 2, layout(2), {}),
         "modernbert-tp2": ("ModernBert", 2, layout(2), {}), "qwen3-cp2": ("qwen3", 2, layout(1, 1, 2), {}),
         "qwen3-recompute": ("qwen3", 1, layout(), {"training": {"recompute": "full"}})}


@pytest.mark.parametrize("case", [
    pytest.param(name, marks=[] if name in ("qwen3-tp2", "qwen3-tp2-lora", "moe-ep2") else pytest.mark.slow)
    for name in CASES])
def test_loss_gradients_and_checkpoints_are_those_of_torch(models, case):
    kind, ranks, sizes, settings = CASES[case]
    settings = {**settings, "training": {"micro_batch_size": 3, **settings.get("training", {})}}
    config = run_config(models[kind], parallel=sizes, objective=objective_settings(), **settings)
    for ours, theirs in run_on_ranks(steps, ranks, config, {"backend": "torch"}, {"backend": "te"}):
        assert_equal(ours, theirs)
        assert not ours[3] and {kind for kind, *_ in theirs[3]} >= {"Linear"}
        fused = "lora" not in case and kind not in ("bert", "ModernBert")
        assert any(kind == "LayerNormLinear" for kind, *_ in theirs[3]) == fused
        assert any(kind == "GroupedLinear" for kind, *_ in theirs[3]) == case.startswith("moe")


def train_all(runs):
    with te_stand_in.usable():
        for values, backend in runs:
            train(values | {"model": values["model"] | {"backend": backend}})


@pytest.mark.slow
def test_a_run_may_change_its_backend(models, tmp_path):
    """Both ways: what one has saved after two steps, optimizer included, the other resumes as if it had saved it."""
    runs = {}
    for backend in ("torch", "te"):
        runs[backend] = configuration(models["qwen3"], tmp_path / backend, parallel=layout(2), train_steps=4,
                                      checkpoint={"save_every_steps": 2, "keep": 3})
    run_on_ranks(train_all, 2, [(values, backend) for backend, values in runs.items()])
    expected = curve(tmp_path / "torch")
    for saved, resumed in (("torch", "te"), ("te", "torch")):
        go_back(tmp_path / saved, tmp_path / f"{saved}-{resumed}", 2)
        values = configuration(models["qwen3"], tmp_path / f"{saved}-{resumed}", parallel=layout(2), train_steps=4)
        run_on_ranks(train_all, 2, [(values, resumed)])
        for directory in (saved, f"{saved}-{resumed}"):
            for line, other in zip(expected, curve(tmp_path / directory), strict=True):
                assert other == pytest.approx(line, rel=2e-5)


FP8 = {"backend": "te", "dtype": "bfloat16"}


def in_fp8(forwards):
    """(recipes of the forward passes without gradients, those of the passes with them)."""
    return [{recipe for *_, recipe, gradients, _ in forwards if gradients == wanted} for wanted in (False, True)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Its matrices can be multiplied in FP8 under tensor parallelism."""
    return save_model(tmp_path_factory.mktemp("wide") / "qwen3", "qwen3", tokenizer=True, intermediate_size=64)


def test_fp8_is_in_the_passes_that_are_named_and_changes_little(wide):
    config = run_config(wide, dtype="bfloat16", objective=objective_settings(), parallel=layout(2),
                        training={"micro_batch_size": 6})
    runs = [FP8 | fp8 for fp8 in ({}, {"fp8": "first_pass"}, {"fp8": "both", "fp8_recipe": "tensorwise"})]
    for plain, first, both in run_on_ranks(steps, 2, config, *runs):
        assert in_fp8(plain[3]) == [{None}, {None}]
        assert in_fp8(first[3]) == [{"Float8BlockScaling"}, {None}]
        assert in_fp8(both[3]) == [{"Float8CurrentScaling"}] * 2
        assert len({first[0], plain[0], both[0]}) == 3
        distances = [distance(run[1], plain[1]) for run in (first, both)]
        assert 1e-4 < distances[0] < distances[1] < 0.3, distances


def embeddings_after_update(config):
    """Embeddings by new weights, of a first pass: of a model that ran with others before, and of one that did not."""
    from megatron_embed.models.encoder import to_device
    from megatron_embed.models.passes import embed
    from tests.helpers.step_reference import build

    results = []
    with te_stand_in.usable():
        for runs_before in (True, False):
            built, batch = build(config)
            model = built.chunks[0]
            batches = [to_device(micro, built.topology, "mean", kernel=built.gradients.kernel, causal=model.causal,
                                 shape=model.shape, passes=model.passes) for micro in batch.micro_batches]
            before = embed(built.wrapped, batches, built.topology) if runs_before else None
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, parameter in sorted(model.global_parameters().items()):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            results.append(embed(built.wrapped, batches, built.topology))
            assert before is None or not torch.equal(before, results[-1])
        assert in_fp8(te_linears.counted)[0] == {"Float8BlockScaling"}
    return results


def test_fp8_weights_are_never_those_of_an_earlier_step(wide):
    config = run_config(wide, dtype="bfloat16", objective=objective_settings(), training={"micro_batch_size": 3})
    ((stale, new),) = run_on_ranks(embeddings_after_update, 1, with_settings(config, **FP8, fp8="first_pass"))
    assert torch.equal(stale, new)


@pytest.mark.slow
def test_recomputed_layers_are_in_fp8_too(wide):
    config = run_config(wide, dtype="bfloat16", objective=objective_settings(), training={"micro_batch_size": 3})
    recomputed = dataclasses.replace(config, training=dataclasses.replace(config.training, recompute="full"))
    both = FP8 | {"fp8": "both"}
    ((kept,),), ((again,),) = (run_on_ranks(steps, 1, settings, both) for settings in (config, recomputed))
    assert in_fp8(again[3]) == [{"Float8BlockScaling"}] * 2 and len(again[3]) > len(kept[3])
    assert distance(again[1], kept[1]) == 0


def overlapped(config):
    """(a step with torch, one whose communication overlaps, the arguments of its buffers)."""
    with te_stand_in.usable():
        plain = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tp_comm_overlap=False))
        results = [step(with_settings(plain, backend="torch")), step(with_settings(config, backend="te"))]
        buffers = dict(te_linears.buffers)
        te_layers._buffers = None
    return *results, buffers


@pytest.mark.parametrize("lora", [{}, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_communication_overlaps_where_there_are_gradients_only(wide, lora):
    config = run_config(wide, objective=objective_settings(), parallel=layout(2) | {"tp_comm_overlap": True},
                        training={"micro_batch_size": 6, "micro_batch_tokens": 2048}, lora=lora)
    for ours, theirs, buffers in run_on_ranks(overlapped, 2, config):
        assert_equal(ours, theirs)
        assert buffers == {"tokens": 2048, "hidden": 32, "tp_size": 2, "fp8": False}
        assert {(gradients, overlaps) for *_, gradients, overlaps in theirs[3]} == {(False, False), (True, True)}


REFUSED = [
    ({"backend": "te"}, {}, "model.backend = 'te': it needs a GPU; use 'auto' or 'torch' here"),
    ({"fp8": "both"}, {}, "model.fp8 = 'both' needs Transformer Engine: it needs a GPU; use 'none' here"),
    ({}, {"tensor_model_parallel_size": 2, "tp_comm_overlap": True},
     "parallel.tp_comm_overlap = True needs Transformer Engine: it needs a GPU; set it to false here"),
    ({"backend": "torch", "fp8": "both"}, {}, "model.fp8 = 'both': it is Transformer Engine's; set model.backend to"),
    ({"dtype": "float32", "fp8": "both"}, {}, "model.fp8 = 'both': FP8 layers take and give bfloat16"),
    ({"fp8_recipe": "tensorwise"}, {}, "model.fp8_recipe = 'tensorwise': has no effect without model.fp8"),
    ({}, {"tp_comm_overlap": True}, "parallel.tp_comm_overlap = True.*set tensor_model_parallel_size > 1"),
    ({"backend": "torch"}, {"tensor_model_parallel_size": 2, "tp_comm_overlap": True}, "it is Transformer Engine's"),
    ({"fp8": "both"}, {"tensor_model_parallel_size": 2, "tp_comm_overlap": True}, "hold no blockwise FP8 numbers")]


@pytest.mark.parametrize("model, parallel, words", REFUSED)
def test_what_cannot_run_is_refused(model, parallel, words):
    config = run_config("model", training={"micro_batch_tokens": 1024})
    with pytest.raises(ConfigError, match=words):
        layer_backend.layer_backend(dataclasses.replace(
            config, model=dataclasses.replace(config.model, **{"dtype": "bfloat16", **model}),
            parallel=dataclasses.replace(config.parallel, **parallel)))


@pytest.mark.parametrize("version, settings, words", [
    ("2.2.1", {"backend": "te"}, "model.backend = 'te': version 2.2.1 is older than 2.3; use 'auto'"),
    ("2.3.0", {"backend": "te", "dtype": "float32"}, "model.backend = 'te': it multiplies float32 matrices in TF32"),
    ("2.3.0", {"fp8": "both"}, "model.fp8 = 'both' with model.fp8_recipe = 'blockwise': needs CUDA 12.9; use 'none'"),
    ("2.3.0", {"fp8": "both", "fp8_recipe": "tensorwise"}, "a rank's MLP width is 24, .* not a multiple of 16"),
    ("2.3.0", {}, None)])
def test_what_a_gpu_machine_cannot_run_is_refused(models, monkeypatch, version, settings, words):
    monkeypatch.setattr(layer_backend, "HAS_CUDA", True)
    monkeypatch.setattr(layer_backend, "HAS_TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(layer_backend, "get_te_version", lambda: Version(version))
    config = with_settings(run_config(models["qwen3"], parallel=layout(2)), **{"dtype": "bfloat16", **settings})
    with te_stand_in.installed():
        monkeypatch.setattr(sys.modules["transformer_engine.pytorch.fp8"], "check_fp8_block_scaling_support",
                            lambda: (False, "needs CUDA 12.9."))
        if words is None:
            assert layer_backend.layer_backend(config) == "te"
            return
        with pytest.raises(ConfigError, match=words):
            layer_backend.check_layer_backend(config, shape_of(models["qwen3"]))


def test_widths_of_experts_are_checked_for_fp8(models, monkeypatch):
    monkeypatch.setattr(layer_backend, "_why_not", lambda config: None)
    monkeypatch.setattr(layer_backend, "_why_no_fp8", lambda recipe: None)
    shape = dataclasses.replace(shape_of(models["Qwen3Moe"]), hidden_size=32, head_dim=16)
    config = with_settings(run_config(models["Qwen3Moe"]), dtype="bfloat16", fp8="both")
    with pytest.raises(ConfigError, match=r"a rank's width of an expert is 20, .* or fewer "
                                          r"parallel\.expert_tensor_parallel_size"):
        layer_backend.check_layer_backend(config, shape)
    layer_backend.check_layer_backend(config, dataclasses.replace(shape, ffn_hidden_size=32))


MOE_IN_FP8 = {"hidden_size": 32, "head_dim": 16, "moe_intermediate_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, LORA], ids=["all", "adapters"])
def test_experts_in_fp8(tmp_path, lora):
    config = run_config(save_mild(tmp_path / "moe", "Qwen3Moe", **MOE_IN_FP8), dtype="bfloat16",
                        objective=objective_settings(), parallel={"expert_model_parallel_size": 2},
                        training={"micro_batch_size": 3}, lora=lora)
    runs = [FP8 | fp8 for fp8 in ({}, {"fp8": "first_pass"}, {"fp8": "both", "fp8_recipe": "tensorwise"})]
    for plain, first, both in run_on_ranks(steps, 2, config, *runs):
        experts = [[forward for forward in run[3] if forward[0] == "GroupedLinear"] for run in (plain, first, both)]
        assert [in_fp8(forwards) for forwards in experts] == [
            [{None}, {None}], [{"Float8BlockScaling"}, {None}], [{"Float8CurrentScaling"}] * 2]
        distances = [distance(run[1], plain[1]) for run in (first, both)]
        assert 1e-4 < distances[0] < distances[1] < 0.5, distances


def padded_experts(config):
    """(outputs, gradients) of one layer's experts, without padding and with that of FP8, of which they know nothing
    else here; and the same without any rows."""
    with te_stand_in.usable():
        (model,) = open_model(config).chunks
        experts = model.decoder.layers[0].mlp.experts
        for parameter in experts.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
        results = []
        for sizes in ((5, 0, 16, 3), (0, 0, 0, 0)):
            for fp8 in (None, "e4m3"):
                experts.config.fp8 = fp8
                torch.manual_seed(1)
                rows, weights = (torch.randn(sum(sizes), *width).requires_grad_() for width in ((24,), ()))
                (output, _) = experts(rows, torch.tensor(sizes), weights)
                output.square().sum().backward()
                gradients = [parameter.main_grad.clone() for parameter in experts.parameters()]
                for parameter in experts.parameters():
                    parameter.main_grad.zero_()
                results.append([output.detach(), rows.grad, weights.grad, *gradients])
        return results


def test_padding_of_experts_changes_nothing(models):
    ((plain, padded, *empty),) = run_on_ranks(padded_experts, 1, with_settings(
        run_config(models["Qwen3Moe"]), backend="te"))
    assert len(plain) == 3 + 4 * 2 and all(value.any() for value in plain[:3])
    for value, other in zip(plain, padded, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-6)
    assert all(len(outputs[0]) == 0 and not any(value.any() for value in outputs[3:]) for outputs in empty)
