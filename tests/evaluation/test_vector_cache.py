"""The cache's digest of a model covers every file that affects its vectors."""

import pytest

from megatron_embed.evaluation.vector_cache import model_digest


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
