"""Communication behind the computation changes no gradient and no weight, whatever the layout."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.schema import OptimizerConfig
from megatron_embed.errors import ConfigError, PreemptedError
from megatron_embed.training import optimizer as optimizer_module
from megatron_embed.training.optimizer import check_optimizer, overlaps
from tests.helpers.embedding_reference import EmbeddingReference
from tests.helpers.exactness_cases import KINDS, Case, Layout
from tests.helpers.gradient_errors import gather_shards
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, export, train
from tests.helpers.step_reference import ROWS, build, objective_settings
from tests.helpers.toys import layout, run_config, save_model

BUCKET = 3000
"""Parameters; the toys have ten times as many, so there is something to overlap."""
OFF = {"distributed": True}
GRADIENTS = OFF | {"overlap_grad_reduce": True}
BOTH = GRADIENTS | {"overlap_param_gather": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind, tokenizer=True) for kind in ("bert", "qwen3")}


def with_optimizer(config, settings):
    return dataclasses.replace(config, optimizer=OptimizerConfig(**settings))


def three_steps(config, settings):
    """Results of three steps under each of `settings`: (metrics of each, gradients of the first, weights at the end,
    buckets whose gradients were on their way when each step's backward passes ended)."""
    return [_three_steps(with_optimizer(config, one)) for one in settings]


def _three_steps(config):
    from megatron_embed.training import optimizer as module
    from megatron_embed.training.step import Trainer, train_step

    original_wrap, original_finish = module.wrap_in_ddp, module.finalize_model_grads
    module.wrap_in_ddp = lambda *arguments: original_wrap(*arguments, bucket_size=BUCKET)
    try:
        built, batch = build(config)
    finally:
        module.wrap_in_ddp = original_wrap
    under_way, gradients = [], {}

    def finish(*arguments, **options):
        groups = [group for chunk in built.wrapped
                  for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
        under_way.append((sum(group.grad_reduce_handle is not None for group in groups), len(groups)))
        original_finish(*arguments, **options)
        if not gradients:
            gather_shards(built.wrapped)
            for chunk in built.chunks:
                gradients.update({name: parameter.main_grad.clone()
                                  for name, parameter in chunk.global_parameters().items()})

    optimizer = module.build_optimizer(config, built.wrapped, built.topology)
    trainer = Trainer(chunks=built.wrapped, grad_cache=built.gradients, optimizer=optimizer,
                      scheduler=module.build_scheduler(optimizer, config.training, 10))
    module.finalize_model_grads = finish
    try:
        metrics = [train_step(batch, trainer) for _ in range(3)]
    finally:
        module.finalize_model_grads = original_finish
    trainer.complete_parameters()
    weights = {name: parameter.detach().clone() for chunk in built.chunks
               for name, parameter in chunk.global_parameters().items()}
    return metrics, gradients, weights, under_way


def check_alike(results, *, exactly, first_stage=range(8)):
    for rank, (plain, *others) in enumerate(results):
        metrics, gradients, weights, under_way = plain
        assert len(gradients) == len(weights) > 5
        assert metrics[0]["loss"] - metrics[-1]["loss"] > 0.01
        assert all(started == 0 for started, _ in under_way)
        for other_metrics, other_gradients, other_weights, other_under_way in others:
            assert [step["loss"] for step in other_metrics] == pytest.approx([step["loss"] for step in metrics],
                                                                            rel=1e-6)
            for name, weight in weights.items():
                assert gradients[name].any() or "position_embeddings" in name
                for tensor, wanted in ((other_gradients[name], gradients[name]), (other_weights[name], weight)):
                    if exactly:
                        assert torch.equal(tensor, wanted), name
                    torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=2e-6, msg=name)
            # The first step finds out what there is to wait for; Megatron splits the first stage's gradients alone.
            assert [started for started, _ in other_under_way][1:] == [total for _, total in other_under_way][1:]
            if rank in first_stage:
                assert other_under_way[1][0] >= 4


def config_for(directory, sizes, **settings):
    # Unclipped: a norm summed up in another order would move every weight by a rounding.
    training = {"global_batch_size": ROWS, "micro_batch_size": 2, "learning_rate": 3e-3, "lr_decay_style": "constant",
                "clip_grad": 0.0, **settings}
    return run_config(directory, parallel=sizes, objective=objective_settings(), training=training)


@pytest.mark.parametrize("kind, settings", [
    ("bert", [OFF, BOTH]), pytest.param("qwen3", [OFF, GRADIENTS, BOTH], marks=pytest.mark.slow)])
def test_two_replicas_train_the_same_weights(models, kind, settings):
    # One number from each of two ranks: the order in which they are added changes nothing.
    check_alike(run_on_ranks(three_steps, 2, config_for(models[kind], layout()), settings), exactly=True)


@pytest.mark.parametrize("sizes, first_stage", [
    pytest.param(layout(2), range(4), id="tp2", marks=pytest.mark.slow),
    pytest.param(layout(pp=2), range(2), id="pp2")])
def test_replicas_that_are_split_train_the_same_weights(models, sizes, first_stage):
    results = run_on_ranks(three_steps, 4, config_for(models["qwen3"], sizes), [OFF, BOTH])
    check_alike(results, exactly=True, first_stage=first_stage)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [layout(pp=2, vpp=2), layout(cp=2)], ids=["vpp2", "cp2"])
@pytest.mark.parametrize("distributed", [True, False])
def test_the_other_layouts_train_the_same_weights(models, sizes, distributed):
    # Six micro-batches: the interleaved pipeline wants an even number.
    config = config_for(models["qwen3"], sizes, recompute="full" if distributed else "none", micro_batch_size=1)
    settings = [OFF, GRADIENTS, BOTH] if distributed else [
        {**one, "distributed": False} for one in (OFF, GRADIENTS)]
    check_alike(run_on_ranks(three_steps, 4, config, settings), exactly=False,
                first_stage=range(4 // sizes["pipeline_model_parallel_size"]))


OVERLAPPED = [
    Case(kind=kind, layout=sizes, micro_batches=2, repeats=3, distributed=True, overlap=True)
    for sizes in (Layout(dp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(cp=2, dp=2), Layout(pp=2, vpp=2, dp=2))
    for kind in KINDS] + [
    Case(kind="qwen3_moe", layout=Layout(dp=2, ep=2), tokens=176, repeats=3, distributed=True, overlap=True, aux=0.1),
    Case(kind="qwen3_moe", layout=Layout(tp=2, dp=2, ep=2), micro_batches=2, repeats=3, distributed=True, overlap=True)]


@pytest.mark.slow
@pytest.mark.parametrize("case", OVERLAPPED, ids=str)
def test_gradients_equal_one_process(oracle, case):
    (outcome,) = oracle.run([case])
    assert outcome.exact, outcome


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return EmbeddingReference(tmp_path_factory.mktemp("oracle"))


@pytest.mark.slow
def test_a_run_writes_the_same_checkpoint(models, tmp_path):
    for name, settings in (("off", OFF), ("on", BOTH)):
        values = configuration(models["bert"], tmp_path / name, train_steps=2, checkpoint={
            "export_at_end": str(tmp_path / f"{name}-export")})
        values["optimizer"] = settings
        run_on_ranks(train, 2, values)
    assert curve(tmp_path / "on") == curve(tmp_path / "off")
    overlapped, wanted = (load_file(tmp_path / f"{name}-export" / "model.safetensors") for name in ("on", "off"))
    assert overlapped.keys() == wanted.keys()
    start = load_file(f"{models['bert']}/model.safetensors")
    assert all(torch.equal(overlapped[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(wanted[name], start[name]) for name in wanted.keys() & start.keys())


def interrupted(values):
    """Runs until the time is up, after the first step."""
    with pytest.raises(PreemptedError, match="stopped after 1 steps"):
        train(values)


@pytest.mark.slow
def test_a_run_that_stops_early_saves_what_all_ranks_updated(models, tmp_path):
    exports = []
    for name, settings in (("off", OFF), ("on", BOTH)):
        values = configuration(models["bert"], tmp_path / name, train_steps=3, exit_duration_minutes=1e-6)
        values["optimizer"] = settings
        run_on_ranks(interrupted, 2, values)
        exports.append(export(tmp_path / name, tmp_path / f"{name}-export"))
    start = load_file(f"{models['bert']}/model.safetensors")
    assert all(torch.equal(exports[1][name], exports[0][name]) for name in exports[0])
    assert any(not torch.equal(exports[0][name], start[name]) for name in exports[0].keys() & start.keys())


@pytest.mark.parametrize("settings, words", [
    ({"overlap_param_gather": True}, "overlap_grad_reduce; set that to true too"),
    ({"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed": False}, "nothing is gathered where")])
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("override", ["task=reranker", "lora.rank=4"])
def test_parameters_that_others_read_are_not_gathered_behind_the_computation(override):
    overrides = [f"optimizer.{key}={json.dumps(value)}" for key, value in BOTH.items()]
    with pytest.raises(ConfigError, match=r"optimizer.overlap_param_gather = True: .* set it to false"):
        config_of_overrides(["model.path=m", *overrides, override,
                             *(["objective.loss=pointwise"] if "task" in override else [])])


def test_what_the_model_alone_shows_is_refused():
    config = with_optimizer(run_config("m"), BOTH)
    check_optimizer(config, has_adapters=False, has_tied_head=False)
    with pytest.raises(ConfigError, match="optimizer.overlap_param_gather = True: parameters of adapters"):
        check_optimizer(config, has_adapters=True, has_tied_head=False)
    with pytest.raises(ConfigError, match="optimizer.overlap_grad_reduce = True: the head's weights are rows"):
        check_optimizer(config, has_adapters=False, has_tied_head=True)


@pytest.mark.parametrize("has_cuda, asked, model, expected", [
    (True, {}, {}, (True, True)), (False, {}, {}, (False, False)),
    (True, {"overlap_grad_reduce": False}, {}, (False, False)),
    (True, {"overlap_param_gather": False}, {}, (True, False)),
    (False, BOTH, {}, (True, True)), (True, {"distributed": False}, {}, (True, False)),
    (True, {}, {"has_adapters": True}, (True, False)), (True, {}, {"has_head": True}, (True, False)),
    (True, {}, {"has_head": True, "has_tied_head": True}, (False, False))])
def test_auto_is_on_with_gpus_where_it_can_be(monkeypatch, has_cuda, asked, model, expected):
    monkeypatch.setattr(optimizer_module, "HAS_CUDA", has_cuda)
    config = with_optimizer(run_config("m"), asked)
    parts = {"has_adapters": False, "has_head": False, "has_tied_head": False} | model
    check_optimizer(config, has_adapters=parts["has_adapters"], has_tied_head=parts["has_tied_head"])
    assert overlaps(config.optimizer, **parts) == expected
