"""The cache's digest of a model covers every file that affects its vectors."""

import numpy as np
import pytest

from megatron_embed.errors import DataError
from megatron_embed.evaluation.vector_cache import VectorCache, model_digest


@pytest.fixture
def model(tmp_path):
    """A directory with a link to its pooling, and a link back to itself."""
    (tmp_path / "model").mkdir()
    (tmp_path / "pooling").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "pooling" / "config.json").write_text("mean")
    (tmp_path / "model" / "1_Pooling").symlink_to(tmp_path / "pooling")
    (tmp_path / "model" / "again").symlink_to(tmp_path / "model")
    return tmp_path / "model"


def test_files_behind_links_count(model):
    before = model_digest([model])
    assert model_digest([model]) == before
    (model.parent / "pooling" / "config.json").write_text("last")
    assert model_digest([model]) != before


def test_cached_vectors_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    """Where they are read: file, row and remedy."""
    monkeypatch.setattr("megatron_embed.evaluation.vector_cache.smallest", lambda value: value)
    monkeypatch.setattr("megatron_embed.evaluation.vector_cache.raise_on_all_ranks", lambda error: None)
    vectors = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    cache = VectorCache(tmp_path, rank=0)
    np.save(tmp_path / "a.npy", vectors)
    assert np.array_equal(np.concatenate(list(cache.blocks("a.npy", 5000, list))), vectors)
    chosen = np.array([4999, 3, 4999])
    assert np.array_equal(cache.on_disk("a.npy", 5000, list).rows(chosen), vectors[chosen])
    vectors[4500, 1] = np.inf
    np.save(tmp_path / "a.npy", vectors)
    refused = pytest.raises(DataError, match=r"a.npy:4501: the vector is not finite, .*; remove it, and the vec")
    with refused:
        list(cache.blocks("a.npy", 5000, list))
    on_disk = cache.on_disk("a.npy", 5000, list)
    assert on_disk.dim == 4 and len(on_disk.rows(chosen)) == 3
    with refused:
        on_disk.rows(np.array([4999, 4500]))


def test_what_decides_nothing_does_not_count(model):
    before = model_digest([model])
    (model / "README.md").write_text("a model")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock.json").write_text("")
    assert model_digest([model]) == before


def test_every_directory_counts_and_its_place(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with_adapter = model_digest([model, adapter])
    assert len({model_digest([model]), model_digest([adapter]), with_adapter, model_digest([adapter, model])}) == 4
    (adapter / "adapter_config.json").write_text("[]")
    assert model_digest([model, adapter]) != with_adapter
