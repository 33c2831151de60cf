"""What `doctor --config` and `planning.disk` say a run writes, beside what it wrote."""

import dataclasses
import json
import shutil
from collections import namedtuple

import pytest
import yaml

from megatron_embed.__main__ import main
from megatron_embed.config.load import load_config
from megatron_embed.config.optimizer import OptimizerConfig
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.disk import checkpoint_bytes, checkpoints_at_once, export_bytes
from megatron_embed.planning.memory import grid_of, stage_memory
from megatron_embed.planning.shapes import shape_of
from tests.helpers.launcher_variables import _one_rank  # noqa: F401  without a launcher's variables
from tests.helpers.planned_models import MOE, QWEN3
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.toys import layout, run_config, save_model

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", tokenizer=True, hidden_size=128,
                      intermediate_size=512)


def size(folder, *endings):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.name.endswith(endings))


@pytest.mark.parametrize("overrides", [
    ["model.dtype=bfloat16"], [], pytest.param(["lora.rank=4"], marks=pytest.mark.slow),
    pytest.param(["optimizer.distributed=false"], marks=pytest.mark.slow),
    pytest.param(["optimizer.distributed=false", "optimizer.name=muon"], marks=pytest.mark.slow),
    pytest.param(["parallel.tensor_model_parallel_size=2"], marks=pytest.mark.slow)], ids=str)
def test_files_are_as_large_as_is_said(model, tmp_path, overrides):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(model, tmp_path / "run")))
    given = [f"checkpoint.export_at_end={tmp_path / 'export'}", "training.train_steps=1", *overrides]
    ranks = 2 if "parallel" in str(overrides) else 1
    assert run_on_ranks(command, ranks, ["train", str(path), *given])[0][0] == 0
    config, shape = load_config(str(path), given), shape_of(model)
    expected = checkpoint_bytes(config, shape, adapted_linears(config, shape))
    with DcpReader(tmp_path / "run" / "step_000001" / "model") as reader:
        headers = 2000 * len(list(reader.keys()))  # zip's, which are 2 % of so small a model's adapters
    assert 0 <= size(tmp_path / "run" / "step_000001", ".distcp") - expected < max(headers, 0.01 * expected)
    assert size(tmp_path / "export", ".safetensors") == pytest.approx(export_bytes(config, shape), rel=0.01)


@pytest.mark.parametrize("steps, every, keep, evaluated, count", [
    (10000, 500, 3, False, 4), (10000, 500, 3, True, 5), (1000, 500, 3, True, 2), (100, 500, 3, False, 1),
    (10000, 500, 0, True, 20), (None, 500, 3, False, 4), (None, 500, 0, False, 2)])
def test_number_of_checkpoints(model, tmp_path, steps, every, keep, evaluated, count):
    values = settings(model, tmp_path / "run")
    values["checkpoint"] |= {"keep": keep, "save_every_steps": every}
    values["training"] |= {"train_steps": steps, "epochs": None if steps else 2}
    values["evaluation"] = {"retrieval": ["x"] if evaluated else []}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert checkpoints_at_once(load_config(str(tmp_path / "run.yaml"), [])) == count


@pytest.mark.parametrize("epochs, every, keep, count", [(3, 1.0, 0, 3), (3, 0.5, 3, 4), (1, 0.5, 3, 2),
                                                        (None, 1.0, 0, 2)])
def test_number_of_checkpoints_by_epochs(model, tmp_path, epochs, every, keep, count):
    values = settings(model, tmp_path / "run")
    values["checkpoint"] |= {"keep": keep, "save_every_epochs": every}
    values["training"] |= {"train_steps": None if epochs else 100, "epochs": epochs}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert checkpoints_at_once(load_config(str(tmp_path / "run.yaml"), [])) == count


@pytest.fixture
def asked(tmp_path, monkeypatch, capsys):
    """`doctor --config` of an 8B model on a disk with so much free space: (exit code, stdout)."""

    def ask(free_gib, *overrides, **checkpoint):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**15, 0, int(free_gib * GIB)))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        (tmp_path / "rows.jsonl").write_text('{"query": "a", "positive": "b"}\n')
        values = {"model": {"path": "Qwen/Qwen3-Embedding-8B", "dtype": "bfloat16"},
                  "data": {"train": [str(tmp_path / "rows.jsonl")]}, "training": {"train_steps": 10000},
                  "checkpoint": {"directory": str(tmp_path / "run"), **checkpoint}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        code = main(["doctor", "--config", str(tmp_path / "run.yaml"), "--ranks", "8", *overrides])
        return code, capsys.readouterr().out

    return ask


def test_disk_without_room_for_the_run_is_told(asked, tmp_path):
    """7.57 billion parameters of 14 bytes, four times, and 2 more bytes each of the export."""
    export = {"export_at_end": str(tmp_path / "export")}
    code, out = asked(400, **export)
    assert code == 1
    assert (f"{tmp_path / 'run'}: the run writes 408.8 GiB (4 checkpoints of 98.7 GiB and an export of 14.1 GiB) and "
            "400.0 GiB are free; free some space, choose another disk, or lower checkpoint.keep") in out
    assert asked(409, **export)[0] == 0
    assert asked(400)[0] == 0
    assert asked(300, "checkpoint.keep=1", **export)[0] == 0
    code, out = asked(30, "lora.rank=16", **export)
    assert code == 1 and "4 checkpoints of " in out
    assert asked(80, "lora.rank=16", **export)[0] == 0
    code, out = asked(5, "model.path=some/model", "--min-free-gib", "6")
    assert (code, "less than 6 GiB are free" in out) == (1, True)


def test_checkpoints_that_are_there_need_no_room_again(asked, tmp_path):
    for step in (500, 1000, 1500):
        (tmp_path / "run" / f"step_{step:06d}").mkdir(parents=True)
        (tmp_path / "run" / f"step_{step:06d}" / "megatron_embed.json").write_text("{}")
    assert asked(100)[0] == 0
    code, out = asked(90)
    assert code == 1 and "the run writes 98.7 GiB (4 checkpoints of 98.7 GiB, 3 of them there)" in out
    assert asked(90, "training.train_steps=1500")[0] == 0  # complete: nothing is written


def test_place_of_the_export_must_be_writable_and_free(asked, tmp_path):
    (tmp_path / "file").write_text("")
    code, out = asked(900, export_at_end=str(tmp_path / "file" / "export"))
    assert code == 1 and f"checkpoint.export_at_end = '{tmp_path / 'file' / 'export'}': cannot be written" in out
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model").write_text("")
    code, out = asked(900, export_at_end=str(tmp_path / "full"))
    assert code == 1 and "exists already, and the run has no checkpoint yet" in out


def test_layout_changes_no_size(model, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(model, tmp_path / "run")))
    one, shape = load_config(str(tmp_path / "run.yaml"), []), shape_of(model)
    split = dataclasses.replace(one, parallel=dataclasses.replace(one.parallel, tensor_model_parallel_size=2))
    assert checkpoint_bytes(one, shape) == checkpoint_bytes(split, shape) > 0


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("values, sizes", [(QWEN3, {}), (QWEN3, {"pipeline_model_parallel_size": 2}),
                                           (MOE, {"expert_model_parallel_size": 2})], ids=["dp", "pp", "ep"])
def test_what_ranks_write_makes_up_a_checkpoint(tmp_path, values, sizes, name):
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = dataclasses.replace(run_config(str(tmp_path), dtype="bfloat16", parallel={**layout(), **sizes}),
                                 optimizer=OptimizerConfig(name=name, distributed=name != "muon"))
    shape, grid, stages = shape_of(config.model.path), grid_of(config, 4), config.parallel.pipeline_model_parallel_size
    written = sum(4 // stages * stage_memory(config, shape, grid, stage).save for stage in range(stages))
    assert written == pytest.approx(checkpoint_bytes(config, shape), rel=1e-3)
