"""Programs that run trainers beside each other leave none behind, however they are ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.toys import REPOSITORY

TRAINER = """
import json, os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the kernel's, to a stopped process that is left behind
folder = sys.argv[1]
os.makedirs(folder)
open(folder + "/process", "w").write(str(os.getpid()))
while True:
    time.sleep(0.02)
    with open(folder + "/metrics.jsonl", "a") as file:
        file.write(json.dumps({"loss": 1.0}) + chr(10))
"""
PROGRAM = """
import signal, sys
from pathlib import Path
import side_by_side
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
side_by_side.REPOSITORY = Path.cwd()
folder, trainer, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
sides = {name: ([sys.executable, "-c", trainer, str(folder / name)], folder / name) for name in ("one", "two")}
if how == "in turn":
    side_by_side.run_in_turn(sides, threads=1, steps=1000)
for command, output in sides.values():
    side_by_side._run(command, output, threads=1, ranks=1)
"""


def state(process: int) -> str:
    """The kernel's letter for a process; Z where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def waited_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return condition()


def number_in(file):
    return int(file.read_text() or 0) if file.exists() else 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how, signal_number", [("in turn", signal.SIGTERM), ("in turn", signal.SIGINT),
                                                ("in turn", signal.SIGKILL), ("alone", signal.SIGTERM)])
def test_a_signal_ends_both_sides(tmp_path, how, signal_number):
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), TRAINER, how], cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": str(REPOSITORY / "tools")}, stderr=subprocess.DEVNULL)
    trainers = []
    try:
        for name in ("one", "two") if how == "in turn" else ("one",):
            trainers.append(waited_for(lambda name=name: number_in(tmp_path / name / "process")))
        if how == "in turn":  # one of them is stopped then, or both for a moment
            waited_for(lambda: "T" in map(state, trainers))
        program.send_signal(signal_number)
        assert program.wait(60) != 0
        waited_for(lambda: {"Z"} == set(map(state, trainers)))
    finally:
        program.kill()
        for trainer in trainers:
            if state(trainer) != "Z":
                os.kill(trainer, signal.SIGKILL)
