"""AdamW under Megatron's optimizers equals torch's; what decays; the shapes of the learning-rate schedule; clipping."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from megatron_embed.config.schema import TrainingConfig
from tests.helpers.optimizer_state import decays, gradient_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, train
from tests.helpers.toys import layout, open_model, run_config, save_model

STEPS = 5
TRAINING = {"lr_decay_style": "constant", "learning_rate": 0.01, "weight_decay": 0.1, "adam_beta2": 0.99,
            "adam_eps": 1e-6}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert", "bert")


def open_optimizer(config):
    """(this rank's parameters by name, their optimizer); the schedule has set learning rate and weight decay."""
    from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp

    opened = open_model(config)
    wrapped = wrap_in_ddp(opened.chunks, config, opened.topology)
    optimizer = build_optimizer(config, wrapped, opened.topology)
    build_scheduler(optimizer, config.training, 1000)
    return dict(opened.chunks[0].named_parameters()), optimizer


def optimized(config):
    """(parameters after STEPS steps, gradient norms), with gradients that names and steps decide."""
    from megatron_embed.training.optimizer import squared_norms, update

    parameters, optimizer = open_optimizer(config)
    norms = []
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.main_grad.copy_(gradient_of(name, parameter.shape, step))
        squares = squared_norms(optimizer)
        megatrons = float(optimizer.get_grad_norm())  # of every tensor, read back
        norm, updated = update(optimizer, squares, 0.5)
        assert updated and norm == megatrons
        norms.append(norm)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, norms


def by_torch(config):
    """The same by torch.optim.AdamW, no decay on biases and norms, clipped by torch's own function."""
    opened = open_model(config)
    parameters = dict(opened.chunks[0].named_parameters())
    groups = [{"params": [p for name, p in parameters.items() if decays(name, p)]},
              {"params": [p for name, p in parameters.items() if not decays(name, p)], "weight_decay": 0.0}]
    training = config.training
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, weight_decay=training.weight_decay,
                                  betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_eps)
    norms = []
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(name, parameter.shape, step)
        limit = training.clip_grad or math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), limit)))
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, norms


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize("ranks, distributed", [(1, False), (1, True), (2, False), (2, True)])
def test_parameters_equal_those_of_torch(bert, ranks, distributed, clip_grad):
    config = run_config(bert, training=TRAINING | {"clip_grad": clip_grad}, distributed=distributed)
    ((expected, norms),) = run_on_ranks(by_torch, 1, config)
    assert sum(not decays(name, parameter) for name, parameter in expected.items()) > 20
    for parameters, our_norms in run_on_ranks(optimized, ranks, config):
        assert parameters.keys() == expected.keys()
        assert our_norms == pytest.approx(norms, rel=1e-5)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def one_update(config, loss, value):
    """(norm, whether there was a step, whether a parameter moved, `step` of the groups) with all gradients `value`."""
    from megatron_embed.training.optimizer import squared_norms, update

    parameters, optimizer = open_optimizer(config)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.main_grad.fill_(value)
    norm, updated = update(optimizer, squared_norms(optimizer), loss)
    moved = any(not torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    return norm, updated, moved, {group.get("step", 0) for group in optimizer.param_groups}


@pytest.mark.parametrize("loss, value, norm", [(math.nan, 1.0, math.nan), (0.5, math.nan, math.inf),
                                               (0.5, math.inf, math.inf), (0.5, 1.0, None)])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(bert, loss, value, norm):
    ((ours, *rest),) = run_on_ranks(one_update, 1, run_config(bert, training=TRAINING), loss, value)
    assert rest == ([True, True, {1}] if norm is None else [False, False, {0}])
    assert norm is None or ours == pytest.approx(norm, nan_ok=True)


def decay_of_groups(config):
    """Parameter name -> weight decay of its group."""
    parameters, optimizer = open_optimizer(config)
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {names[id(parameter)]: group["weight_decay"] for group in optimizer.param_groups
            for parameter in group["params"]}


def test_biases_and_norms_do_not_decay(bert):
    (decays_by_name,) = run_on_ranks(decay_of_groups, 1, run_config(bert, training=TRAINING, distributed=False))
    assert decays_by_name["decoder.layers.0.mlp.linear_fc1.weight"] == 0.1
    assert decays_by_name["embedding.word_embeddings.weight"] == 0.1
    for name, decay in decays_by_name.items():
        assert (decay == 0) == (name.endswith("bias") or "norm" in name), name


def many_small_steps(config):
    """(dtypes of a parameter, its gradient and the optimizer's copy, how far the parameter moved in 400 steps)."""
    parameters, optimizer = open_optimizer(config)
    parameter = parameters["decoder.layers.0.post_mlp_layernorm.weight"]
    before = parameter.detach().float()
    for _ in range(400):
        for other in parameters.values():
            other.main_grad.fill_(1.0)
        optimizer.step()
    (mains,) = {main.dtype for group in optimizer.param_groups for main in group["params"]}
    return (parameter.dtype, parameter.main_grad.dtype, mains), parameter.detach().float() - before


@pytest.mark.parametrize("distributed", [True, False])
def test_bfloat16_parameters_have_float32_mains(bert, distributed):
    # One step is a hundredth of the spacing of bfloat16 near 1.
    config = run_config(bert, dtype="bfloat16", distributed=distributed,
                        training=TRAINING | {"learning_rate": 4e-5, "weight_decay": 0.0, "clip_grad": 0.0})
    dtypes, moved = run_on_ranks(many_small_steps, 1, config)[0]
    assert dtypes == (torch.bfloat16, torch.float32, torch.float32)
    assert moved.mean() == pytest.approx(-400 * 4e-5, rel=0.1)


def learning_rates(steps, **settings):
    from megatron_embed.training.optimizer import build_scheduler

    training = TrainingConfig(learning_rate=2e-3, train_steps=steps, **settings)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    scheduler = build_scheduler(optimizer, training, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return rates


def rates_of_transformers(name, steps, warmup, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps,
                                           scheduler_specific_kwargs=settings)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("style, peer", [("cosine", "cosine"), ("linear", "linear"),
                                         ("constant", "constant_with_warmup")])
def test_schedules_are_those_of_transformers(style, peer, warmup):
    rates = learning_rates(20, lr_decay_style=style, warmup_steps=warmup)
    assert rates == pytest.approx(rates_of_transformers(peer, 20, warmup), abs=1e-9)
    assert (rates[0] == 0) == (warmup > 0)


def test_decay_with_the_square_root_is_that_of_transformers():
    rates = learning_rates(20, lr_decay_style="inverse-square-root", warmup_steps=4)
    assert rates == pytest.approx(rates_of_transformers("inverse_sqrt", 20, 4), abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 4])
def test_stable_phase_and_decay_are_those_of_transformers(warmup):
    rates = learning_rates(20, lr_decay_style="wsd", wsd_decay_ratio=0.25, warmup_steps=warmup)
    assert rates == pytest.approx(rates_of_transformers(
        "warmup_stable_decay", 20, warmup, num_decay_steps=5, decay_type="linear"), abs=1e-9)
    assert rates.count(2e-3) == 16 - warmup


def test_warmup_may_be_a_share_of_the_steps():
    assert learning_rates(20, warmup_ratio=0.16) == learning_rates(20, warmup_steps=4)
    assert learning_rates(30, warmup_ratio=0.1) == learning_rates(30, warmup_steps=3)  # 0.1 * 30 is above 3 in floats


def test_decay_ends_at_the_minimum():
    rates = learning_rates(20, lr_decay_style="cosine", min_learning_rate=5e-4)
    assert rates[0] == pytest.approx(2e-3)
    assert rates[10] == pytest.approx((2e-3 + 5e-4) / 2)
    assert 5e-4 < rates[-1] < 5.2e-4


def dropout_stream(config, step):
    from megatron_embed.platform.compat import get_cuda_rng_tracker
    from megatron_embed.training.step import seed_step

    opened = open_model(config)
    seed_step(5, step, opened.topology)
    same = torch.rand(3).tolist()
    with get_cuda_rng_tracker().fork():
        return same, torch.rand(3).tolist()


def test_dropout_is_a_function_of_seed_step_and_place(bert):
    streams = {}
    for name, sizes in {"dp2": layout(), "tp2": layout(2), "cp2": layout(cp=2), "pp2": layout(pp=2)}.items():
        config = run_config(bert, parallel=sizes)
        streams[name] = run_on_ranks(dropout_stream, 2, config, 3)
        assert run_on_ranks(dropout_stream, 2, config, 3) == streams[name]
        assert run_on_ranks(dropout_stream, 2, config, 4)[0][0] != streams[name][0][0]
    for name in ("dp2", "cp2", "pp2"):
        assert streams[name][0][0] != streams[name][1][0]
    # Tensor-parallel ranks hold the same activations where they are not sharded, and shards of them elsewhere.
    assert streams["tp2"][0][0] == streams["tp2"][1][0]
    assert streams["tp2"][0][1] != streams["tp2"][1][1]


def test_a_rank_that_owns_no_part_of_a_small_adapter_clips_with_the_others(tmp_path):
    values = configuration(save_model(tmp_path / "model", "qwen3", tokenizer=True), tmp_path / "run", train_steps=1,
                           global_batch_size=6, clip_grad=1e-3)
    values["lora"] = {"rank": 1, "target_modules": ["q_proj"]}
    run_on_ranks(train, 3, values)
    assert len(curve(tmp_path / "run")) == 1
