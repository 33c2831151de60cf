"""`model.dtype: auto`: a new run takes what the processor has, one that goes on keeps its checkpoint's dtype."""

from unittest import mock

import pytest

from megatron_embed.config.load import read_resolved
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, train
from tests.helpers.toys import run_config, save_model


def train_elsewhere(values):
    """A processor without bfloat16 instructions."""
    with mock.patch("megatron_embed.models.auto_dtype.has_native_bf16", return_value=False):
        return train(values)


def dtype_of(directory, step):
    return read_resolved(directory / f"step_{step:06d}" / "config.yaml")["model"]["dtype"]


@pytest.mark.parametrize("now, before, is_fixed", [
    (True, True, False), (True, False, True), (False, True, True), (False, False, True)])
def test_the_dtype_may_change_only_where_main_parameters_are_always_saved(now, before, is_fixed):
    from megatron_embed.run.resume_check import _fixed_keys

    keys = _fixed_keys(run_config("model", distributed=now), {"optimizer.distributed": before})
    assert ("model.dtype" in keys) == is_fixed
    assert "optimizer.distributed" not in keys


def test_a_run_that_goes_on_keeps_its_dtype(tmp_path):
    model = save_model(tmp_path / "qwen3", "qwen3", tokenizer=True)
    values = configuration(model, tmp_path / "run", train_steps=1)
    values["model"]["dtype"] = "bfloat16"
    run_on_ranks(train, 1, values)
    values["model"]["dtype"], values["training"]["train_steps"] = "auto", 2
    run_on_ranks(train_elsewhere, 1, values)
    assert [dtype_of(tmp_path / "run", step) for step in (1, 2)] == ["bfloat16", "bfloat16"]
    values["checkpoint"]["directory"], values["training"]["train_steps"] = str(tmp_path / "new"), 1
    run_on_ranks(train_elsewhere, 1, values)
    assert dtype_of(tmp_path / "new", 1) == "float32"
