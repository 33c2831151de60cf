"""A whole optimizer step: the norm it reports, the learning rate it used, and that the loss falls alike everywhere."""

import itertools
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.helpers.embedding_reference import save_model as save_experts
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import NUM_NEGATIVES, ROWS, build, objective_settings, reference
from tests.helpers.toys import layout, real_records, run_config, save_model, toy_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """(loss, norm of the gradient of the whole model)."""
    one_process = reference(model, tmp_path_factory.mktemp("gradients"))
    tensors = load_file(f"{one_process.gradients}/model.safetensors")
    return one_process.loss, math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def steps(config, count):
    """Metrics of `count` steps on the same batch."""
    from megatron_embed.training.optimizer import build_optimizer, build_scheduler
    from megatron_embed.training.step import Trainer, train_step

    built, batch = build(config)
    optimizer = build_optimizer(config, built.wrapped, built.topology)
    trainer = Trainer(chunks=built.wrapped, grad_cache=built.gradients, optimizer=optimizer,
                      scheduler=build_scheduler(optimizer, config.training, 10))
    return [train_step(batch, trainer) for _ in range(count)]


NORM_LAYOUTS = [("one", layout(), True), ("dp2", layout(), True), ("dp2", layout(), False), ("tp2", layout(2), True),
                ("tp2", layout(2, sp=False), False), ("pp2", layout(pp=2), True), ("cp2", layout(cp=2), True)]


@pytest.mark.parametrize("name, sizes, distributed, clip_grad", [
    *((*case, 0.001) for case in NORM_LAYOUTS), ("dp2", layout(), True, 0.0),
    *(pytest.param(*case, 0.0, marks=pytest.mark.slow) for case in NORM_LAYOUTS if case != ("dp2", layout(), True))])
def test_gradient_norm_is_the_whole_models_before_clipping(model, expected, name, sizes, distributed, clip_grad):
    config = run_config(model, parallel=sizes, objective=objective_settings(), distributed=distributed,
                        training={"global_batch_size": ROWS, "micro_batch_size": 3, "clip_grad": clip_grad,
                                  "learning_rate": 1e-3, "lr_decay_style": "constant"})
    results = run_on_ranks(steps, 1 if name == "one" else 2, config, 1)
    assert expected[1] > 0.01
    for (metrics,) in results:
        assert metrics == results[0][0]
        assert metrics["loss"] == pytest.approx(expected[0], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(expected[1], rel=1e-5)
        assert metrics["learning_rate"] == 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_falls_on_the_same_batch(model, dtype):
    config = run_config(model, objective=objective_settings(), dtype=dtype,
                        training={"global_batch_size": ROWS, "micro_batch_size": 4, "learning_rate": 1e-3})
    (metrics,) = run_on_ranks(steps, 1, config, 8)
    losses = [step["loss"] for step in metrics]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    assert losses[-1] < losses[0] - 0.2
    rates = [step["learning_rate"] for step in metrics]
    torch.testing.assert_close(torch.tensor(rates), 1e-3 * 0.5 * (1 + torch.cos(torch.arange(8.0) / 10 * math.pi)))


def curves(config):
    return [(step["loss"], step["grad_norm"]) for step in steps(config, 6)]


@pytest.mark.slow
def test_loss_curve_is_the_same_under_every_layout(model):
    training = {"global_batch_size": ROWS, "micro_batch_size": 3, "learning_rate": 1e-3}
    one = None
    for ranks, sizes in [(1, layout()), (2, layout()), (2, layout(2)), (2, layout(pp=2)), (2, layout(cp=2))]:
        config = run_config(model, parallel=sizes, objective=objective_settings(), training=training)
        losses = torch.tensor(run_on_ranks(curves, ranks, config)[-1])
        one = losses if one is None else one
        assert one[0, 0] - one[-1, 0] > 0.1
        torch.testing.assert_close(losses, one, rtol=1e-4, atol=0)


def balance_of(directory, rows):
    """Mean over micro-batches of `rows` rows and layers of E * sum_e f_e * P_e, by Transformers, a text at a time."""
    model, tokenizer = transformers.AutoModel.from_pretrained(directory).eval(), toy_tokenizer(directory)
    records, losses = real_records(ROWS), []
    logits = {layer: [] for layer in range(len(model.layers))}
    for index, layer in enumerate(model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda module, inputs, output, index=index: logits[index].append(
                torch.nn.functional.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), module.weight)))
    for first in range(0, ROWS, rows):
        mine = records[first : first + rows]
        texts = tokenizer.tokenize([record.query for record in mine], "query").token_ids + tokenizer.tokenize(
            [text for record in mine for text in (record.positive[0], *record.negatives[:NUM_NEGATIVES])],
            "document").token_ids
        with torch.no_grad():
            for ids in texts:
                model(torch.tensor([ids]))
        for layer in logits.values():
            probabilities = torch.cat(layer).softmax(dim=-1)
            experts = probabilities.shape[1]
            chosen = probabilities.topk(model.config.num_experts_per_tok).indices
            share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
            losses.append(experts * float(share @ probabilities.mean(dim=0)))
            layer.clear()
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return str(save_experts(tmp_path_factory.mktemp("models") / "moe", "qwen3_moe"))


@pytest.mark.parametrize("ranks, sizes", [
    (1, layout()), (2, layout()), (2, layout(2)), (2, layout(pp=2)), (2, layout(cp=2)),
    (2, layout() | {"expert_model_parallel_size": 2})], ids=["one", "dp2", "tp2", "pp2", "cp2", "ep2"])
def test_balance_of_the_experts_is_reported(experts, ranks, sizes):
    config = run_config(experts, parallel=sizes, objective=objective_settings(),
                        training={"global_batch_size": ROWS, "micro_batch_size": 3, "moe_aux_loss_coefficient": 0.1})
    expected = balance_of(experts, 3)
    assert expected > 1.01
    for metrics in run_on_ranks(steps, ranks, config, 2):
        assert metrics[0]["load_balancing_loss"] == pytest.approx(expected, rel=1e-5)
        # A step's own value, and not the sum over steps: the weights have hardly moved.
        assert metrics[1]["load_balancing_loss"] == pytest.approx(expected, rel=0.02)


def test_only_an_auxiliary_loss_is_reported(model, experts):
    training = {"global_batch_size": ROWS, "micro_batch_size": 3, "moe_aux_loss_coefficient": 0.0}
    for directory in (model, experts):
        ((metrics,),) = run_on_ranks(steps, 1, run_config(directory, objective=objective_settings(),
                                                          training=training), 1)
        assert "load_balancing_loss" not in metrics


def two_models(small, large):
    return steps(small, 1)[0], steps(large, 1)[0]


def test_a_process_may_train_a_model_with_more_layers_after_another(experts, tmp_path):
    """Megatron's table of auxiliary losses is one for the process, as long as the first model that used it."""
    config = transformers.AutoConfig.from_pretrained(experts)
    config.num_hidden_layers += 2
    torch.manual_seed(4)
    larger = tmp_path / "larger"
    transformers.AutoModel.from_config(config).save_pretrained(larger)
    transformers.AutoTokenizer.from_pretrained(experts).save_pretrained(larger)
    settings = {"objective": objective_settings(), "training": {"global_batch_size": ROWS, "micro_batch_size": 3}}
    ((_, metrics),) = run_on_ranks(two_models, 1, run_config(experts, **settings), run_config(str(larger), **settings))
    assert metrics["load_balancing_loss"] == pytest.approx(balance_of(larger, 3), rel=1e-5)
