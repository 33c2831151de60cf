"""Tools that start trainers, ranks or servers leave none behind when a signal ends them."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers.toys import REPOSITORY

CHILD = """#!{python}
import os, subprocess, time
rank = subprocess.Popen(["sleep", "120"], start_new_session=True)  # as torchrun starts its ranks
name = "{folder}/%d" % os.getpid()
open(name + ".unfinished", "w").write("%d %d" % (os.getpid(), rank.pid))
os.rename(name + ".unfinished", name + ".started")
time.sleep(120)
"""
PROGRAM = """
import importlib, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
name, call, child = sys.argv[1:4]
tool = importlib.import_module(name)
sys.executable, sys.argv = child, [name, *sys.argv[4:]]
eval(call)
"""
OF_MAIN = "__import__('measurement').exit_on_signals() or "
"""What `main` of a tool begins with whose runner is called alone."""


def program(name, *arguments, call="tool.main()", started=1):
    """(module, call, arguments, processes that it starts at once); FOLDER in an argument is one to write to."""
    return pytest.param(name, call, arguments, started, id=name)


QUICK = [program("bench_workers", "FOLDER/run.yaml", "--workers", "0"),
         program("bench_index", "--rows", "100", "--directory", "FOLDER/rows", started=2),
         program("bench_serve", "--model", "FOLDER/model", "--requests", "10"),
         program("bench_vectors", "--rows", "100", "--directory", "FOLDER/rows"),
         program("demo", call="tool.run('evaluate')"),
         program("side_by_side", "FOLDER/side",
                 call="tool._run([child], Path(sys.argv[1]), threads=1, ranks=2)")]
OTHERS = [program("circle", call="tool.run_on_ranks(['evaluate'], 2)"),
          program("heads_recipe", call="tool.command('evaluate')"),
          program("versions", "FOLDER/run",
                  call="tool.losses([tool.Version(child, tool.REPOSITORY)], 1, 'm', {}, 'float32', Path(sys.argv[1]))"),
          program("crash_restart_test", "FOLDER/run.yaml", call=OF_MAIN + "tool.finish(Path(sys.argv[1]))"),
          program("signal_test", "FOLDER/run.yaml", call=OF_MAIN + "tool.interrupt(Path(sys.argv[1]), 60, None)",
                  started=2)]


def is_running(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def waited_for(condition, running=None):
    deadline = time.monotonic() + 60
    while not (result := condition()):
        assert time.monotonic() < deadline
        assert running is None or running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    return result


def check(tmp_path, signal_number, name, call, arguments, started):
    child, folder = tmp_path / "child", tmp_path / "started"
    folder.mkdir()
    child.write_text(CHILD.format(python=sys.executable, folder=folder))
    child.chmod(0o755)
    given = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    running = subprocess.Popen([sys.executable, "-c", PROGRAM, name, call, str(child), *given], cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": f"{REPOSITORY / 'tools'}:{REPOSITORY}"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    processes = []
    try:
        files = waited_for(lambda: len(found := list(folder.glob("*.started"))) == started and found, running)
        processes = [int(number) for file in files for number in file.read_text().split()]
        assert len(processes) == 2 * started and all(map(is_running, processes))
        running.send_signal(signal_number)
        assert running.wait(60) not in (0, -signal.SIGTERM)
        waited_for(lambda: not any(map(is_running, processes)))
    finally:
        running.kill()
        running.communicate()
        for process in filter(is_running, processes):
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name, call, arguments, started", QUICK)
def test_a_stopped_tool_leaves_nothing_running(tmp_path, signal_number, name, call, arguments, started):
    check(tmp_path, signal_number, name, call, arguments, started)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name, call, arguments, started", OTHERS)
def test_neither_does_a_slower_one(tmp_path, signal_number, name, call, arguments, started):
    check(tmp_path, signal_number, name, call, arguments, started)
