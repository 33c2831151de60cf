"""Saves start no process, and those behind the training steps hold what those in front of them hold."""

import time
from pathlib import Path

import pytest

from megatron_embed.checkpoint.files import step_directories
from megatron_embed.errors import PreemptedError
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import DROPOUT, configuration, curve, train
from tests.helpers.toys import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def children():
    """Process numbers of this process's children."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def processes_around_a_run(values):
    before = children()
    train(values)
    return children() - before


def test_saving_starts_no_process(model, tmp_path):
    values = configuration(model, tmp_path / "run", train_steps=1)
    assert run_on_ranks(processes_around_a_run, 2, values) == [set(), set()]
    assert list(step_directories(tmp_path / "run")) == [1]


def train_with_slow_disk(values):
    """Steps done when each of this rank's files was written. None is written in the step that it belongs to."""
    from megatron_embed.platform import threaded_checkpoint_writer as writer
    from megatron_embed.training import loop

    done, seen = [0], []
    write, step = writer._write_bucket, loop.train_step

    def slowly(*arguments):
        deadline = time.monotonic() + 60
        while done[0] in (2, 4) and time.monotonic() < deadline:  # saves that wait for no step would wait here
            time.sleep(0.01)
        seen.append(done[0])
        return write(*arguments)

    def counted(*arguments):
        metrics = step(*arguments)
        done[0] += 1
        return metrics

    writer._write_bucket, loop.train_step = slowly, counted
    try:
        train(values)
    finally:
        writer._write_bucket, loop.train_step = write, step
    return seen


def tensor_files(checkpoint):
    return {file.name: file.read_bytes() for file in (checkpoint / "model").glob("*.distcp")}


@pytest.mark.parametrize("distributed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_background_saves_hold_what_others_hold(model, tmp_path, distributed):
    """Slices of parameters and moments, or these themselves, that training changes while they are written."""
    front, behind = tmp_path / "front", tmp_path / "behind"
    settings = {"train_steps": 5, "distributed": distributed, **DROPOUT}
    run_on_ranks(train, 2, configuration(model, front, checkpoint={"save_every_steps": 2, "keep": 0}, **settings))
    seen = run_on_ranks(train_with_slow_disk, 2, configuration(
        model, behind, checkpoint={"save_every_steps": 2, "keep": 0, "async_save": True}, **settings))
    assert set(seen[0]) >= {5} and not {2, 4} & set(seen[0])
    assert set(seen[1]) <= set(seen[0])
    assert curve(behind) == curve(front)
    ones, others = step_directories(front), step_directories(behind)
    assert list(ones) == list(others) == [2, 4, 5]
    for step, checkpoint in ones.items():
        files = tensor_files(checkpoint)
        assert files
        assert files == tensor_files(others[step])
    assert tensor_files(others[2]) != tensor_files(others[4]) != tensor_files(others[5])
    assert (behind / "latest").read_text() == "step_000005\n"


class Told:
    """A saver that keeps what it was asked for."""

    def __init__(self):
        self.calls = []

    def save(self, step, *, evaluation_owed=False):
        self.calls.append(step)

    def finish(self):
        self.calls.append("finish")


def calls_of_an_early_end(saved):
    from megatron_embed.config.schema import LoggingConfig
    from megatron_embed.training.audit_log import AuditLog
    from megatron_embed.training.loop import Hooks, leave_early
    from megatron_embed.training.metrics import MetricsWriter
    from megatron_embed.training.progress import Progress
    from megatron_embed.training.stopping import StopRequest

    told = Told()
    writer = MetricsWriter(None, settings=LoggingConfig(tensorboard=False), active=False,
                           progress=Progress(train_steps=9, first_step=0, steps_per_epoch=None))
    hooks = Hooks(load_batch=None, evaluate=None, agree=None, is_best=None, is_over=lambda: False, saver=told,
                  save_due=lambda step: False, stop=StopRequest(None), writer=writer, health=None,
                  audit_log=AuditLog(None, None, None, first_step=0, every=0, share=0, max_mib=0))
    with pytest.raises(PreemptedError, match="stopped after 3 steps"):
        leave_early(hooks, 3, saved)
    return told.calls


def test_run_that_stops_early_waits_for_its_checkpoint():
    assert run_on_ranks(calls_of_an_early_end, 1, 3) == [["finish"]]
    assert run_on_ranks(calls_of_an_early_end, 1, 2) == [[3, "finish"]]
