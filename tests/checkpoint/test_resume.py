"""A resumed run continues the curve: bit for bit at the same layout, to rounding at another; what a kill leaves."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_embed.checkpoint.files import latest_checkpoint, remove_old, step_directories
from megatron_embed.errors import CheckpointError
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import (
    DROPOUT,
    configuration,
    curve,
    export,
    go_back,
    model,  # noqa: F401  fixtures
    train,
)
from tests.helpers.toys import layout

LEARNED = {"learnable_temperature": True, "temperature_learning_rate": 0.05}


def temperatures(directory):
    """Metrics of each step that a run which trains its temperature must repeat."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["temperature"] for line in lines]


@pytest.mark.parametrize("ranks, sizes, distributed", [
    pytest.param(1, layout(), True, marks=pytest.mark.slow), (2, layout(), True), pytest.param(
        2, layout(), False, marks=pytest.mark.slow),
    (2, layout(2), True), (2, layout(pp=2), True), pytest.param(2, layout(cp=2), False, marks=pytest.mark.slow)],
    ids=["one", "dp2", "dp2_plain", "tp2", "pp2", "cp2_plain"])
def test_resumed_run_repeats_the_curve_bit_for_bit(model, tmp_path, ranks, sizes, distributed):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    learned = sizes == layout(pp=2) or (ranks == 2 and not distributed)
    settings = {"parallel": sizes, "distributed": distributed, "checkpoint": {"save_every_steps": 3, "keep": 0},
                "train_steps": 6, "warmup_steps": 2, "objective": LEARNED if learned else {}, **DROPOUT}
    run_on_ranks(train, ranks, configuration(model, straight, **settings))
    expected = curve(straight)
    assert len(expected) == 6
    assert len(set(expected)) == 6
    go_back(straight, resumed, 3)
    run_on_ranks(train, ranks, configuration(model, resumed, **settings))
    assert curve(resumed) == expected
    if learned:
        assert temperatures(resumed) == temperatures(straight)
        assert len(set(temperatures(straight))) == 5  # the second step still has the first value: warm-up begins at 0
    one, other = export(straight, tmp_path / "one"), export(resumed, tmp_path / "other")
    start = load_file(f"{model}/model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert not torch.equal(tensor, start[name]), name


def test_run_goes_on_at_other_layouts(model, tmp_path):
    straight, moving = tmp_path / "straight", tmp_path / "moving"
    settings = {"lr_decay_style": "constant", "checkpoint": {"save_every_steps": 2, "keep": 0}}
    run_on_ranks(train, 1, configuration(model, straight, train_steps=8, **settings))
    stages = [(2, layout(2), True), (2, layout(pp=2), False), (1, layout(), True), (2, layout(), False)]
    for stage, (ranks, sizes, distributed) in enumerate(stages, 1):
        values = configuration(model, moving, parallel=sizes, distributed=distributed, train_steps=2 * stage,
                               **settings)
        run_on_ranks(train, ranks, values)
    resumed, expected = torch.tensor(curve(moving)), torch.tensor(curve(straight))
    assert resumed.shape == (8, 4)
    assert (expected[0, 0] - expected[-1, 0]).abs() > 0.01
    torch.testing.assert_close(resumed[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(resumed[:, 1], expected[:, 1], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run of 4 steps saved after each of them, all kept."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    settings = {"train_steps": 4, "checkpoint": {"save_every_steps": 1, "keep": 0}}
    run_on_ranks(train, 1, configuration(model, directory, **settings))
    return directory, settings


def test_latest_is_the_pointers_else_the_newest_complete(finished, tmp_path):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    assert list(step_directories(directory)) == [1, 2, 3, 4]
    assert (directory / "latest").read_text() == "step_000004\n"
    (directory / "latest").write_text("step_000002\n")
    assert latest_checkpoint(directory).name == "step_000002"
    (directory / "latest").unlink()
    assert latest_checkpoint(directory).name == "step_000004"
    (directory / "step_000004" / "megatron_embed.json").unlink()
    assert latest_checkpoint(directory).name == "step_000003"
    (directory / "latest").write_text("step_000004\n")
    assert latest_checkpoint(directory).name == "step_000003"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_what_a_killed_save_left_is_ignored_and_removed(model, finished, tmp_path):
    directory = go_back(finished[0], tmp_path / "run", 3)
    half = directory / ".step_000004.tmp"
    shutil.copytree(directory / "step_000003", half)
    (half / "megatron_embed.json").unlink()
    (directory / "step_000001").rename(directory / ".step_000001.old.tmp")
    foreign = directory / "step_1000"  # another trainer's: not ours to delete
    foreign.mkdir()
    (foreign / "theirs.ckpt").write_text("x")
    run_on_ranks(train, 1, configuration(model, directory, **finished[1]))
    assert curve(directory) == curve(finished[0])
    assert sorted(entry.name for entry in directory.iterdir() if "step" in entry.name) == [
        "step_000002", "step_000003", "step_000004", "step_1000"]
    assert (foreign / "theirs.ckpt").exists()
    assert latest_checkpoint(directory).name == "step_000004"


def test_a_kill_before_latest_moves_is_survived(model, finished, tmp_path):
    directory = go_back(finished[0], tmp_path / "run", 3)
    (directory / "latest").write_text("step_000002\n")
    run_on_ranks(train, 1, configuration(model, directory, **finished[1]))
    assert curve(directory) == curve(finished[0])
    assert latest_checkpoint(directory).name == "step_000004"
    assert not [entry for entry in directory.iterdir() if entry.name.endswith(".tmp")]


def test_going_back_keeps_what_is_saved_then(model, finished, tmp_path):
    """`latest` written by hand: the run resumes there, and what it leaves behind is put aside, whole."""
    directory = shutil.copytree(finished[0], tmp_path / "run")
    (directory / "latest").write_text("step_000001\n")
    (directory / "best").symlink_to("step_000003")
    (directory / "step_000004.abandoned").mkdir()  # of another time
    settings = finished[1] | {"train_steps": 3, "checkpoint": {"save_every_steps": 1, "keep": 2}}
    run_on_ranks(train, 1, configuration(model, directory, **settings))
    assert list(step_directories(directory)) == [2, 3]
    assert latest_checkpoint(directory).name == "step_000003"
    aside = [directory / name for name in ("step_000002.abandoned", "step_000003.abandoned", "step_000004.abandoned-2")]
    assert all((folder / "megatron_embed.json").is_file() for folder in aside)
    assert not (directory / "best").is_symlink()


def test_what_latest_names_is_not_removed(finished, tmp_path):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    (directory / "latest").write_text("step_000002\n")
    remove_old(directory, 1)
    assert list(step_directories(directory)) == [2, 4]


def test_log_line_cut_short_by_a_kill_is_written_again(model, finished, tmp_path):
    directory = go_back(finished[0], tmp_path / "run", 3)
    log = directory / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    run_on_ranks(train, 1, configuration(model, directory, **finished[1]))
    assert curve(directory) == curve(finished[0])


def test_only_the_newest_checkpoints_are_kept(model, tmp_path):
    directory = tmp_path / "run"
    run_on_ranks(train, 2, configuration(model, directory, train_steps=4,
                                         checkpoint={"save_every_steps": 1, "keep": 2}))
    assert list(step_directories(directory)) == [3, 4]
    assert sorted(entry.name for entry in directory.iterdir() if "step" in entry.name) == ["step_000003", "step_000004"]


def test_finished_run_is_not_trained_again(model, finished, tmp_path):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    before = curve(directory)
    (result,) = run_on_ranks(train, 1, configuration(model, directory, **finished[1]))
    assert result == {}
    assert curve(directory) == before


def saved_in_what_order(values):
    """Names below the checkpoint directory in the order in which they appear by rename."""
    directory, order = Path(values["checkpoint"]["directory"]), []
    original = os.rename
    rename = Path.rename

    def record(path, target):
        order.append(Path(target).name)
        if Path(target).name == "latest":
            assert (directory / path.read_text().strip() / "megatron_embed.json").is_file()
        return rename(path, target)

    Path.rename = record
    try:
        train(values)
    finally:
        Path.rename = rename
        assert os.rename is original
    return order


def test_latest_moves_after_the_checkpoint_is_complete(model, tmp_path):
    values = configuration(model, tmp_path / "run", train_steps=2, checkpoint={"save_every_steps": 1})
    (order,) = run_on_ranks(saved_in_what_order, 1, values)
    assert [name for name in order if name == "latest" or name.startswith("step_")] == [
        "step_000001", "latest", "step_000002", "latest"]


def error_of(values):
    with pytest.raises(CheckpointError) as caught:
        train(values)
    return str(caught.value)


def test_a_file_that_one_rank_alone_cannot_read_is_told_of_on_all(model, tmp_path):
    directory = tmp_path / "run"
    settings = {"parallel": layout(pp=2), "train_steps": 2, "checkpoint": {"save_every_steps": 2}}
    run_on_ranks(train, 2, configuration(model, directory, **settings))
    written = directory / "step_000002" / "model"
    file = min(written.glob("__1_*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    told = run_on_ranks(error_of, 2, configuration(model, directory, **settings | {"train_steps": 4}))
    assert told[0] == told[1]
    assert told[0].startswith(f"{written}: cannot be loaded into this model (")
    assert f"model/{file.name} has {file.stat().st_size} bytes, not " in told[0]
    assert f"damaged: copy it again, or remove {written.parent}" in told[0]
    assert "dict_keys" not in told[0]
