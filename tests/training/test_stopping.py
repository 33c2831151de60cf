"""A run that is asked to stop: what it leaves, and that it goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from megatron_embed.checkpoint.files import step_directories
from megatron_embed.platform import stop_signal as stop
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.runs import configuration, curve, train
from tests.helpers.toys import layout, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def interrupted(path, at_step, rank, signum):
    """(exit code, message left for a launcher) of `train`; `rank` gets a signal while step `at_step` is computed."""
    import torch.distributed as dist

    from megatron_embed.__main__ import main
    from megatron_embed.training import loop

    original = loop.train_step
    steps = []

    def train_step(batch, trainer):
        steps.append(None)
        if len(steps) == at_step and dist.get_rank() == rank:
            os.kill(os.getpid(), signum)
        return original(batch, trainer)

    status = f"{path}.status"
    os.environ["MEGATRON_EMBED_STATUS_FILE"] = status
    loop.train_step = train_step
    try:
        code = main(["train", path])
    finally:
        loop.train_step = original
    return code, json.loads(open(status).read())["message"] if dist.get_rank() == 0 else None


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("signum, sizes, rank", [
    pytest.param(signal.SIGTERM, layout(), 1, marks=pytest.mark.slow), pytest.param(
        signal.SIGUSR1, layout(2), 0, marks=pytest.mark.slow), (signal.SIGTERM, layout(pp=2), 0)],
    ids=["term_dp2", "usr1_tp2", "term_pp2"])
def test_signal_on_one_rank_stops_all_and_the_run_goes_on(model, tmp_path, signum, sizes, rank):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    settings = {"parallel": sizes, "train_steps": 5, "warmup_steps": 2, "hidden_dropout": 0.1,
                "checkpoint": {"save_every_steps": 100}}
    run_on_ranks(train, 2, configuration(model, straight, **settings))
    path = write(tmp_path / "run.yaml", configuration(model, stopped, **settings))
    results = run_on_ranks(interrupted, 2, path, 2, rank, signum)
    assert [code for code, _ in results] == [75, 75]
    assert "stopped after 2 steps (" in results[0][1]
    if rank == 0:
        assert signal.Signals(signum).name in results[0][1]
    assert list(step_directories(stopped)) == [2]
    assert len(curve(stopped)) == 2
    assert run_on_ranks(command, 2, ["train", path])[0][0] == 0
    assert curve(stopped) == curve(straight)
    assert len(set(curve(straight))) == 5


def interrupted_in_evaluation(path):
    """(exit code, batches run) of `train`; rank 1 gets a signal while its first batch of texts is embedded."""
    import torch.distributed as dist

    from megatron_embed.__main__ import main
    from megatron_embed.evaluation import encode

    original, calls = encode.embed, []

    def embed(chunks, batches, topology):
        calls.append(len(batches))
        if len(calls) == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return original(chunks, batches, topology)

    encode.embed = embed
    try:
        return main(["train", path]), len(calls)
    finally:
        encode.embed = original


def test_evaluation_is_broken_off_and_made_up_for(model, tmp_path):
    """The resumed run begins with the evaluation that it owes: its metrics and its best are as if nothing had been."""
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    for name, letter in (("corpus", "d"), ("queries", "q")):
        (beir / f"{name}.jsonl").write_text("".join(
            json.dumps({"_id": f"{letter}{index}", "title": "", "text": f"text {index} of {name}"}) + "\n"
            for index in range(40)))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(
        f"q{index}\td{index}\t1\n" for index in range(40)))
    paths = {}
    for name in ("straight", "stopped"):
        values = configuration(model, tmp_path / name, train_steps=3, checkpoint={"save_every_steps": 100})
        values["evaluation"] = {"retrieval": [str(beir)], "every_steps": 2, "at_start": False}
        paths[name] = write(tmp_path / f"{name}.yaml", values)
    assert run_on_ranks(command, 2, ["train", paths["straight"]])[0][0] == 0
    results = run_on_ranks(interrupted_in_evaluation, 2, paths["stopped"])
    assert [code for code, _ in results] == [75, 75]
    assert results[1][1] == 1
    (saved,) = step_directories(tmp_path / "stopped").values()
    assert json.loads((saved / "trainer.json").read_text()) == {"step": 2, "evaluation_owed": True}
    assert run_on_ranks(command, 2, ["train", paths["stopped"]])[0][0] == 0

    def lines(name):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in row.items() if key in ("step", "loss") or key.startswith("eval/")}
                for row in rows]

    assert lines("stopped") == lines("straight")
    assert sum("eval/" in "".join(line) for line in lines("stopped")) == 2
    assert all(json.loads((folder / "trainer.json").read_text()) == {"step": step}
               for step, folder in step_directories(tmp_path / "stopped").items())


def test_time_budget_stops_after_one_step_at_least(model, tmp_path):
    path = write(tmp_path / "run.yaml", configuration(model, tmp_path / "run", train_steps=3,
                                                      exit_duration_minutes=1e-6))
    for done in (1, 2):
        results = run_on_ranks(command, 2, ["train", path])
        assert [code for code, *_ in results] == [75, 75], results[0][2]
        assert list(step_directories(tmp_path / "run")) == list(range(1, done + 1))
    assert run_on_ranks(command, 2, ["train", path])[0][0] == 0
    assert len(curve(tmp_path / "run")) == 3


def test_time_budget_without_a_place_to_save_is_refused(model, tmp_path):
    values = configuration(model, tmp_path / "run", train_steps=3, exit_duration_minutes=5)
    values["checkpoint"] = {}
    path = write(tmp_path / "run.yaml", values)
    assert_refused(run_on_ranks(command, 1, ["train", path]), "training.exit_duration_minutes = 5: ",
                   "the run could not be resumed; set checkpoint.directory")


HELD = """
import sys, time
sys.path.insert(0, {repository!r})
from megatron_embed.errors import PreemptedError
from megatron_embed.platform import stop_signal as stop
from megatron_embed.training.stopping import StopRequest
stop.start()
try:
    with stop.finishing():
        print("finishing", flush=True)
        while not StopRequest(None).signalled:
            time.sleep(0.01)
        print(StopRequest(None).reason(), flush=True)
        sys.stdin.readline()
        print("finished", flush=True)
except PreemptedError as error:
    stop.decided()
    print(error, flush=True)
    sys.exit(75)
"""


def test_signals_while_something_is_finished_do_not_break_it():
    from tests.helpers.toys import REPOSITORY

    process = subprocess.Popen([sys.executable, "-c", HELD.format(repository=str(REPOSITORY))], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"finishing\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == b"SIGUSR1\n"
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            time.sleep(0.1)
            process.send_signal(signum)
        time.sleep(0.1)
        assert process.poll() is None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"finished\n"
        assert process.stdout.readline() == b"stopped (SIGUSR1); start the command again\n"
        assert process.wait(timeout=10) == 75
    finally:
        process.kill()
        process.communicate()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        with stop.listening():  # once is enough
            pass
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
