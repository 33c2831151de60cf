"""Inverted lists over vectors on the disk: recall, parts that are gone on with, and vectors in shards."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_embed.errors import ConfigError, DataError
from megatron_embed.evaluation import ivf_index
from megatron_embed.evaluation.ivf_index import IvfIndex, IvfSettings
from megatron_embed.evaluation.search import search
from megatron_embed.evaluation.vector_files import VectorFile
from megatron_embed.evaluation.vector_index import recall_of

pytest.importorskip("faiss")


@pytest.fixture
def clustered(tmp_path: Path) -> VectorFile:
    """3,000 vectors around 60 centres, in three files."""
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(60, 16))
    vectors = centres[generator.integers(0, 60, 3000)] + 0.5 * generator.normal(size=(3000, 16))
    (tmp_path / "vectors").mkdir()
    for shard, (first, last) in enumerate(((0, 1200), (1200, 2000), (2000, 3000))):
        np.save(tmp_path / "vectors" / f"{shard}.npy", vectors[first:last].astype(np.float16))
    return VectorFile(str(tmp_path / "vectors"), "--vectors", similarity="cosine")


def test_rows_of_shards_in_any_order(clustered: VectorFile):
    whole = clustered.rows(0, 3000)
    rows = np.array([2999, 0, 1200, 1199, 5, 2000, 5])
    assert torch.equal(clustered.gather(rows), whole[torch.from_numpy(rows)])
    assert torch.equal(torch.cat(list(clustered.blocks())), clustered.scaled(whole))
    damaged = np.load(f"{clustered.path}/1.npy")
    damaged[7, 0] = np.nan
    np.save(f"{clustered.path}/1.npy", damaged)
    broken = VectorFile(clustered.path, "--vectors", similarity="cosine")
    for read in (lambda: broken.gather(np.array([3, 1207])), lambda: list(broken.blocks())):
        with pytest.raises(DataError, match=r"vectors:1208: the vector is not finite \(1\.npy, row 8\)"):
            read()


def test_parts_are_gone_on_with_and_find_what_exact_search_finds(clustered: VectorFile,
                                                                monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ivf_index, "PART_ROWS", 700)
    queries = clustered.scaled(clustered.gather(np.arange(0, 3000, 60)))
    every = IvfIndex(clustered, IvfSettings(lists=20, probes=20))
    scores, rows = every.search(queries, 10)
    exact_scores, exact_rows = search(queries, clustered.scaled(clustered.rows(0, 3000)), 10)
    assert np.allclose(scores, exact_scores.numpy(), atol=2e-3)  # lists hold float16
    assert (rows[:, 0] == exact_rows[:, 0].numpy()).all() and recall_of(scores + 2e-3, queries, clustered) == 1
    folder = Path(f"{clustered.path}.ivf-16")
    names = sorted(os.listdir(folder))
    assert names == ["000000.faiss", "000001.faiss", "000002.faiss", "000003.faiss", "000004.faiss",
                     "centroids.faiss", "index.json"]
    before = {name: (folder / name).stat().st_mtime_ns for name in names}
    (folder / "000003.faiss").unlink()
    again = IvfIndex(clustered, IvfSettings(lists=20, probes=20))
    changed = [name for name in names if (folder / name).stat().st_mtime_ns != before[name]]
    assert changed == ["000003.faiss"]
    assert all(np.array_equal(one, other) for one, other in zip(again.search(queries, 10), (scores, rows), strict=True))
    few = IvfIndex(clustered, IvfSettings(lists=20, probes=2))
    found = np.mean([len(set(mine) & set(theirs)) for mine, theirs in zip(few.search(queries, 10)[1], rows,
                                                                          strict=True)]) / 10
    assert 0.3 < found < 1
    assert IvfIndex(clustered, IvfSettings()).lists == 64
    assert len(list(folder.glob("0*.faiss"))) == 5
    wide = IvfIndex(clustered, IvfSettings(lists=20, probes=1)).search(queries, 2900)
    assert (wide[1][:, -1] == -1).all() and (wide[1][:, 0] >= 0).all()


def test_vectors_that_overflow_in_the_lists_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the lists are built, by their row; when they are searched, if an earlier version built them."""
    vectors = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    vectors[333, 2] = -70000
    np.save(tmp_path / "vectors.npy", vectors)
    settings, file = IvfSettings(lists=4, probes=4), str(tmp_path / "vectors.npy")
    IvfIndex(VectorFile(file, "--vectors", similarity="cosine"), settings)
    dots = VectorFile(file, "--vectors", similarity="dot")
    with pytest.raises(DataError, match=r"vectors.npy:334: a component of 70000 is too large .* hold float16; choose"):
        IvfIndex(dots, settings)
    monkeypatch.setattr(IvfIndex, "_require_float16", lambda *_: None)
    older = IvfIndex(dots, settings)
    with pytest.raises(ConfigError, match=r"000000.faiss: damaged: it gives scores that are not finite; remove"):
        older.search(torch.tensor([[0.0, 0.0, -1.0, 0.0]]), 3)


def test_a_part_in_the_place_of_another_is_refused(clustered: VectorFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ivf_index, "PART_ROWS", 1000)
    queries = clustered.scaled(clustered.rows(0, 5))
    IvfIndex(clustered, IvfSettings(lists=20)).search(queries, 10)
    folder = Path(f"{clustered.path}.ivf-16")
    shutil.copy(folder / "000000.faiss", folder / "000001.faiss")
    with pytest.raises(ConfigError, match=f"000001.faiss: damaged: it names vectors .* remove {folder}, and it"):
        IvfIndex(clustered, IvfSettings(lists=20)).search(queries, 10)


BUILD = """
import sys
from megatron_embed.evaluation import ivf_index
from megatron_embed.evaluation.ivf_index import IvfIndex, IvfSettings
from megatron_embed.evaluation.vector_files import VectorFile
ivf_index.PART_ROWS = 100
IvfIndex(VectorFile(sys.argv[1], "--vectors", similarity="cosine"), IvfSettings(lists=20))
"""


@pytest.mark.slow
def test_a_killed_build_goes_on_and_ends_as_one_that_was_not(clustered: VectorFile, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch):
    folder = Path(f"{clustered.path}.ivf-16")
    process = subprocess.Popen([sys.executable, "-c", BUILD, clustered.path])
    while len(list(folder.glob("0*.faiss"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    written = {file.name: file.stat().st_mtime_ns for file in folder.glob("0*.faiss")}
    assert 3 <= len(written) < 30
    monkeypatch.setattr(ivf_index, "PART_ROWS", 100)
    queries = clustered.scaled(clustered.rows(0, 50))
    found = IvfIndex(clustered, IvfSettings(lists=20)).search(queries, 20)
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    shutil.rmtree(folder)
    wanted = IvfIndex(clustered, IvfSettings(lists=20)).search(queries, 20)
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
