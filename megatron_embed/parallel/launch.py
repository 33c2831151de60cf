"""What the launcher says of this process: its rank, and where the ranks of the run find each other."""

import os
import re

from megatron_embed.errors import ConfigError

_LARGEST_STEP = 0xFFFFFFF0
"""Slurm's numbers from here on are no steps of srun's: the batch script's, an interactive shell's."""


def launched_rank() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's variables, else from srun's (several tasks), else (0, 1, 0)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if is_task_of_srun() and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def is_task_of_srun() -> bool:
    """Whether srun started this process. A batch script has variables of the job, SLURM_PROCID and SLURM_NTASKS among
    them, but it is one process, and no step of the job."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and step.isdecimal() and int(step) < _LARGEST_STEP


def source_of_world_size() -> str:
    """Which variable of which launcher says how many ranks there are."""
    return "torchrun's WORLD_SIZE" if "RANK" in os.environ and "WORLD_SIZE" in os.environ else "srun's SLURM_NTASKS"


def rendezvous_address() -> tuple[str, int]:
    """Host and port of the run's key-value store: MASTER_ADDR and MASTER_PORT, under Slurm the first node and a port
    that follows from the job's number; then both are set."""
    env = os.environ
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_slurm_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    if "MASTER_PORT" not in env:
        # Jobs that share a node must not share a port; ids that follow each other get ports far apart.
        env["MASTER_PORT"] = str(20000 + int(env.get("SLURM_JOB_ID", 0)) * 7 % 20000)
    return env["MASTER_ADDR"], int(env["MASTER_PORT"])


def _first_slurm_host(nodelist: str) -> str:
    """`node[03-05,9]` or `a,b` -> the first host's name."""
    match = re.match(r"([^\[,]+)(?:\[([0-9]+))?", nodelist)
    if match is None:
        raise ConfigError(f"SLURM_JOB_NODELIST = {nodelist!r} names no host; set MASTER_ADDR to the first node's "
                          "address")
    return match.group(1) + (match.group(2) or "")
