"""Rank and world size from the launcher's variables, and values that are refused."""

import pytest
import torch

from megatron_embed.__main__ import main
from megatron_embed.config.schema import ParallelConfig
from megatron_embed.errors import ConfigError
from megatron_embed.parallel.topology import device_of
from megatron_embed.platform.launcher import (
    first_on_node,
    knows_local_rank,
    launched_rank,
    launcher_names_runs,
    process_rank,
    rendezvous_address,
    run_name,
    source_of_world_size,
)
from tests.helpers.ranks import run_on_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
             "TORCHELASTIC_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID", "SLURM_NTASKS",
             "SLURM_LOCALID", "SLURM_HET_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
             "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST")


def set_only(monkeypatch, variables):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it meanwhile
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


BATCH_STEP = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7",
              "SLURM_JOB_NODELIST": "node[03-05,9]"}
"""What a batch script of two tasks sees (Slurm 23.11)."""


@pytest.mark.parametrize("variables, expected", [
    ({}, (0, 1, 0)),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **BATCH_STEP, "SLURM_STEP_ID": "0"}, (3, 8, 1)),
    ({**BATCH_STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, (1, 2, 1)),
    ({**BATCH_STEP, "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, (0, 1, 0)),
    (BATCH_STEP, (0, 1, 0)),
    ({**BATCH_STEP, "SLURM_STEP_ID": "4294967291"}, (0, 1, 0)),  # SLURM_BATCH_SCRIPT
    ({**BATCH_STEP, "SLURM_STEP_ID": "4294967290"}, (0, 1, 0)),  # SLURM_INTERACTIVE_STEP
], ids=["alone", "torchrun", "srun", "srun_of_one", "batch_script", "batch_number", "interactive_shell"])
def test_ranks_are_what_the_launcher_started(monkeypatch, variables, expected):
    set_only(monkeypatch, variables)
    assert launched_rank() == expected
    if expected[1] > 1:
        assert source_of_world_size() == ("torchrun's WORLD_SIZE" if "RANK" in variables else "srun's SLURM_NTASKS")
        assert rendezvous_address() == ("node03", 20049)


def test_every_start_of_every_run_has_a_name_of_its_own(monkeypatch):
    srun = {**BATCH_STEP, "SLURM_STEP_ID": "0"}
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a"}
    by_hand, names = {"RANK": "0", "WORLD_SIZE": "2"}, []
    for variables in (srun, srun | {"SLURM_JOB_ID": "8"}, srun | {"SLURM_STEP_ID": "1"},
                      srun | {"SLURM_RESTART_COUNT": "1"}, torchrun, torchrun | {"TORCHELASTIC_RUN_ID": "b"},
                      torchrun | {"TORCHELASTIC_RESTART_COUNT": "1"}, by_hand):
        set_only(monkeypatch, variables)
        names.append(run_name())
        assert launcher_names_runs() == (variables != by_hand)
        # Equal on all ranks, and on a node of torchrun's that was reached by ssh out of a Slurm job.
        ranks = {"RANK": "1", "SLURM_JOB_ID": "7"} if "RANK" in variables else {"SLURM_PROCID": "1"}
        set_only(monkeypatch, variables | ranks)
        assert run_name() == names[-1]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["STEP_ID", "RESTART_COUNT"])
def test_steps_and_starts_of_a_job_have_ports_of_their_own(monkeypatch, name):
    ports = []
    for job in ("7", "8", "7000000"):
        for count in range(7):
            set_only(monkeypatch, {**BATCH_STEP, "SLURM_STEP_ID": "0", "SLURM_JOB_ID": job,
                                   f"SLURM_{name}": str(count)})
            ports.append(rendezvous_address()[1])
    assert len(set(ports)) == 21
    assert all(20000 <= port < 32768 for port in ports)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "", "http", "9" * 5000])
def test_what_is_no_port_is_refused(monkeypatch, port):
    set_only(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    with pytest.raises(ConfigError, match=f"MASTER_PORT = '{port}' is not a port that ranks can meet at"):
        rendezvous_address()


SRUN = {**BATCH_STEP, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize("variables, expected, known", [
    ({"RANK": "3", "WORLD_SIZE": "8", **SRUN, "SLURM_LOCALID": "1"}, (3, 8, 1), True),  # a wrapper under srun
    ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, 3), False),  # by hand
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (3, 8, 1), True),
    ({"RANK": "3", "WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, (3, 8, 2), True),
    ({"RANK": "3", **SRUN}, (3, 8, 3), True), ({"WORLD_SIZE": "1"}, (0, 1, 0), True),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (1, 2, 1), True),
    ({"SLURM_HET_SIZE": "1", **SRUN}, (3, 8, 3), True)])
def test_local_rank_is_found_where_it_is_not_given(monkeypatch, variables, expected, known):
    set_only(monkeypatch, variables)
    assert launched_rank() == expected
    assert knows_local_rank() == known
    assert process_rank() == expected[0] and first_on_node() == (expected[2] == 0)


@pytest.mark.parametrize("nodes, first", [
    ("node[03-05,9]", "node03"), ("a,b[1-2]", "a"), ("rack[1-2]node[01-04],x", "rack1node01"),
    ("n[01-02]-ib", "n01-ib")])
def test_the_first_node_of_slurm_has_its_whole_name(monkeypatch, nodes, first):
    set_only(monkeypatch, {**SRUN, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes})
    assert rendezvous_address()[0] == first


@pytest.mark.parametrize("variables, words", [
    ({"RANK": "", "WORLD_SIZE": ""}, "RANK = ''"), ({"RANK": "worker-3", "WORLD_SIZE": "8"}, "RANK = 'worker-3'"),
    ({"RANK": "9" * 5000, "WORLD_SIZE": "8"}, "RANK = '99"),
    ({"RANK": "-1", "WORLD_SIZE": "8"}, "RANK = '-1'"), ({"RANK": "3", "WORLD_SIZE": ""}, "WORLD_SIZE = ''"),
    ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK = 8 and WORLD_SIZE = 8"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE = 0"),
    ({"RANK": "\u0663", "WORLD_SIZE": "8"}, "RANK = "), ({"RANK": "1.0", "WORLD_SIZE": "8"}, "RANK = '1.0'"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK = 'x'"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK = ''"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK = 2"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}, "LOCAL_RANK = 5 and WORLD_SIZE = 2"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE = 8 and WORLD_SIZE = 2"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE = 0 and WORLD_SIZE = 2"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a:29500", "MASTER_PORT": "29500"}, "MASTER_ADDR = 'a:29500'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": " a", "MASTER_PORT": "29500"}, "MASTER_ADDR = ' a'"),
    ({"RANK": "3"}, "RANK = '3' without WORLD_SIZE"), ({"WORLD_SIZE": "8"}, "WORLD_SIZE = '8' without RANK"),
    ({**SRUN, "SLURM_PROCID": "8"}, "SLURM_PROCID = 8 and SLURM_NTASKS = 8: ranks count from 0"),
    ({**SRUN, "SLURM_NTASKS": "1"}, "SLURM_PROCID = 3 and SLURM_NTASKS = 1"),
    ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, "SLURM_PROCID = 3 without SLURM_NTASKS"),
    ({"SLURM_PROCID": "3"}, "SLURM_PROCID = 3 outside of a step of srun"),
    ({**BATCH_STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID = 'x'"),
    ({"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK = 2 without OMPI_COMM_WORLD_SIZE"),
    ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "OMPI_COMM_WORLD_RANK = 2 and"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set"),
    ({**SRUN, "SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE = 2: a heterogeneous job"),
    ({**SRUN, "SLURM_NTASKS": "many"}, "SLURM_NTASKS = 'many'"),
    ({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK = 'x'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "0x50"}, "MASTER_PORT = '0x50'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set")])
def test_odd_variables_are_a_sentence_and_exit_code_2(monkeypatch, capsys, variables, words):
    """The error of the command line as a whole, before any library is loaded."""
    set_only(monkeypatch, variables)
    assert main(["encode", "--model", "absent", "--input", "absent.jsonl", "--output", "out.npy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-embed: error: ") and words in line and "absent" not in line


@pytest.mark.parametrize("local, visible, known, index", [
    (0, 1, True, 0), (3, 1, True, 0), (3, 8, True, 3), (3, 1, False, 0), (5, 4, False, 1), (8, 8, True, None),
    (1, 0, True, None)])
def test_device_is_one_of_those_that_are_visible(local, visible, known, index):
    if index is None:
        with pytest.raises(ConfigError, match=f"LOCAL_RANK = {local}, .*{visible} GPUs are visible"):
            device_of(local, visible, is_known=known)
    else:
        assert device_of(local, visible, is_known=known) == index


def groups_of_calls(*layouts):
    """Number of groups that torch keeps after each call, and whether the call returned the topology before it."""
    import torch.distributed as dist

    from megatron_embed.parallel.topology import initialize

    counts, same, before = [], [], None
    for layout in layouts:
        topology = initialize(ParallelConfig(**layout))
        dist.all_reduce(torch.ones(1), group=topology.groups.tp)
        counts.append(len(dist.distributed_c10d._world.pg_map))
        same.append(topology is before)
        before = topology
    return counts, same


def test_a_second_model_of_the_same_layout_takes_the_groups_of_the_first():
    tp, dp = {"tensor_model_parallel_size": 2}, {}
    pipeline = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    for counts, same in run_on_ranks(groups_of_calls, 2, tp, tp, dp, dp, tp, pipeline, pipeline):
        assert same == [False, True, False, True, False, False, False]
        assert counts[0] == counts[1] < counts[2] == counts[3] < counts[4]
