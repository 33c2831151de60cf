"""Which library multiplies float32 matrices: measured on rank 0, used by all ranks, kept by a resumed run."""

import argparse
import contextlib
import functools
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from megatron_embed.errors import ConfigError
from megatron_embed.platform import cpu_linear, cpu_matmul
from tests.helpers.foreign_rerankers import encoder
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
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
    ({"torch": [2.0, 2.1], "onednn": [1.0, 1.0]}, 2), ({"torch": [1.0, 1.4, 1.4], "onednn": [1.0, 1.0, 1.0]}, 3),
    ({"torch": [9.0, 1.0, 1.0, 1.0, 1.0], "onednn": [1.0, 1.0, 1.0, 1.0, 1.0]}, 5),
    ({"torch": [2.0, 1.0, 1.0, 1.0], "onednn": [1.0, 2.0, 2.0, 2.0]}, 3),
    ({"torch": [16.0, 16.0], "onednn": [15.0, 15.0]}, 2), ({"torch": [90.0, 15.0], "onednn": [15.0, 16.0]}, 2),
    ({"torch": [1.1, 1.05, 1.0, 1.0, 1.2], "onednn": [1.0, 1.0, 1.2, 0.9, 1.1]}, 5)])
def test_measurements_end_where_two_agree(monkeypatch, milliseconds, times):
    """Those of each measurement after the first call. The shortest counts, so one noisy measurement decides nothing."""
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
        with mock.patch.object(module, "fastest_libraries",
                               side_effect=lambda shapes, forward_only=False: result and (
                                   result, (0.5,) if forward_only else (0.5, 1.0, 0.75))):
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


def test_tests_measure_nothing():
    """Neither in their own process nor on ranks."""
    assert run_on_ranks(measured_on_a_rank, 1) == [None] == [measured_on_a_rank()]


def measured_on_a_rank():
    from megatron_embed.models import auto_matmul

    return auto_matmul.fastest_libraries([(1536, 384)])


@pytest.mark.skipif(not cpu_linear.is_available(), reason="no oneDNN on this processor")
def test_the_forward_product_is_measured_once(monkeypatch):
    calls, multiply = [], cpu_linear.product
    monkeypatch.setattr(cpu_matmul, "product", lambda left, right, **named: (
        calls.append((left.shape[0], *right.shape)), multiply(left, right, **named))[1])
    cpu_matmul._forward_ratio.cache_clear()
    libraries, (ratio,) = cpu_matmul.fastest_libraries([(512, 256), (256, 512)], forward_only=True)
    assert set(calls) == {(cpu_matmul.FORWARD_ROWS, 512, 256)} and len(calls) >= 6
    assert libraries == ("onednn" if ratio > 1.05 else "torch", "onednn", "onednn")
    calls.clear()
    assert cpu_matmul.fastest_libraries([(512, 256)], forward_only=True) == (libraries, (ratio,)) and not calls
    cpu_matmul._forward_ratio.cache_clear()


def test_a_context_has_its_own_libraries():
    """In its thread alone; None: the process's."""
    with cpu_linear.libraries_used(MIXED):
        assert cpu_linear.libraries_in_use() == MIXED
        with ThreadPoolExecutor() as other:
            assert other.submit(cpu_linear.libraries_in_use).result() == cpu_linear.DEFAULT_LIBRARIES
        with cpu_linear.libraries_used(None):
            assert cpu_linear.libraries_in_use() == cpu_linear.DEFAULT_LIBRARIES
    assert cpu_linear.libraries_in_use() == cpu_linear.DEFAULT_LIBRARIES


def encoded(of_rank, arguments):
    """(exit code, libraries of every forward product, the process's afterwards) of a command on a rank."""
    used, multiply = set(), cpu_linear.product

    def recorded(left, right, bias=None, *, library):
        used.add(library)
        return multiply(left, right, bias, library=library)

    with measuring(of_rank), mock.patch.object(cpu_linear, "product", recorded):
        code, *_ = command(arguments)
    return code, used, cpu_linear._libraries


@pytest.mark.parametrize("measured, options, expected", [
    (("torch", "onednn", "onednn"), [], "torch"), (("onednn", "onednn", "onednn"), [], "onednn"), (None, [], "onednn"),
    (None, ['model.cpu_matmul=["torch","torch","torch"]'], "torch")])
def test_a_models_forward_products_are_by_the_fastest_library(model, tmp_path, measured, options, expected):
    """What rank 0 measured, on all ranks; the process keeps its own."""
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    arguments = ["encode", "--model", model, "--input", str(tmp_path / "texts.jsonl"), "--output",
                 str(tmp_path / "vectors.npy"), *options]
    assert run_on_ranks(encoded, 2, [measured, OTHER[::-1]], arguments) == [
        (0, {expected}, cpu_linear.DEFAULT_LIBRARIES)] * 2


def test_a_reranker_multiplies_by_the_fastest_library(tmp_path):
    assert run_on_ranks(scored, 1, str(encoder(tmp_path / "model"))) == [{"torch"}]


def scored(directory):
    import megatron_embed

    used, multiply = set(), cpu_linear.product

    def recorded(left, right, bias=None, *, library):
        used.add(library)
        return multiply(left, right, bias, library=library)

    with measuring([MIXED]), mock.patch.object(cpu_linear, "product", recorded):
        megatron_embed.load(directory).rerank("query", ["one", "two"])
    return used


def train_measuring(result, values):
    with measuring([result]):
        train(values)
    used = cpu_linear._libraries
    cpu_linear.use_libraries(cpu_linear.DEFAULT_LIBRARIES)
    return used


def libraries_of_models(directory):
    """Libraries of a model that a command opens, and of one inside a training run or of an export."""
    from megatron_embed.loading.model_directory import open_encoder

    args = argparse.Namespace(model=directory, pooling=None, max_length=None, dtype=None, no_normalize=False,
                              overrides=[])
    with measuring([OTHER]):
        return tuple(open_encoder(args, prompts=True, own_libraries=own)[0].libraries for own in (True, False))


def test_a_resumed_run_keeps_its_checkpoints_libraries(model, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    settings = {"train_steps": 2, "lr_decay_style": "constant", "checkpoint": {"save_every_steps": 1, "keep": 0}}
    assert run_on_ranks(train_measuring, 1, MIXED, configuration(model, straight, **settings)) == [MIXED]
    saved = yaml.safe_load((straight / "step_000001" / "config.yaml").read_text())
    assert saved["model"]["cpu_matmul"] == list(MIXED)
    assert run_on_ranks(libraries_of_models, 1, str(straight)) == [(MIXED, None)]
    convert = ["convert", "megatron-to-hf", str(straight), str(tmp_path / "hf")]  # compares, by the process's libraries
    assert run_on_ranks(encoded, 1, [MIXED], convert) == [(0, {"onednn"}, cpu_linear.DEFAULT_LIBRARIES)]
    changed = go_back(straight, tmp_path / "changed", 2)
    file = changed / "step_000002" / "config.yaml"
    for saved, deterministic, expected in ((None, False, OTHER), (None, True, cpu_linear.DEFAULT_LIBRARIES),
                                           (list(MIXED), True, MIXED)):
        values = yaml.safe_load(file.read_text())
        values["model"]["cpu_matmul"], values["training"]["deterministic"] = saved, deterministic
        file.write_text(yaml.safe_dump(values))
        assert run_on_ranks(libraries_of_models, 1, str(changed)) == [(expected, None)]
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
