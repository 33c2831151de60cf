"""Rank of this process and address of the rendezvous, from the launcher's environment variables."""

import os
import re

from megatron_embed.errors import ConfigError

_LARGEST_STEP = 0xFFFFFFF0
"""Step ids from here on are not srun's but those of the batch script and of interactive shells."""

_MOST_DIGITS = 20


FIRST_PORT, PORTS = 20000, 12750
"""Below 32768, from where Linux takes ports of outgoing connections, so that none is in use by chance. The same as in
launch/slurm/job.sh."""


def launched_rank() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's variables, else from srun's or mpirun's (several tasks), else
    (0, 1, 0).

    If RANK and WORLD_SIZE are set without LOCAL_RANK, the local rank is srun's or mpirun's, else it follows from
    LOCAL_WORLD_SIZE, else from the number of visible GPUs (see `topology.device_of`); until then it is the rank.

    Raises:
        ConfigError: a variable is empty, not a number, or contradicts another; or the job is heterogeneous.
    """
    env = os.environ
    if _is_torchruns():
        rank, size = _rank_and_size("RANK", "WORLD_SIZE")
        for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
            if name in env and not least <= _number(name) < size + least:
                raise ConfigError(f"{name} = {env[name]} and WORLD_SIZE = {size}: must be a whole number from {least} "
                                  f"to {size + least - 1}; set both to what the launcher means, or unset {name}")
        return rank, size, _local_rank(rank)
    if is_task_of_srun():
        rank, size = _rank_and_size("SLURM_PROCID", "SLURM_NTASKS")
        if size > 1:
            _refuse_heterogeneous()
            return rank, size, _number("SLURM_LOCALID", 0)
        return 0, 1, 0
    lone = [name for name in ("RANK", "WORLD_SIZE") if name in env]
    if lone and (lone[0] == "RANK" or env["WORLD_SIZE"] != "1"):
        other = "WORLD_SIZE" if lone[0] == "RANK" else "RANK"
        raise ConfigError(f"{lone[0]} = {env[lone[0]]!r} without {other}: set {other} as well (and LOCAL_RANK, the "
                          f"rank's number on its node), or unset {lone[0]} for one rank")
    rank, size = _rank_and_size("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if size > 1:
        return rank, size, _number("OMPI_COMM_WORLD_LOCAL_RANK", 0)
    if _number("SLURM_PROCID", 0):
        raise ConfigError(f"SLURM_PROCID = {env['SLURM_PROCID']} outside of a step of srun (SLURM_STEP_ID): a batch "
                          "script's is 0; pass all of srun's variables on, or unset SLURM_PROCID for one rank")
    return 0, 1, 0


def knows_local_rank() -> bool:
    """Whether a launcher sets the local rank."""
    env = os.environ
    return not _is_torchruns() or "LOCAL_WORLD_SIZE" in env or any(
        name in env for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")) or (
            is_task_of_srun() and "SLURM_LOCALID" in env)


def _local_rank(rank: int) -> int:
    """Local rank of a process with RANK and WORLD_SIZE."""
    if "LOCAL_RANK" in os.environ:
        local, beside = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", rank + _number("LOCAL_RANK") + 1)
        if not local < beside:
            raise ConfigError(f"LOCAL_RANK = {local} and LOCAL_WORLD_SIZE = {beside}: a node's ranks count from 0; set "
                              "both to what the launcher means")
        return local
    if is_task_of_srun() and "SLURM_LOCALID" in os.environ:
        return _number("SLURM_LOCALID")
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        return _number("OMPI_COMM_WORLD_LOCAL_RANK")
    return rank % max(1, _number("LOCAL_WORLD_SIZE", rank + 1))


def _number(name: str, default: int | None = None) -> int:
    """A variable's value, a whole number >= 0. Raises ConfigError, naming the variable, if it is not."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not _is_number(text):
        raise ConfigError(f"{name} {'is not set' if text is None else f'= {text!r}'}: must be a whole number from 0 "
                          "on, which the launcher sets; unset it, with RANK, WORLD_SIZE and LOCAL_RANK, for one rank")
    return int(text)


def _rank_and_size(rank_name: str, size_name: str) -> tuple[int, int]:
    """The values of these two variables; (0, 1) without them. Raises ConfigError if there is no such rank: the others
    would wait for it."""
    rank, size = _number(rank_name, 0), _number(size_name, 1)
    if size > 1:
        _number(rank_name)  # is set
    if not rank < size:
        given = f"and {size_name} = {size}" if size_name in os.environ else f"without {size_name}"
        raise ConfigError(f"{rank_name} = {rank} {given}: ranks count from 0, so the last one is {size_name} - 1; "
                          "set both to what the launcher means, or unset both for one rank")
    return rank, size


def _is_number(text: str) -> bool:
    """Whether it is a whole number from 0 on, of fewer digits than Python refuses to read (4300)."""
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def _number_or_none(*names: str) -> int | None:
    """The first of these variables that is a number; None if none is. Never raises."""
    for name in names:
        text = os.environ.get(name, "")
        if _is_number(text):
            return int(text)
    return None


def _is_torchruns() -> bool:
    """Whether RANK and WORLD_SIZE are set, by torchrun or by hand."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _refuse_heterogeneous() -> None:
    size = os.environ.get("SLURM_HET_SIZE", "")
    if _is_number(size) and int(size) > 1:
        raise ConfigError(f"SLURM_HET_SIZE = {size}: a heterogeneous job, whose components number their tasks each "
                          "from 0; submit one job of equal components (nodes may differ in their number of tasks)")


def process_rank() -> int:
    """Rank of this process, before any library is loaded; 0 if its variables are ones that `launched_rank` refuses, so
    that this is said."""
    try:
        return launched_rank()[0]
    except ConfigError:
        return 0


def first_on_node() -> bool:
    """Whether this is the first rank of its node; by the first variable that is a number, if `launched_rank` refuses
    them."""
    try:
        return launched_rank()[2] == 0
    except ConfigError:
        return not _number_or_none("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "RANK", "SLURM_PROCID",
                                   "OMPI_COMM_WORLD_RANK")


def is_task_of_srun() -> bool:
    """Whether srun started this process. A batch script also has SLURM_PROCID and SLURM_NTASKS, but it is one process
    and not a step of the job."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and _is_number(step) and int(step) < _LARGEST_STEP


def source_of_world_size() -> str:
    """The launcher's variable that sets the number of ranks, for messages."""
    if _is_torchruns():
        return "torchrun's WORLD_SIZE"
    return "srun's SLURM_NTASKS" if is_task_of_srun() else "mpirun's OMPI_COMM_WORLD_SIZE"


def all_ranks_on_this_node() -> bool:
    """Whether the run has no other node, according to the launcher."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    return env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")) == "1"


def hosted_by_agent() -> bool:
    """Whether torchrun's agent on the first node hosts the run's key-value store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def run_name() -> str:
    """A name of this start of this run, different from every other one at the same address: the launcher's id and the
    number of restarts. Equal on all ranks.

    Two jobs with one MASTER_PORT, or a requeued one whose first rank 0 still runs, share a key-value store: with one
    name, the ranks of one would read what those of the other wrote.
    """
    env = os.environ
    if _is_torchruns():
        # Not Slurm's ids, which a node reached by ssh does not have.
        return f"torchrun-{env.get('TORCHELASTIC_RUN_ID', '')}-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return "-".join(["slurm", *(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))])


def launcher_names_runs() -> bool:
    """Whether two runs at one address have different names: not if they were started by hand with RANK and WORLD_SIZE,
    or by torchrun without --rdzv-id."""
    if _is_torchruns():
        return os.environ.get("TORCHELASTIC_RUN_ID", "none") not in ("", "none")
    return True


def rendezvous_address() -> tuple[str, int]:
    """Host and port of the run's key-value store: MASTER_ADDR and MASTER_PORT. Under Slurm they are set to the first
    node and a port computed from the ids of job and step. Raises ConfigError if they cannot be set."""
    env = os.environ
    if not env.get("MASTER_ADDR", "").strip():  # empty counts as unset
        env["MASTER_ADDR"] = _first_slurm_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    if "MASTER_PORT" not in env:
        # Jobs that share a node must not share a port, nor must up to seven steps or starts of one job: an earlier rank
        # 0 that is still running would hold it.
        job, step, start = (_number(f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        offset = job * 7 + (step + start) % 7
        env["MASTER_PORT"] = str(FIRST_PORT + offset % PORTS)
    port = env["MASTER_PORT"]
    # torchrun --master-port 0 passes the zero on: every rank would use another port and wait for ever.
    if not (_is_number(port) and 0 < int(port) < 2**16):
        raise ConfigError(f"MASTER_PORT = {port!r} is not a port that ranks can meet at; give one from 1024 to 65535 "
                          "(torchrun: --master-port), or start it by launch/torchrun/one_node.sh, which finds one")
    address = env["MASTER_ADDR"]
    if address.count(":") == 1 or address.startswith("-") or re.search(r"[\s/]", address):
        raise ConfigError(f"MASTER_ADDR = {address!r} is not a host's name or address; give that of the first node "
                          "alone, and the port in MASTER_PORT")
    return address, int(port)


def _first_slurm_host(nodelist: str) -> str:
    """`node[03-05,9]`, `rack[1-2]n[01-04]-ib` or `a,b` -> the first host's name."""
    match = re.match(r"(?:[^][,\s]|\[[0-9]+[0-9,-]*\])+", nodelist)
    if match is None or nodelist.startswith("["):
        raise ConfigError(f"MASTER_ADDR is not set, and SLURM_JOB_NODELIST = {nodelist!r} names no host; set "
                          "MASTER_ADDR to the first node's address")
    return re.sub(r"\[([0-9]+)[0-9,-]*\]", r"\1", match.group())
