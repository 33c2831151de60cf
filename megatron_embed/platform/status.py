"""The status file: exit code and message of a process, for the script that started it."""

import json
import logging
import os
import time
from pathlib import Path

from megatron_embed.platform.launcher import first_on_node, process_rank

logger = logging.getLogger(__name__)

STATUS_FILE_VARIABLE = "MEGATRON_EMBED_STATUS_FILE"
TORCHRUN_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Set by torchrun: the file whose error its last lines show, after a traceback of its own."""
PREEMPTED = 75
"""Exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL): started again, it resumes."""


def leaves_status() -> bool:
    """Whether this process writes the status file of its node: the first rank on it does."""
    return first_on_node()


def clear_status() -> None:
    """Remove the status file of an earlier run: a run that is killed must not look like one that succeeded."""
    name = os.environ.get(STATUS_FILE_VARIABLE)
    if name:
        try:
            Path(name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s = %r: cannot remove an earlier status: %s", STATUS_FILE_VARIABLE, name, error.strerror)


def write_status(exit_code: int, message: str) -> None:
    """Write exit code and message to the file that MEGATRON_EMBED_STATUS_FILE names, if it is set.

    For launch scripts: torchrun turns every worker's failure into exit code 1.
    """
    name = os.environ.get(STATUS_FILE_VARIABLE)
    if not name:
        return
    unfinished = Path(f"{name}.{process_rank()}.tmp")  # nodes may share the directory
    try:
        unfinished.unlink(missing_ok=True)
        with unfinished.open("x", encoding="utf-8") as file:  # x: a link that somebody put there is not followed
            file.write(json.dumps({"exit_code": exit_code, "message": message}) + "\n")
        unfinished.replace(name)
    except OSError as error:
        logger.warning("%s = %r: cannot write the status: %s", STATUS_FILE_VARIABLE, name, error.strerror)


def tell_torchrun(message: str) -> None:
    """Let torchrun, if it started this process, end with this message in place of its advice to record tracebacks."""
    name = os.environ.get(TORCHRUN_FILE_VARIABLE)
    if name:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        try:
            Path(name).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
        except OSError as error:
            logger.warning("%s = %r: cannot write the error: %s", TORCHRUN_FILE_VARIABLE, name, error.strerror)
