"""Which library multiplies float32 matrices: measured on rank 0, used by all ranks, kept by a resumed run."""

import contextlib
import functools
import json
import logging
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from megatron_embed.errors import ConfigError
from megatron_embed.platform import cpu_linear, cpu_matmul
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, go_back, model, train  # noqa: F401  fixture
from tests.helpers.toys import run_config

MIXED, OTHER = ("torch", "onednn", "torch"), ("onednn", "torch", "onednn")


@pytest.mark.skipif(not cpu_linear.is_available(), reason="no oneDNN on this processor")
def test_onednn_must_be_clearly_faster():
    for ratios, expected in (((1.0, 1.04, 0.7), ("torch", "torch", "torch")), ((0.9, 2.0, 1.1), ("torch", "onednn",
                             "onednn"))):
        with mock.patch.object(cpu_matmul, "torch_over_onednn", return_value=ratios):
            assert cpu_matmul.fastest_libraries([(1536, 384), (384, 1536)]) == (expected, ratios)


def test_small_weights_are_not_measured():
    with mock.patch.object(cpu_matmul, "torch_over_onednn", side_effect=AssertionError):
        assert cpu_matmul.fastest_libraries([(255, 256), (256, 255)]) is None
    with mock.patch.object(cpu_matmul, "is_available", return_value=False):
        assert cpu_matmul.fastest_libraries([(1536, 384)]) is None


def test_the_slower_library_is_found_without_random_numbers():
    """A library that is called three times over loses; the measurement draws nothing."""
    multiply = cpu_linear.product

    def slowed(slow):
        def call(left, right, bias=None, *, library):
            for _ in range(5 if library == slow else 0):
                multiply(left, right, bias, library=library)
            return multiply(left, right, bias, library=library)

        return call

    state = torch.get_rng_state()
    for slow in ("torch", "onednn"):
        with mock.patch.object(cpu_matmul, "product", slowed(slow)):
            ratios = cpu_matmul.torch_over_onednn(256, 256)
        assert all((ratio > 1) == (slow == "torch") for ratio in ratios[:2]), (slow, ratios)
        assert ratios[2] > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_products_are_measured_on_one_thread(monkeypatch):
    """Threads that wait for each other count as processor time."""
    before, seen = torch.get_num_threads(), []
    multiply = cpu_linear.product
    monkeypatch.setattr(cpu_matmul, "product", lambda *args, **named: (seen.append(torch.get_num_threads()),
                                                                       multiply(*args, **named))[1])
    torch.set_num_threads(2)
    try:
        cpu_matmul.torch_over_onednn(64, 64)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("milliseconds, times", [
    ({"torch": [1.2, 1.1], "onednn": [1.0, 0.8]}, 2), ({"torch": [2.0, 1.0], "onednn": [1.0, 1.0]}, 1),
    ({"torch": [16.0], "onednn": [15.0]}, 1),
    ({"torch": [1.1, 1.05, 1.0, 1.0, 1.2], "onednn": [1.0, 1.0, 1.2, 0.9, 1.1]}, 5)])
def test_measurements_end_where_the_difference_is_clear(monkeypatch, milliseconds, times):
    """Those of each measurement after the first call. The shortest counts."""
    clock, called = [0.0], {"torch": 0, "onednn": 0}

    def call(library):
        if called[library]:
            clock[0] += milliseconds[library][called[library] - 1] / 1000
        called[library] += 1

    monkeypatch.setattr(cpu_matmul.time, "thread_time", lambda: clock[0])
    shortest = cpu_matmul._shortest({library: functools.partial(call, library) for library in called})
    assert called == {"torch": 1 + times, "onednn": 1 + times}
    assert shortest == pytest.approx({library: min(every[:times]) / 1000 for library, every in milliseconds.items()})


@contextlib.contextmanager
def measuring(of_rank, lines=None):
    """A measurement that gives each rank another result."""
    from megatron_embed.models import auto_matmul as module

    handler = logging.Handler()
    handler.emit = lambda record: (lines if lines is not None else []).append(record.getMessage())
    module.logger.addHandler(handler)
    level, module.logger.level = module.logger.level, logging.INFO
    result = of_rank[dist.get_rank()]
    try:
        with mock.patch.object(module, "fastest_libraries", return_value=result and (result, (0.5, 1.0, 0.75))):
            yield module
    finally:
        module.logger.removeHandler(handler)
        module.logger.level = level


def settled(of_rank, dtype, asked):
    """(setting, libraries in use, lines of the log) on a rank."""
    import dataclasses

    lines, config = [], run_config("m", dtype=dtype)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, cpu_matmul=asked))
    shape = mock.Mock(ffn_hidden_size=1024, hidden_size=256, gated=True)
    with measuring(of_rank, lines) as module, mock.patch.object(module, "has_native_bf16", return_value=True):
        resolved = module.resolve_cpu_matmul(config, shape).model.cpu_matmul
    used = cpu_linear._libraries
    cpu_linear.use_libraries(cpu_linear.DEFAULT_LIBRARIES)
    return resolved, used, lines


def test_all_ranks_use_what_rank_0_measured():
    default = cpu_linear.DEFAULT_LIBRARIES
    first, second = run_on_ranks(settled, 2, [MIXED, OTHER], "float32", None)
    assert first[:2] == second[:2] == (MIXED, MIXED)
    assert len(first[2]) == 1 and not second[2]
    assert "model.cpu_matmul = [torch, onednn, torch]" in first[2][0] and "0.50, 1.00, 0.75" in first[2][0]
    assert run_on_ranks(settled, 2, [None, OTHER], "float32", None) == [(None, default, [])] * 2
    assert run_on_ranks(settled, 2, [MIXED, OTHER], "float32", OTHER) == [(OTHER, OTHER, [])] * 2
    assert run_on_ranks(settled, 2, [MIXED, OTHER], "bfloat16", None) == [(None, default, [])] * 2


def train_measuring(result, values):
    with measuring([result]):
        train(values)
    used = cpu_linear._libraries
    cpu_linear.use_libraries(cpu_linear.DEFAULT_LIBRARIES)
    return used


def test_a_resumed_run_keeps_its_checkpoints_libraries(model, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    settings = {"train_steps": 2, "lr_decay_style": "constant", "checkpoint": {"save_every_steps": 1, "keep": 0}}
    assert run_on_ranks(train_measuring, 1, MIXED, configuration(model, straight, **settings)) == [MIXED]
    saved = yaml.safe_load((straight / "step_000001" / "config.yaml").read_text())
    assert saved["model"]["cpu_matmul"] == list(MIXED)
    go_back(straight, resumed, 1)
    values = configuration(model, resumed, **settings)
    assert run_on_ranks(train_measuring, 1, OTHER, values) == [MIXED]
    assert curve(resumed) == curve(straight)
    other = go_back(straight, tmp_path / "other", 1)
    values = configuration(model, other, **settings)
    values["model"]["cpu_matmul"] = list(OTHER)
    assert run_on_ranks(train_measuring, 1, MIXED, values) == [OTHER]
    assert json.loads((other / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize("value, rule", [(["onednn"], "must be null or three libraries"),
                                         (["mkl", "onednn", "torch"], "expected")])
def test_other_libraries_are_refused(value, rule):
    from megatron_embed.config.load import config_of_overrides

    with pytest.raises(ConfigError, match=rule):
        config_of_overrides(["model.path=m", f"model.cpu_matmul={json.dumps(value)}"])
