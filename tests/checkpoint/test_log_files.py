"""Logs of lines: cut where a run resumes, kept where a new one starts, in several files if they are long."""

import contextlib
import itertools
import json
import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_embed.checkpoint import log_files
from megatron_embed.checkpoint.log_files import (
    LogWriter,
    cut_after,
    lines_of_log,
    log_exists,
    move_aside,
    objects_of_log,
    older_files,
)
from megatron_embed.config.schema import LoggingConfig
from megatron_embed.errors import ConfigError
from tests.helpers.audit_records import start_record, step_record
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import configuration, go_back, train
from tests.helpers.toys import save_model

LINES_PER_FILE = 4
SMALL = LINES_PER_FILE * len('{"step": 10}\n') / 2**20
"""MiB of so many lines."""


def lines_of(steps):
    return "".join(json.dumps({"step": step, "pad": "x" * (step % 7)}) + "\n" for step in steps)


def steps_in(path):
    return [json.loads(line)["step"] for _, _, line in lines_of_log(path)]


def write(path, first, last):
    """Append the steps after `first`, as a run that starts or resumes there."""
    with contextlib.closing(LogWriter(path, first_step=first, max_mib=SMALL)) as writer:
        for step in range(first + 1, last + 1):
            writer.append({"step": step})


@pytest.mark.parametrize("block", [5, 64, 1 << 16])
@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo', "no JSON\n", "[1]\n"])
def test_lines_after_a_step_are_cut(tmp_path, monkeypatch, block, tail):
    monkeypatch.setattr(log_files, "_BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    for kept in (0, 2, 4, 9):
        path.write_text(lines_of([0, 1, 2, 2, 3, 4, 4, 5, 6]) + tail)
        cut_after(path, kept)
        assert path.read_text() == lines_of([step for step in (0, 1, 2, 2, 3, 4, 4, 5, 6) if step <= kept])


def test_long_log_is_several_files_and_resumes_at_every_step(tmp_path):
    for first in range(1, 31):
        path = tmp_path / str(first) / "metrics.jsonl"
        write(path, 0, 30)
        assert len(older_files(path)) == 7 and steps_in(path) == list(range(1, 31))
        assert all(file.stat().st_size <= SMALL * 2**20 for file in (path, *older_files(path)))
        write(path, first, first + 6)
        assert steps_in(path) == list(range(1, first + 7))


def test_earlier_logs_are_kept_with_all_their_files(tmp_path):
    path = tmp_path / "audit.jsonl"
    for last in (30, 3, 20):
        write(path, 0, last)
        assert steps_in(path) == list(range(1, last + 1))
    move_aside(path)
    assert not log_exists(path)
    assert [len(steps_in(tmp_path / f"audit.{number}.jsonl")) for number in (1, 2, 3)] == [30, 3, 20]


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(n): the n-th call from now on that changes a name or cuts a file does not happen; Killed instead."""
    calls = itertools.repeat(1)

    def counted(call):
        def either(*args, **kwargs):
            if next(calls) == 0:
                raise Killed
            return call(*args, **kwargs)
        return either

    def kill(call_number):
        nonlocal calls
        calls = itertools.chain(range(call_number, -1, -1), itertools.repeat(0))

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "open"), (os, "truncate")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    yield kill
    calls = itertools.repeat(1)


def test_killed_at_any_moment_a_log_can_be_read_and_continued(tmp_path, kill_at):
    """First while it is written, then while the run resumes; also before the new file that a rename made room for."""
    for first_kill, second_kill in itertools.product(range(0, 20, 5), range(14)):
        path = tmp_path / f"{first_kill}-{second_kill}" / "metrics.jsonl"
        kill_at(10**6)
        write(path, 0, 22)
        for first, call_number in ((14, first_kill), (5, second_kill)):
            kill_at(call_number)
            with contextlib.suppress(Killed):
                write(path, first, 25)
            kill_at(10**6)
            assert log_exists(path) and steps_in(path)[:first] == list(range(1, first + 1))
        write(path, 5, 9)
        assert steps_in(path) == list(range(1, 10))


@pytest.mark.parametrize("newest", [True, False])
def test_killed_while_an_earlier_log_is_kept(tmp_path, kill_at, newest):
    """Without the newest file: the earlier run was killed between the renaming and the next file."""
    for call_number in range(12):
        path = tmp_path / str(call_number) / "metrics.jsonl"
        kill_at(10**6)
        write(path, 0, 30 if newest else 28)
        if not newest:
            path.rename(path.parent / "metrics.000007.jsonl")
        kill_at(call_number)
        with contextlib.suppress(Killed):
            write(path, 0, 1)
        kill_at(10**6)
        if not (path.parent / "metrics.1.jsonl").exists():
            write(path, 0, 1)
        assert steps_in(path.parent / "metrics.1.jsonl") == list(range(1, 31 if newest else 29))
        assert not log_exists(path) or steps_in(path) in ([], [1])


def test_log_is_read_while_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = LogWriter(path, first_step=0, max_mib=SMALL)
    for step in range(1, 9):
        writer.append({"step": step})

    def listed(path):
        with mock.patch.object(log_files, "older_files", older_files):
            for step in range(9, 19):  # two new files, between the opening of the newest and the list of the others
                writer.append({"step": step})
        return older_files(path)

    with mock.patch.object(log_files, "older_files", listed):
        lines = lines_of_log(path)
        read = [json.loads(next(lines)[2])["step"]]
    for step in range(19, 31):
        writer.append({"step": step})
    writer.close()
    read += [json.loads(line)["step"] for _, _, line in lines]
    assert read == list(range(1, len(read) + 1)) and len(read) >= 8


def test_every_reader_reads_all_files(tmp_path):
    from megatron_embed.audit.run_log import read_run as read_audit
    from megatron_embed.config.load import config_of_values
    from megatron_embed.export.model_card import evaluation_after
    from megatron_embed.run.logged_run import read_run

    records = [start_record(), *map(step_record, range(1, 9))]
    rows = [{"step": step, "loss": 1.0, "learning_rate": 0.1} for step in range(1, 9)]
    rows.insert(1, {"step": 1, "eval/map": 0.5})
    for name, lines in (("audit.jsonl", records), ("metrics.jsonl", rows)):
        writer = LogWriter(tmp_path / name, first_step=0, max_mib=3 * len(json.dumps(lines[-1])) / 2**20)
        for line in lines:
            writer.append(line)
        writer.close()
        assert older_files(tmp_path / name)
        (tmp_path / name).unlink()  # killed between the renaming and the next file: the last line is in an older one
        assert log_exists(tmp_path / name)
    log, audited = read_run(str(tmp_path)), read_audit(str(tmp_path), 3)
    assert [row["step"] for row in log.steps] == list(range(1, len(log.steps) + 1)) and len(log.evaluations) == 1
    assert list(audited.steps) == [record["step"] for record in records[1:len(audited.steps) + 1]]
    assert len(audited.metrics) == len(log.steps) >= 6
    config = config_of_values({"model": {"path": "x"}, "logging": {"directory": str(tmp_path)}})
    assert evaluation_after(config, 1) == {"map": 0.5}


@pytest.mark.parametrize("kind, words", [("pipe", "not a regular file"), ("device", "not a regular file"),
                                         ("sparse", "line 2 has more than 1 MiB"), ("long", "longer than 0 MiB")])
def test_logs_that_do_not_end_are_refused(tmp_path, monkeypatch, kind, words):
    monkeypatch.setattr(log_files, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(lines_of(range(20)))
    if kind == "sparse":
        path.write_text(lines_of([1]))
        os.truncate(path, 6 << 30)
    for read in (lines_of_log, objects_of_log):
        with pytest.raises(OSError, match=words):
            list(read(path, 100))
    if kind == "pipe":
        with pytest.raises(OSError, match="No such device"):  # nobody reads it
            LogWriter(path, first_step=3, max_mib=0)
    elif kind == "sparse":
        with pytest.raises(OSError, match="a line of more than 1 MiB"):
            cut_after(path, 1)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": Infinity}', '{"step": NaN}', '{"step": [1]}',
                                  '{"a": "\xff"}'])
def test_lines_that_are_no_record_are_cut_and_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((lines_of([1, 2]) + line + "\n").encode("latin-1"))
    found = [record.get("step") for record in objects_of_log(path)]
    assert found[:2] == [1, 2] and len(found) == (3 if "step" in line else 2)
    cut_after(path, 2)
    assert path.read_text() == lines_of([1, 2])


def train_with_small_files(values):
    initialize = LogWriter.__init__

    def small(self, path, *, first_step, max_mib):
        assert max_mib == LoggingConfig().max_file_mib
        initialize(self, path, first_step=first_step, max_mib=0.002)

    with mock.patch.object(LogWriter, "__init__", small):
        train(values)


@pytest.mark.slow
def test_run_with_long_logs_resumes_and_can_be_read_and_audited(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = save_model(tmp_path / "qwen3", "qwen3", tokenizer=True)
    values = configuration(model, tmp_path / "run", checkpoint={"save_every_steps": 3, "keep": 0}, train_steps=9)
    values["logging"]["tensorboard"] = True
    run_on_ranks(train_with_small_files, 1, values)
    before = [line for _, _, line in lines_of_log(tmp_path / "run" / "metrics.jsonl")]
    resumed = go_back(tmp_path / "run", tmp_path / "resumed", 3)
    values["checkpoint"]["directory"] = str(resumed)
    run_on_ranks(train_with_small_files, 1, values)
    assert len(older_files(resumed / "metrics.jsonl")) >= 2 and len(older_files(resumed / "audit.jsonl")) >= 2
    rows, earlier = ([json.loads(line) for line in lines] for lines in (
        [line for _, _, line in lines_of_log(resumed / "metrics.jsonl")], before))
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == [row["loss"] for row in earlier] and rows[:3] == earlier[:3]
    assert len(list((resumed / "tensorboard").iterdir())) >= 4
    events = EventAccumulator(str(resumed / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 10))
    for arguments, words in ((["doctor", "--run", str(resumed)], "9 logged steps"),
                             (["audit", str(resumed), "--step", "5"], "equal")):
        ((code, out, err, _),) = run_on_ranks(command, 1, arguments)
        assert words in out, (code, out, err)


def test_size_of_a_file_is_checked():
    with pytest.raises(ConfigError, match=r"logging.max_file_mib = -1: must be >= 0; 0 is off"):
        LoggingConfig(max_file_mib=-1)


@pytest.mark.parametrize("name", ["log.jsonl", "log.000001.jsonl"])
@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_to_another_file_is_not_written_through(tmp_path, name, first_step, is_there):
    """A run's directory may come from somebody else, and a resumed run cuts off the lines of later steps."""
    (tmp_path / "run").mkdir()
    if is_there:
        (tmp_path / "kept").write_text("mine\n")
    (tmp_path / "run" / name).symlink_to(tmp_path / "kept")
    if first_step or not is_there:
        with pytest.raises(OSError, match="is a link to another file, which is not written through it"):
            LogWriter(tmp_path / "run" / "log.jsonl", first_step=first_step, max_mib=0)
    else:  # it is moved aside, as an earlier run's log
        LogWriter(tmp_path / "run" / "log.jsonl", first_step=0, max_mib=0).close()
    assert (tmp_path / "kept").exists() == is_there
    assert not is_there or (tmp_path / "kept").read_text() == "mine\n"


def test_a_link_to_a_device_is_written_through(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/null")
    log = LogWriter(tmp_path / "log.jsonl", first_step=0, max_mib=1)
    log.append({"step": 1})
    log.close()
    assert (tmp_path / "log.jsonl").is_symlink()
