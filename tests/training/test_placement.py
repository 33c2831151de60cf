"""Device and dtype of the optimizer's state: the same weights from host memory, the formula's if rounded.

Neither can run without a GPU. What runs here are Megatron's own classes, told that the model's buffers lie on one, and
a stand-in for Transformer Engine's FusedAdam with its signature and its way of keeping state.
"""

import contextlib
import dataclasses
import json
import os

import pytest
import torch

from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.schema import OptimizerConfig
from megatron_embed.errors import ConfigError
from megatron_embed.planning.memory import grid_of, stage_memory
from megatron_embed.planning.shapes import shape_of
from megatron_embed.training import optimizer as optimizer_module
from megatron_embed.training.optimizer import check_optimizer
from tests.helpers import te_stand_in
from tests.helpers.optimizer_state import decays, gradient_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import open_model, run_config, save_model

STEPS = 4
OFFLOADED, AWARE = ({"distributed": True, key: True} for key in ("cpu_offload", "precision_aware"))
TRAINING = {"lr_decay_style": "constant", "learning_rate": 0.01, "weight_decay": 0.1, "adam_beta2": 0.99,
            "adam_eps": 1e-6}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@contextlib.contextmanager
def buffers_on_a_gpu(wrapped):
    """Within it tensors in the model's buffers say that they are CUDA's; copies of them do not."""
    ranges = [(buffer.param_data.data_ptr(), buffer.param_data.data_ptr() + buffer.param_data.nbytes)
              for chunk in wrapped for buffer in chunk.buffers]
    torch.Tensor.is_cuda = property(lambda tensor: any(start <= tensor.data_ptr() < end for start, end in ranges))
    try:
        yield
    finally:
        del torch.Tensor.is_cuda
    assert not wrapped[0].buffers[0].param_data.is_cuda


def open_optimizer(config):
    """(this rank's parameters by name, its chunks, its optimizer)."""
    from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp

    opened = open_model(config)
    wrapped = wrap_in_ddp(opened.chunks, config, opened.topology)
    with buffers_on_a_gpu(wrapped):
        optimizer = build_optimizer(config, wrapped, opened.topology)
    scheduler = build_scheduler(optimizer, config.training, 1000)
    return opened, wrapped, optimizer, scheduler


def stepped(opened, optimizer, steps):
    """(parameters after these steps, gradient norms), with gradients that names and steps decide."""
    parameters, norms = dict(opened.chunks[0].named_parameters()), []
    for step in steps:
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            parameter.main_grad.copy_(gradient_of(name, parameter.shape, step))
        optimizer.prepare_grads()
        optimizer.get_grad_norm()
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, norms


def halves(config, path, settings):
    """(parameters and norms after the first half of STEPS, which a checkpoint keeps; after all of them; optimizer)."""
    from megatron_embed.checkpoint.load import model_state
    from megatron_embed.checkpoint.optimizer_state import optimizer_to_save
    from megatron_embed.platform.compat import dist_checkpointing

    opened, wrapped, optimizer, _ = open_optimizer(
        dataclasses.replace(config, optimizer=OptimizerConfig(**settings)))
    with buffers_on_a_gpu(wrapped):
        half = stepped(opened, optimizer, range(STEPS // 2))
    os.makedirs(path, exist_ok=True)
    model = model_state(opened.chunks)
    dist_checkpointing.save({"model": model, "optimizer": optimizer_to_save(optimizer, model)}, path)
    with buffers_on_a_gpu(wrapped):
        return half, stepped(opened, optimizer, range(STEPS // 2, STEPS)), optimizer


def offloaded_and_plain(config, folder):
    """(per way through STEPS steps: both halves of them, between which there was a checkpoint, and what the offloaded
    state weighs; the second half from the plain run's checkpoint, offloaded; the other way round; from its own)."""
    *plain, _ = halves(config, f"{folder}/0", {"distributed": True})
    *offloaded, optimizer = halves(config, f"{folder}/1", OFFLOADED)
    return ([(*plain, 0), (*offloaded, weight_of(optimizer))], resumed(config, f"{folder}/0", OFFLOADED),
            resumed(config, f"{folder}/1", {"distributed": True}), resumed(config, f"{folder}/1", OFFLOADED))


def resumed(config, path, settings):
    """(parameters from a checkpoint that the other kind of run wrote, the second half of the steps)."""
    from megatron_embed.checkpoint.load import _load_models, model_state
    from megatron_embed.checkpoint.optimizer_state import OptimizerRestore
    from megatron_embed.platform.compat import dist_checkpointing

    opened, wrapped, optimizer, _ = open_optimizer(
        dataclasses.replace(config, optimizer=OptimizerConfig(**settings)))
    with torch.no_grad():
        for parameter in opened.chunks[0].parameters():
            parameter.add_(1.0)
    model = model_state(opened.chunks)
    with buffers_on_a_gpu(wrapped):
        restore = OptimizerRestore(optimizer, model)
    loaded = dist_checkpointing.load({"model": model, "tensors": restore.wanted(())}, path)
    with buffers_on_a_gpu(wrapped):
        _load_models(opened.chunks, loaded["model"])
        restore.load(loaded["tensors"], loaded["optimizer"])
        half = {name: parameter.detach().clone() for name, parameter in opened.chunks[0].named_parameters()}
        whole = stepped(opened, optimizer, range(STEPS // 2, STEPS))
    for group in optimizer.param_groups:
        assert group.get("fused", True), "the update is not torch's fused one"
    return half, whole


def saved_at_once(config, path, settings):
    """(parameters and norms of a run that is saved before its first step and resumed, of one that is never saved)."""
    from megatron_embed.checkpoint.load import model_state
    from megatron_embed.checkpoint.optimizer_state import optimizer_to_save
    from megatron_embed.platform.compat import dist_checkpointing

    context = te_stand_in.fused_adam() if settings == AWARE else contextlib.nullcontext()
    with context:
        opened, wrapped, optimizer, _ = open_optimizer(
            dataclasses.replace(config, optimizer=OptimizerConfig(**settings)))
        model = model_state(opened.chunks)
        os.makedirs(path, exist_ok=True)
        dist_checkpointing.save({"model": model, "optimizer": optimizer_to_save(optimizer, model)}, path)
        with buffers_on_a_gpu(wrapped):
            going_on = stepped(opened, optimizer, range(STEPS // 2, STEPS))
        opened, wrapped, optimizer, _ = open_optimizer(
            dataclasses.replace(config, optimizer=OptimizerConfig(**settings)))
        with buffers_on_a_gpu(wrapped):
            never_saved = stepped(opened, optimizer, range(STEPS // 2, STEPS))
        return resumed(config, path, settings)[1], going_on, never_saved


@pytest.mark.parametrize("settings", [OFFLOADED, AWARE], ids=["offloaded", "aware"])
def test_a_save_before_the_first_step_holds_an_optimizer_that_made_none(bert, tmp_path, settings):
    config = run_config(bert, dtype="bfloat16", training=TRAINING)
    ((from_save, after_save, never_saved),) = run_on_ranks(saved_at_once, 1, config, str(tmp_path / "saved"), settings)
    for run in (from_save, after_save):
        assert run[1] == never_saved[1]
        for name, weight in never_saved[0].items():
            assert torch.equal(run[0][name], weight), name


def weight_of(optimizer):
    """Bytes in host memory."""
    num_bytes = 0
    for part in optimizer.chained_optimizers:
        hybrid = part.optimizer
        assert hybrid.gpu_optimizer is None, "some of it stayed on the GPU"
        for inner in hybrid.sub_optimizers:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    moments = [inner.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
                    num_bytes += sum(tensor.nbytes for tensor in [parameter, parameter.grad, *moments])
                    assert {tensor.dtype for tensor in [parameter, *moments]} == {torch.float32}
    return num_bytes


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_offloaded_weights_equal_the_others(bert, tmp_path, ranks):
    config = run_config(bert, dtype="bfloat16", training=TRAINING)
    start = run_on_ranks(start_of, 1, config)[0]
    everywhere = run_on_ranks(offloaded_and_plain, ranks, config, str(tmp_path), timeout_seconds=120)
    for (plain, offloaded), to_offloaded, to_plain, again in everywhere:
        for half, others in ((plain[0], offloaded[0]), (plain[1], offloaded[1]), (plain[1], to_offloaded[1]),
                             (plain[1], to_plain[1])):
            assert others[1] == pytest.approx(half[1], rel=1e-6)
            for name, weight in half[0].items():
                assert weight.dtype == torch.bfloat16
                torch.testing.assert_close(others[0][name], weight, rtol=2**-8, atol=1e-6, msg=name)
        for name, weight in plain[0][0].items():
            assert torch.equal(to_offloaded[0][name], weight), "resumed with other parameters than were saved"
            assert torch.equal(again[1][0][name], offloaded[1][0][name]), "an interrupted run ends elsewhere"
        assert again[1][1] == offloaded[1][1]
        assert sum(not torch.equal(weight, start[name]) for name, weight in plain[1][0].items()) > 20
    shape = shape_of(config.model.path)
    expected = stage_memory(dataclasses.replace(config, optimizer=OptimizerConfig(**OFFLOADED)), shape,
                            grid_of(config, ranks), 0)
    assert sum(places[0][1][2] for places in everywhere) / ranks == pytest.approx(expected.host, rel=0.02)
    assert expected.optimizer == 0


def start_of(config):
    return {name: parameter.detach().clone() for name, parameter in open_model(config).chunks[0].named_parameters()}


def aware(config):
    """(parameters and norms after STEPS steps, dtypes of the state, its bytes)."""
    with te_stand_in.fused_adam():
        opened, _, optimizer, _ = open_optimizer(config)
        results = stepped(opened, optimizer, range(STEPS))
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    return (results, {name: {state[name].dtype for state in states} for name in states[0]},
            sum(tensor.nbytes for state in states for tensor in state.values()))


def by_formula(config):
    """AdamW written out, in float32 but for the first moment, which is rounded to bfloat16 after every step."""
    training, start = config.training, start_of(config)
    main = {name: weight.float() for name, weight in start.items()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in main.items()} for _ in range(2))
    for step in range(STEPS):
        gradients = {name: gradient_of(name, weight.shape, step) for name, weight in main.items()}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        for name, weight in main.items():
            gradient = gradients[name] * min(1.0, training.clip_grad / (float(norm) + 1e-6))
            average = first[name] * training.adam_beta1 + gradient * (1 - training.adam_beta1)
            second[name] = second[name] * training.adam_beta2 + gradient**2 * (1 - training.adam_beta2)
            corrected = second[name] / (1 - training.adam_beta2**(step + 1))
            update = average / (1 - training.adam_beta1**(step + 1)) / (corrected.sqrt() + training.adam_eps)
            decay = training.weight_decay if decays(name, weight) else 0.0
            main[name] = weight - training.learning_rate * (update + decay * weight)
            first[name] = average.bfloat16().float()
    return {name: weight.bfloat16() for name, weight in main.items()}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_moments_in_bfloat16_follow_the_formula(bert, ranks):
    config = run_config(bert, dtype="bfloat16", training=TRAINING)
    (expected,) = run_on_ranks(by_formula, 1, config)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(**AWARE))
    results = run_on_ranks(aware, ranks, config)
    planned = stage_memory(config, shape_of(config.model.path), grid_of(config, ranks), 0).optimizer
    assert sum(size for *_, size in results) / ranks == pytest.approx(planned, rel=0.02)
    for (weights, _), dtypes, _ in results:
        assert dtypes == {"exp_avg": {torch.bfloat16}, "exp_avg_sq": {torch.float32}, "master_param": {torch.float32}}
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=2**-7, atol=1e-6, msg=name)
        different = sum(int((weights[name] != weight).sum()) for name, weight in expected.items())
        assert different < 0.01 * sum(weight.numel() for weight in expected.values())


def kinds_of_adam(config):
    """Classes of the optimizer where a fused Adam is installed, with a GPU and without."""
    from megatron_embed.platform import compat
    from megatron_embed.training.optimizer import AdamW

    class ForGpus(te_stand_in.FusedAdam):
        """Stands in for Apex's optimizer: takes the same arguments, and raises without CUDA only when it is built."""

        def __init__(self, params, **settings):
            torch.optim.Optimizer.__init__(self, params, {})

    original, kinds = te_stand_in.FusedAdam, []
    te_stand_in.FusedAdam = ForGpus
    try:
        for has_cuda in (True, False):
            with te_stand_in.fused_adam():
                compat.HAS_CUDA = has_cuda
                _, _, optimizer, _ = open_optimizer(config)
            kinds.append({type(part.optimizer) for part in optimizer.chained_optimizers})
    finally:
        te_stand_in.FusedAdam = original
    return kinds == [{ForGpus}, {AdamW}]


def test_a_fused_adam_is_left_alone_without_cuda(bert):
    assert run_on_ranks(kinds_of_adam, 1, run_config(bert, training=TRAINING)) == [True]


def aware_and_plain(config, folder):
    """(halves of a run with moments in bfloat16, of one that went on from its checkpoint; of a plain run, of one that
    went on with moments in bfloat16 from its checkpoint; the other way round)."""
    plain = halves(config, f"{folder}/0", {"distributed": True})[:2]
    with te_stand_in.fused_adam():
        own = halves(config, f"{folder}/1", AWARE)[:2]
        resumes = resumed(config, f"{folder}/1", AWARE), resumed(config, f"{folder}/0", AWARE)
    return own, resumes[0], plain, resumes[1], resumed(config, f"{folder}/1", {"distributed": True})


def test_moments_in_bfloat16_are_resumed(bert, tmp_path):
    config = run_config(bert, dtype="bfloat16", training=TRAINING)
    for own, again, plain, to_aware, to_plain in run_on_ranks(aware_and_plain, 2, config, str(tmp_path)):
        assert again[1][1] == own[1][1]
        for name, weight in own[1][0].items():
            assert torch.equal(again[0][name], own[0][0][name]) and torch.equal(to_plain[0][name], own[0][0][name])
            assert torch.equal(again[1][0][name], weight), "an interrupted run ends elsewhere"
            assert torch.equal(to_aware[0][name], plain[0][0][name])
            for run in (to_aware, to_plain, plain):
                torch.testing.assert_close(run[1][0][name], weight, rtol=2**-7, atol=1e-4, msg=name)
        assert sum(not torch.equal(weight, own[0][0][name]) for name, weight in own[1][0].items()) > 20


@pytest.mark.parametrize("settings, words", [
    ({"cpu_offload": True, "distributed": False}, "optimizer.cpu_offload = True: Megatron has it only for"),
    ({"precision_aware": True, "distributed": False}, "optimizer.precision_aware = True: Megatron has it only for"),
    ({"precision_aware": True, "cpu_offload": True}, "set one of them to false")])
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("key", ["cpu_offload", "precision_aware"])
def test_a_float32_model_is_refused(key):
    with pytest.raises(ConfigError, match=f"optimizer.{key} = True: a model in model.dtype: float32"):
        config_of_overrides(["model.path=m", "model.dtype=float32", f"optimizer.{key}={json.dumps(True)}"])


def test_a_machine_that_has_no_place_for_it_is_refused(monkeypatch):
    config = run_config("m", dtype="bfloat16")
    offloaded, moments = (dataclasses.replace(config, optimizer=OptimizerConfig(**asked))
                          for asked in (OFFLOADED, AWARE))
    for asked, words in ((offloaded, "cpu_offload = True: this machine has no GPU"),
                         (moments, "precision_aware = True needs a GPU and Transformer Engine")):
        with pytest.raises(ConfigError, match=words):
            check_optimizer(asked, has_adapters=False, has_tied_head=False)
    monkeypatch.setattr(optimizer_module, "HAS_CUDA", True)
    check_optimizer(offloaded, has_adapters=True, has_tied_head=True)
    with pytest.raises(ConfigError, match=r"pip install 'megatron_embed\[gpu\]' on a GPU"):
        check_optimizer(moments, has_adapters=False, has_tied_head=False)
    monkeypatch.setattr(optimizer_module, "HAS_TRANSFORMER_ENGINE", True)
    check_optimizer(moments, has_adapters=True, has_tied_head=True)
