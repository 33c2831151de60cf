"""A lost rank is named by every other one, and one of them reports it."""

import dataclasses
import datetime
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.errors import CheckpointError, LostRankError
from megatron_embed.parallel import heartbeat
from megatron_embed.parallel.heartbeat import HeartbeatMonitor, is_connection_error
from tests.helpers.ports import free_port
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import configuration
from tests.helpers.toys import REPOSITORY, save_model

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3041")


@pytest.fixture
def store(monkeypatch):
    """An empty store, and shorter intervals."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "SUSPECT_SECONDS", 1.5)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 1.0)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                         timeout=datetime.timedelta(seconds=30))


def monitors_of(store, ranks, world_size, silence_seconds=60.0, on_loss=None):
    return [HeartbeatMonitor("127.0.0.1", store.port, rank=rank, world_size=world_size, silence_seconds=silence_seconds,
                      on_loss=on_loss or (lambda message, is_reporting_rank: None)) for rank in ranks]


def explained(monitors):
    """(message, whether it is the reporting rank) of every rank whose collective failed, all at once."""
    answers = {}
    threads = [threading.Thread(target=lambda rank=rank, monitor=monitor: answers.__setitem__(
        rank, monitor.explain(GLOO, 600))) for rank, monitor in enumerate(monitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(str(answers[rank]), answers[rank].is_reporting_rank) for rank in range(len(monitors))]


def test_silent_rank_is_named_by_all_and_the_lowest_reports(store):
    monitors = monitors_of(store, (0, 1, 3), 4)
    time.sleep(0.5)
    start = time.monotonic()
    answers = explained(monitors)
    assert time.monotonic() - start < 10
    assert all(message.startswith("rank 2 is gone: no sign of life for ") for message, _ in answers)
    assert [is_reporting_rank for _, is_reporting_rank in answers] == [True, False, False]


def test_error_of_another_rank_is_told(store):
    monitors = monitors_of(store, (0, 1, 2), 3)
    time.sleep(0.3)
    monitors[1].close(f"{heartbeat.FAILED} OutOfMemoryError: no memory for 2 GiB")
    answers = explained([monitors[0], monitors[2]])
    assert all("rank 1 ended with OutOfMemoryError: no memory for 2 GiB" in message for message, _ in answers)
    assert [is_reporting_rank for _, is_reporting_rank in answers] == [True, False]


def test_main_thread_that_hangs_is_ended_by_the_monitor(store):
    """No collective fails: the missing heartbeats are enough."""
    lost = []
    monitors = monitors_of(store, (0, 1), 3, silence_seconds=1.5, on_loss=lambda *loss: lost.append(loss))
    deadline = time.monotonic() + 15
    while len(lost) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(is_reporting_rank for _, is_reporting_rank in lost) == [False, True]
    assert all(message.startswith("rank 2 is gone: ") for message, _ in lost)
    for monitor in monitors:
        monitor.close(heartbeat.DONE)


def test_rank_0_that_ends_well_alarms_nobody(store):
    lost = []
    monitors = monitors_of(store, (0, 1), 2, silence_seconds=1.0, on_loss=lambda *loss: lost.append(loss))
    time.sleep(0.5)
    monitors[0].close(heartbeat.DONE)
    time.sleep(2.5)
    assert not lost
    monitors[1].close(heartbeat.DONE)


def test_nobody_is_gone(store):
    monitors = monitors_of(store, (0, 1), 2)
    answers = explained(monitors)
    assert all("though every rank lives" in message and "parallel.timeout_seconds = 600" in message
               for message, _ in answers)


def test_connection_errors_are_told_from_others():
    assert is_connection_error(GLOO)
    assert not is_connection_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_connection_error(CheckpointError("damaged"))
    try:
        try:
            raise GLOO
        except RuntimeError as error:
            raise CheckpointError("cannot be saved") from error
    except CheckpointError as error:
        assert is_connection_error(error)


def lose_rank_1(port, told):
    """Collectives during which SIGKILL ends rank 1; rank 0 writes its error."""
    from unittest import mock

    import torch

    from megatron_embed.parallel.topology import initialize

    topology = dataclasses.replace(initialize(ParallelConfig(timeout_seconds=60)), rendezvous=("127.0.0.1", port))
    with mock.patch.multiple(heartbeat, HEARTBEAT_SECONDS=0.1, SUSPECT_SECONDS=1.5):
        try:
            with heartbeat.monitor_ranks(topology, lambda message, is_reporting_rank: None):
                for turn in range(10**6):
                    if turn == 3 and topology.rank == 1:
                        time.sleep(0.5)
                        os.kill(os.getpid(), signal.SIGKILL)
                    dist.all_reduce(torch.ones(3), group=topology.dp_group)
        except LostRankError as error:
            Path(told).write_text(f"{error} {error.is_reporting_rank}")


def test_kill_of_a_rank_is_told_by_the_other(tmp_path):
    """A real worker is killed by SIGKILL, and rank 0 gets gloo's own error."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_on_ranks(lose_rank_1, 2, store.port, str(tmp_path / "told"))
    assert time.monotonic() - start < 30
    told = (tmp_path / "told").read_text()
    assert told.startswith("rank 1 is gone: no sign of life for ")
    assert told.endswith("it resumes from its last checkpoint True")


def lose_rank_1_in(arguments, port, told):
    """A command whose rank 1 is killed once the ranks have met; rank 0 writes how it ended."""
    from unittest import mock

    from megatron_embed.loading import model_directory as model
    from megatron_embed.parallel import topology

    initialize, load, rank = topology.initialize, model.load_model_chunks, dist.get_rank()

    def load_or_die(*given, **named):
        time.sleep(0.5)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(*given, **named)

    with mock.patch.object(topology, "initialize", lambda sizes: dataclasses.replace(
            initialize(sizes), rendezvous=("127.0.0.1", port))), mock.patch.object(
            model, "load_model_chunks", load_or_die), mock.patch.multiple(
            heartbeat, HEARTBEAT_SECONDS=0.1, SUSPECT_SECONDS=1.0):
        code, _, err, _ = command(arguments)
    Path(told).write_text(f"{code} {err}")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Rows for every command, and a model."""
    folder = tmp_path_factory.mktemp("small")
    model = save_model(folder / "model", "bert", tokenizer=True)
    rows = [{"query": f"what is {word}", "positive": [f"it is {word}"]} for word in ("red", "blue", "green", "black")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": row["query"]}) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"text_a": row["query"], "text_b": row["positive"][0], "score": index}) + "\n"
        for index, row in enumerate(rows)))
    return model, folder


@pytest.mark.parametrize("arguments", [
    ["encode", "--input", "texts.jsonl", "--output", "out.npy"],
    pytest.param(["evaluate", "--data", "pairs.jsonl"], marks=pytest.mark.slow),
    pytest.param(["mine", "--data", "rows.jsonl", "--output", "out.jsonl", "--num-negatives", "1"],
                 marks=pytest.mark.slow)],
    ids=lambda arguments: arguments[0])
def test_commands_tell_which_rank_was_killed(small, tmp_path, arguments):
    model, folder = small
    named = [str((tmp_path if text.startswith("out") else folder) / text) if "." in text else text
             for text in arguments]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_on_ranks(lose_rank_1_in, 2, [*named, "--model", model], store.port, str(tmp_path / "told"))
    code, _, err = (tmp_path / "told").read_text().partition(" ")
    line = err.strip().splitlines()[-1]
    assert (code, line.startswith("megatron-embed: error: rank 1 is gone: no sign of life for ")) == ("1", True), err
    assert line.endswith("Look at its log, then start the command again")
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["told"]


class Screen:
    """A terminal, without which no progress is shown, and what was written to it."""

    def __init__(self):
        self._keyboard, self.terminal = pty.openpty()
        termios.tcsetwinsize(self.terminal, (24, 100))  # wide enough for a progress bar
        self._parts = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        while part := os.read(self._keyboard, 4096):
            self._parts.append(part)

    def text(self):
        time.sleep(0.2)
        return b"".join(self._parts).decode()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_killed_rank_ends_encode_with_a_line_that_names_it(small, tmp_path, victim):
    """Plain processes and a real SIGKILL, while texts become vectors."""
    model, _ = small
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"number {index} " * 60}) + "\n"
                                                  for index in range(20_000)))
    port = free_port()
    logs, ranks = [Screen(), Screen()], []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ranks.append(subprocess.Popen(
            [sys.executable, "-m", "megatron_embed", "encode", "--model", model, "--input",
             str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "out.npy")], cwd=REPOSITORY,
            env=environment, stdout=logs[rank].terminal, stderr=logs[rank].terminal, start_new_session=True))
    try:
        deadline = time.monotonic() + 120
        while "%|" not in logs[0].text():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), logs[0].text()
            time.sleep(0.2)
        ranks[victim].send_signal(signal.SIGKILL)
        assert ranks[1 - victim].wait(timeout=120) == 1
        text = logs[1 - victim].text()
        line = text.strip().splitlines()[-1]
        assert line.startswith(f"megatron-embed: error: rank {victim}") and "gone" in line, text
        assert "Traceback" not in text and not (tmp_path / "out.npy").exists()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_killed_rank_ends_the_other_with_a_line_that_names_it(tmp_path, victim):
    """Plain processes, no launcher that would end them: SIGKILL in the middle of training."""
    model = save_model(tmp_path / "model", "qwen3", tokenizer=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration(model, tmp_path / "run", train_steps=100000)))
    port = free_port()
    status = tmp_path / "status"
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "MEGATRON_EMBED_STATUS_FILE": str(status)}
        ranks.append(subprocess.Popen(
            [sys.executable, "-m", "megatron_embed", "train", str(tmp_path / "run.yaml")], cwd=REPOSITORY,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.2)
        ranks[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, err = ranks[1 - victim].communicate(timeout=120)
        assert ranks[1 - victim].returncode == 1
        assert time.monotonic() - start < 60
        line = err.strip().splitlines()[-1]
        assert line.startswith(f"megatron-embed: error: rank {victim}"), err
        assert "gone" in line
        assert "resumes from its last checkpoint" in line
        assert '"exit_code": 1' in status.read_text()
        assert "Traceback" not in err
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
