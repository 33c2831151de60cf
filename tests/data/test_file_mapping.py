"""Memory maps without an open file: they live as long as an array of them, and end with it."""

import gc
from pathlib import Path

import numpy as np
import pytest

from megatron_embed.data.file_mapping import map_file

DTYPE = np.dtype("<i8")


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_map_lives_as_long_as_an_array_of_it(tmp_path: Path):
    path = tmp_path / "numbers.bin"
    np.arange(1000, dtype=DTYPE).tofile(path)
    with path.open("rb") as file:
        numbers = map_file(file, DTYPE)
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 1
    part = numbers[10:20]
    del numbers
    gc.collect()
    assert is_mapped(path) and part.tolist() == list(range(10, 20))
    del part
    gc.collect()
    assert not is_mapped(path)


def test_what_cannot_be_mapped(tmp_path: Path):
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert map_file(file, DTYPE).shape == (0,)
    (tmp_path / "cut").write_bytes(b"1234567")
    with (tmp_path / "cut").open("rb") as file, pytest.raises(ValueError, match="cut: 7 bytes"):
        map_file(file, DTYPE)
    (tmp_path / "whole").write_bytes(b"12345678")
    with (tmp_path / "whole").open("wb") as file:
        file.write(bytes(8))
        file.flush()
        with pytest.raises(PermissionError):
            map_file(file, DTYPE)
