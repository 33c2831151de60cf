"""What the launcher says of this process: its rank, and where the ranks of the run find each other."""

import os
import re

from megatron_embed.errors import ConfigError

_LARGEST_STEP = 0xFFFFFFF0
"""Slurm's numbers from here on are no steps of srun's: the batch script's, an interactive shell's."""


FIRST_PORT, PORTS = 20000, 12750
"""Below 32768, where Linux takes ports of outgoing connections from: one of those would be taken now and then. As in
launch/slurm/job.sh."""


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


def all_ranks_on_this_node() -> bool:
    """Whether the launcher says that the run has no other node."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    return env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")) == "1"


def run_name() -> str:
    """What sets this start of this run apart from every other one that meets at the same address: the launcher's number
    for it, and how often it was started again. Equal on all ranks.

    Two jobs with one MASTER_PORT, or a requeued one whose first rank 0 still lives, share a key-value store: under one
    name the ranks of one would take the word of the other's.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        # Not Slurm's numbers, which a node that was reached by ssh does not have.
        return f"torchrun-{env.get('TORCHELASTIC_RUN_ID', '')}-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return "-".join(["slurm", *(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))])


def launcher_names_runs() -> bool:
    """Whether two runs that meet at one address have different names: not those that somebody started by hand with RANK
    and WORLD_SIZE, nor torchrun's without --rdzv-id."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return os.environ.get("TORCHELASTIC_RUN_ID", "none") not in ("", "none")
    return True


def rendezvous_address() -> tuple[str, int]:
    """Host and port of the run's key-value store: MASTER_ADDR and MASTER_PORT, under Slurm the first node and a port
    that follows from the numbers of job and step; then both are set. ConfigError if they cannot be."""
    env = os.environ
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_slurm_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    if "MASTER_PORT" not in env:
        # Jobs that share a node must not share a port, nor must seven steps or starts of a job: a rank 0 of before that
        # does not end would hold it.
        job, step, start = (int(env.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        number = job * 7 + (step + start) % 7
        env["MASTER_PORT"] = str(FIRST_PORT + number % PORTS)
    port = env["MASTER_PORT"]
    # torchrun --master-port 0 hands the zero on: every rank would open or seek another port, and wait for ever.
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"MASTER_PORT = {port!r} is no port that ranks can meet at; give one from 1024 to 65535 "
                          "(torchrun: --master-port), or torchrun --standalone, which finds one")
    return env["MASTER_ADDR"], int(port)


def _first_slurm_host(nodelist: str) -> str:
    """`node[03-05,9]` or `a,b` -> the first host's name."""
    match = re.match(r"([^\[,]+)(?:\[([0-9]+))?", nodelist)
    if match is None:
        raise ConfigError(f"SLURM_JOB_NODELIST = {nodelist!r} names no host; set MASTER_ADDR to the first node's "
                          "address")
    return match.group(1) + (match.group(2) or "")
