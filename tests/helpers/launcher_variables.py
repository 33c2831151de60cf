"""Helpers of tests/test_main.py and other tests."""

import pytest

from megatron_embed.platform import status


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", status.STATUS_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
