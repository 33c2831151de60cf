"""Metrics on dashboards, and the FLOPs of a step against a count of Transformers' own model."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from megatron_embed.config.schema import CheckpointConfig, LoggingConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.suite import EvaluationSuite
from megatron_embed.losses.matryoshka import matryoshka_dims
from megatron_embed.objectives import contrastive, hard_negatives
from megatron_embed.objectives import labelled_pairs as pairs
from megatron_embed.objectives.base import MARGINS, matryoshka_names
from megatron_embed.objectives.learned_scale import LearnedScale
from megatron_embed.objectives.reranking import Reranking
from megatron_embed.planning.flops import forward_flops
from megatron_embed.planning.hardware import GPUS, gpu_named
from megatron_embed.planning.shapes import shape_of
from megatron_embed.training.dashboards import CUSTOM_SCALARS
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.progress import Progress
from tests.helpers.charts import charts_of
from tests.helpers.planned_models import BERT, MOE, QWEN3

METRICS = {"loss": 1.5, "in_batch_accuracy": 0.5, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 10.0,
           "memory_gib": 1.0, "zh/loss": 2.0}
STUB = """
import json, pathlib
calls = []
class Run:
    id = "abc"
    def log(self, values, step):
        calls.append(("log", step, values))
    def finish(self):
        calls.append(("finish",))
def init(**options):
    calls.append(("init", options))
    return Run()
"""


OF_A_STEP = {"grad_norm": "Loss", "learning_rate": "Loss", "epoch": "Loss", "load_balancing_loss": "Loss",
             "skipped_steps": "Loss",
             "tokens_per_second": "Throughput", "tflops_per_rank": "Throughput", "mfu": "Throughput",
             "step_seconds": "Throughput", "padding_fraction": "Throughput", "truncated_fraction": "Throughput",
             "memory_gib": "Memory"}


def metrics_of_the_objectives():
    """All that an objective can be asked for, over two widths; and what of that is trained."""
    config = RunConfig(model=ModelConfig(path="x"), objective=ObjectiveConfig(loss="sigmoid",
                                                                              learnable_temperature=True))
    learned = LearnedScale(config).names
    return {*contrastive.NAMES, *hard_negatives.NAMES, *pairs.NAMES, *Reranking.names, *MARGINS, *learned,
            *matryoshka_names(matryoshka_dims((64, 32), ()))}, learned


def metrics_of_the_evaluation():
    """All that two sets of each kind give, at two more widths."""
    suite = EvaluationSuite(dims=(64, 32), **{kind: [SimpleNamespace(name=name) for name in ("mini_zh", "dim_sum")]
                                    for kind in ("retrieval", "sts", "reranking")})
    return suite.metric_names()


def test_every_kind_of_metric_has_one_chart():
    """The metrics come from a step, the objectives and an evaluation, not from a list of charts."""
    objectives, learned = metrics_of_the_objectives()
    assert {"loss", "loss@32", "margin", "similarity", "positive_score", "bias_gradient"} < objectives
    groups = {f"train/{name}": group for name, group in OF_A_STEP.items()}
    for name in objectives:
        group = "Loss" if name.startswith("loss") or name in learned else "Retrieval"
        groups |= {f"train/{name}": group, f"eval/{name}": group, f"zh/{name}": "Data sets",
                   f"data/zh/{name}": "Data sets"}
    groups["zh/load_balancing_loss"] = "Data sets"
    evaluation = metrics_of_the_evaluation()
    assert {"ndcg@10", "dim_32/precision@10", "mini_zh/spearman", "mini_zh/dim_64/pearson", "rerank/map"} < {
        *evaluation}
    groups |= {f"eval/{name}": "Retrieval" for name in evaluation}
    assert {tag: [group for group, _ in charts_of(tag)] for tag in groups} == {
        tag: [group] for tag, group in groups.items()}


@pytest.mark.parametrize("tag, chart", [
    ("eval/few/dim_16/ndcg@10", "held-out retrieval by truncated vectors"), ("eval/spearman", "held-out pairs"),
    ("eval/dim_sum/ndcg@10", "held-out retrieval"), ("eval/dim_16/pearson", "held-out pairs by truncated vectors"),
    ("train/loss@64", "loss at each width"), ("eval/precision@10", "held-out retrieval, precision")])
def test_widths_and_kinds_have_charts_of_their_own(tag, chart):
    assert [name for _, name in charts_of(tag)] == [chart]


def test_tensorboard_gets_the_scalars_and_their_groups(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    writer = MetricsWriter(str(tmp_path), settings=LoggingConfig(), active=True, progress=Progress(
        train_steps=2, first_step=0, steps_per_epoch=4))
    writer.step(1, METRICS, log=True)
    writer.close()
    assert writer.error is None
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        name if "/" in name else f"train/{name}" for name in (*METRICS, "epoch")}
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(CUSTOM_SCALARS)


def test_weights_and_biases_gets_the_same_and_goes_on_with_its_run(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    try:
        for first_step, known in ((0, None), (1, "abc")):
            assert first_step or "wandb" not in sys.modules  # imported only when asked for
            writer = MetricsWriter(
                str(tmp_path / "run"), settings=LoggingConfig(tensorboard=False), active=True,
                progress=Progress(train_steps=2, first_step=first_step, steps_per_epoch=None),
                wandb_settings={"task": "embedding"})
            writer.step(first_step + 1, METRICS, log=True)
            writer.close()
            calls = sys.modules["wandb"].calls
            assert calls[0][1] == {"project": "ours", "id": known, "resume": "allow", "name": "run",
                                   "dir": str(tmp_path / "run"), "config": {"task": "embedding"}}
            assert calls[1] == ("log", first_step + 1,
                                {name if "/" in name else f"train/{name}": value for name, value in METRICS.items()})
            assert calls[2:] == [("finish",)]
            calls.clear()
    finally:
        sys.modules.pop("wandb", None)


def test_weights_and_biases_without_its_package_or_a_directory_is_refused(tmp_path):
    from megatron_embed.run.preflight import check_outputs

    config = RunConfig(model=ModelConfig(path="x"), checkpoint=CheckpointConfig(directory=str(tmp_path)),
                       logging=LoggingConfig(wandb=True))
    with pytest.raises(ConfigError, match=r"logging.wandb = True: the package wandb is not installed; pip install"):
        check_outputs(config)
    with pytest.raises(ConfigError, match=r"logging.wandb = True: the run has no directory; set logging.directory"):
        check_outputs(RunConfig(model=ModelConfig(path="x"), logging=LoggingConfig(wandb=True)))


@pytest.mark.parametrize("values", [BERT, QWEN3, MOE], ids=["bert", "qwen3", "moe"])
def test_flops_are_those_of_the_hub_model(values, tmp_path):
    """torch counts the products of Transformers' model; its attention computes every key, causal or not."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.for_model(**values, attn_implementation="eager", experts_implementation="eager")
    model = transformers.AutoModel.from_config(config).eval()
    if values["model_type"] == "bert":
        model.pooler = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(0, 100, (2, 32)))
    expected = forward_flops(shape_of(str(tmp_path)), 64, 2 * 32**2, causal=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert forward_flops(shape_of(str(tmp_path)), 64, 2 * 32**2, causal=True) < expected


def test_peaks_are_found_by_the_drivers_names():
    assert gpu_named("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_named("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert gpu_named("NVIDIA H200") is GPUS["h200"]
    assert gpu_named("NVIDIA H100 PCIe") is gpu_named("NVIDIA GeForce RTX 4090") is None
