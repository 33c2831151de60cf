"""Processes that a tool starts, and that end with it, with all that they have started themselves."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import psutil
from measurement import exit_on_signals

PR_SET_PDEATHSIG = 1
"""Option of Linux' prctl: the signal that a process gets when its parent ends."""


def run(command: Sequence[str], *, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
    """`subprocess.run` of a command whose processes all end if a signal ends this program, which SIGTERM then does as
    Ctrl-C does. `subprocess.run` itself kills the command alone."""
    exit_on_signals()
    process = subprocess.Popen(command, text=True, **options)
    try:
        out, err = process.communicate()
    finally:
        end([process])
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(processes: "Iterable[subprocess.Popen[Any]]") -> None:
    """Kill those that still run, stopped ones too, with all that they have started.

    That includes the ranks of torchrun, which have sessions of their own: a signal to a group does not reach them, and
    torchrun ends them on SIGTERM, but not if it is killed.
    """
    for process in processes:
        if process.poll() is None:
            program = psutil.Process(process.pid)
            program.suspend()  # so that it starts no more
            for each in (program, *program.children(recursive=True)):
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait()


def die_with_parent() -> None:
    """In a new process: end it, on Linux, when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
