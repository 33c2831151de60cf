"""A process that is asked to stop: at once where there is nothing to lose, and not in the middle of something."""

import datetime
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from megatron_embed.errors import PreemptedError
from megatron_embed.parallel import heartbeat
from megatron_embed.parallel.heartbeat import HeartbeatMonitor
from megatron_embed.parallel.rendezvous import STOPPED, Rendezvous
from megatron_embed.platform import stop_signal as stop
from megatron_embed.platform.launcher import run_name
from megatron_embed.platform.status import STATUS_FILE_VARIABLE
from tests.helpers.ports import free_port
from tests.helpers.toys import REPOSITORY

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3041")


def listens(pid):
    """Whether the process has a handler for SIGTERM yet."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_program_obeys_from_its_first_line_on(tmp_path, signum):
    """The signal comes as soon as there is a handler, long before the libraries are there."""
    status = tmp_path / "status"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_embed", "encode", "--model", "absent", "--input", "a", "--output", "b"],
        env=environment | {STATUS_FILE_VARIABLE: str(status), "PYTHONPATH": str(REPOSITORY)}, cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not listens(process.pid):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signum)
    assert process.wait(timeout=30) == 75
    assert json.loads(status.read_text())["exit_code"] == 75
    assert signal.Signals(signum).name in json.loads(status.read_text())["message"]


def child(work, status):
    """(exit code, status file) of a fork that gets SIGTERM as soon as `work` says where it is, which ends it soon."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        gc.freeze()  # or a collection ends the parent's stores and groups, whose threads are not here: an abort
        code = 99
        try:
            os.environ[STATUS_FILE_VARIABLE] = str(status)
            code = work(lambda: os.write(writer, b"x"))
        finally:
            os._exit(code)
    os.close(writer)
    told, start = os.read(reader, 1), time.monotonic()
    os.kill(pid, signal.SIGTERM)
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert told, f"ended with {code} before it said where it is"
    assert time.monotonic() - start < 20
    return code, json.loads(status.read_text())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("command, function", [
    (["train", "{config}"], "megatron_embed.run.assemble.read_inputs"),  # rows, model, checkpoints: all wait alike
    (["encode", "--model", "m", "--input", "{rows}", "--output", "{out}.npy"],
     "megatron_embed.loading.model_directory.open_encoder"),
    (["evaluate", "--model", "m", "--data", "{config}"], "megatron_embed.run.evaluate_command.holds_pairs"),
    (["mine", "--model", "m", "--data", "{rows}", "--output", "{out}.jsonl"],
     "megatron_embed.mining.mine.query_prompts")])
def test_commands_obey_while_they_load_and_read(monkeypatch, tmp_path, command, function):
    from megatron_embed.__main__ import main

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {train: [a.jsonl]}\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "query": "a", "positive": ["b"]}\n')
    names = {"config": tmp_path / "run.yaml", "rows": tmp_path / "rows.jsonl", "out": tmp_path / "out"}

    def work(tell):
        monkeypatch.setattr(function, lambda *args, **kwargs: (tell(), time.sleep(60)))
        return main([part.format(**names) for part in command])

    code, status = child(work, tmp_path / "status")
    assert (code, status["exit_code"]) == (75, 75)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_output_under_way_is_completed_first(tmp_path):
    from megatron_embed.platform.atomic_file import write_atomic

    def write(tell, file):
        file.write("half, ")
        tell()
        deadline = time.monotonic() + 30
        while not stop.asked() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        file.write("whole")

    def work(tell):
        with stop.listening():
            try:
                write_atomic("--output", str(tmp_path / "out"), lambda file: write(tell, file))
            except PreemptedError:
                return 75
        return 1

    code, status = child(work, tmp_path / "status")
    assert code == 75 and (tmp_path / "out").read_text() == "half, whole"
    assert status["exit_code"] == 1  # if it had been killed meanwhile, nobody would take it for a good end
    assert sorted(os.listdir(tmp_path)) == ["out", "status"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_signal_to_a_fork_is_none_to_its_parent():
    """multiprocessing ends its workers so."""
    with stop.listening():
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 1)
        os.close(reader), os.close(writer)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert not stop.asked()


@pytest.fixture
def listening(monkeypatch):
    """Signals are requests, which wait; a faster clock."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.1)
    with stop.listening():
        assert stop._listener is not None
        stop._listener.holds = 1
        yield stop._listener


@pytest.mark.parametrize("leaver", [0, 1])
def test_rank_that_leaves_makes_a_preemption_of_the_others_broken_collectives(listening, leaver, monkeypatch):
    monkeypatch.setattr(heartbeat, "SUSPECT_SECONDS", 25.0)  # A busy machine keeps threads waiting for seconds.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                          timeout=datetime.timedelta(seconds=30))
    monitors = [HeartbeatMonitor("127.0.0.1", store.port, rank=rank, world_size=3, silence_seconds=60.0,
                       on_loss=lambda message, is_reporting_rank: None) for rank in range(3)]
    ends = []
    others = [threading.Thread(target=lambda monitor=monitor: ends.append(monitor.explain(GLOO, 600)))
              for rank, monitor in enumerate(monitors) if rank != leaver]
    last = threading.Thread(target=monitors[leaver].leave)
    for thread in (*others, last):
        thread.start()
    for thread in others:
        thread.join(30)
    assert [type(end) for end in ends] == [PreemptedError, PreemptedError]
    assert stop.asked() and stop.reason() == "another rank was asked to"
    for monitor in monitors:
        monitor.close("left")
    last.join(30)


def test_request_of_one_rank_reaches_all_while_they_work(listening):
    """A rank that is asked and finishes something says so with its heartbeats, and is not taken for lost."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                          timeout=datetime.timedelta(seconds=30))
    monitor = HeartbeatMonitor("127.0.0.1", store.port, rank=0, world_size=2, silence_seconds=60.0,
                      on_loss=lambda message, is_reporting_rank: None)
    heartbeats = dist.PrefixStore(f"heartbeats/{run_name()}", store)
    heartbeats.get("summary")
    assert not stop.asked()
    heartbeats.set("heartbeat/1", f"7 {heartbeat.STOPPING}")
    deadline = time.monotonic() + 30
    while not stop.asked() or f"|{heartbeat.STOPPING}|" not in heartbeats.get("summary").decode():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    heartbeats.set("heartbeat/1", f"8 {heartbeat.LEFT}")
    monitor.close(heartbeat.LEFT)


def test_ranks_that_come_to_a_meeting_where_one_has_left_are_preempted(monkeypatch):
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    first, second, third = (Rendezvous(rank, 3) for rank in range(3))
    second.report_stop()
    for barrier in (third, first):
        with pytest.raises(PreemptedError, match="another rank was asked to"):
            barrier.wait_for_all(30)
    assert first._store is not None and first._store.get("outcome").decode() == STOPPED
