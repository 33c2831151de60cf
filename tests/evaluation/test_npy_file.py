"""Files of vectors that other people wrote: their headers are bounded before numpy reads them."""

import os
import tracemalloc

import numpy as np
import pytest

from megatron_embed.errors import ConfigError
from megatron_embed.evaluation import vector_cache
from megatron_embed.evaluation.npy_file import map_npy
from megatron_embed.evaluation.vector_files import VectorFile


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_is_read(tmp_path, version):
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, rows, version=version)
    assert np.array_equal(map_npy(str(tmp_path / "a.npy")), rows)


def test_a_long_header_takes_no_memory(tmp_path):
    """numpy reads it whole before it compares its length with a limit."""
    file = tmp_path / "a.npy"
    file.write_bytes(b"\x93NUMPY\x02\x00" + (1 << 29).to_bytes(4, "little"))
    os.truncate(file, 1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="not a .npy file of numbers"):
            VectorFile(str(file), "--vectors", similarity="dot")
        assert vector_cache._open(file, 2) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_archive_of_arrays_is_no_file_of_vectors(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, np.zeros((2, 3), np.float32))
    with pytest.raises(ConfigError, match="not a .npy file of numbers"):
        VectorFile(str(tmp_path / "a.npy"), "--vectors", similarity="dot")
    assert vector_cache._open(tmp_path / "a.npy", 2) is None
