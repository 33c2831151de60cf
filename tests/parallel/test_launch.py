"""Rank and world size from the launcher's variables, and what is none."""

import pytest

from megatron_embed.parallel.launch import launched_rank, rendezvous_address, source_of_world_size

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
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT", *BATCH_STEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == expected
    if expected[1] > 1:
        assert source_of_world_size() == ("torchrun's WORLD_SIZE" if "RANK" in variables else "srun's SLURM_NTASKS")
        assert rendezvous_address() == ("node03", 20049)
