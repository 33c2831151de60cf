"""An environment without the variables of a launcher."""

import pytest

from megatron_embed.platform import status


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", status.STATUS_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
