"""FAISS over a file of vectors: the exact index ranks as `evaluate` does; the graph is kept."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_embed.errors import ConfigError, DataError
from megatron_embed.evaluation import vector_files, vector_index
from megatron_embed.evaluation.search import for_similarity, search
from megatron_embed.evaluation.vector_files import VectorFile
from megatron_embed.evaluation.vector_index import (
    HnswSettings,
    flat_index,
    hnsw_index,
    recall_of,
    search_index,
)

faiss = pytest.importorskip("faiss")
ROWS, DIM = 600, 24


@pytest.fixture
def rows():
    return np.random.default_rng(5).standard_normal((ROWS, DIM)).astype(np.float32)


def saved(folder, rows, similarity="cosine", width=None):
    np.save(folder / "vectors.npy", rows)
    return VectorFile(str(folder / "vectors.npy"), "--vectors", similarity=similarity, width=width)


def queries_of(vectors, count=20):
    return vectors.scaled(torch.from_numpy(np.random.default_rng(6).standard_normal((count, DIM)).astype(np.float32)))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("width", [None, 8])
def test_flat_ranks_as_evaluate(tmp_path, rows, similarity, width, monkeypatch):
    monkeypatch.setattr(vector_files, "ROWS_AT_ONCE", 256)
    vectors = saved(tmp_path, rows * np.linspace(0.5, 2, ROWS, dtype=np.float32)[:, None], similarity, width)
    queries = queries_of(vectors)
    scores, found = search_index(flat_index(vectors), queries, 10, np.arange(ROWS), exact=True)
    documents = for_similarity(torch.from_numpy(np.load(vectors.path)[:, :width]), similarity)
    expected_scores, expected = search(queries, documents, 10)
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(scores, expected_scores.numpy(), rtol=1e-5, atol=1e-6)


def test_equal_scores_are_in_evaluates_order_at_the_cutoff_too(tmp_path):
    vectors = saved(tmp_path, np.repeat(np.eye(3, dtype=np.float32), [2, 90, 3], axis=0))
    queries = torch.tensor([[0.1, 0.9, 0.0]])
    _, found = search_index(flat_index(vectors), queries, 5, np.arange(95), exact=True)
    assert found.tolist() == search(queries, torch.from_numpy(np.load(vectors.path)), 5)[1].tolist() == [[
        91, 90, 89, 88, 87]]
    by_name = np.arange(95)[::-1].copy()  # ids that descend along the file
    _, found = search_index(flat_index(vectors), queries, 5, by_name, exact=True)
    assert found.tolist() == [[2, 3, 4, 5, 6]]


def test_more_hits_than_rows(tmp_path, rows):
    vectors = saved(tmp_path, rows[:4])
    _, found = search_index(flat_index(vectors), queries_of(vectors, 1), 10, np.arange(4), exact=True)
    assert sorted(found[0].tolist()) == [0, 1, 2, 3]


def built(monkeypatch):
    """Counts the graphs that are built from now on."""
    built, original = [], faiss.IndexHNSWFlat

    def index(*args):
        built.append(args)
        return original(*args)

    monkeypatch.setattr(faiss, "IndexHNSWFlat", index)
    return built


def test_graph_is_kept_until_vectors_or_settings_change(tmp_path, rows, monkeypatch):
    count = built(monkeypatch)
    vectors, settings = saved(tmp_path, rows), HnswSettings(ef_construction=40)
    first = search_index(hnsw_index(vectors, settings), queries_of(vectors), 10, np.arange(ROWS), exact=False)
    again = search_index(hnsw_index(vectors, settings), queries_of(vectors), 10, np.arange(ROWS), exact=False)
    assert len(count) == 1 and first[1].tolist() == again[1].tolist()
    hnsw_index(vectors, HnswSettings(ef_construction=40, ef_search=7))  # of the query alone
    assert len(count) == 1
    hnsw_index(vectors, HnswSettings(ef_construction=41))
    assert len(count) == 2
    changed = saved(tmp_path, rows[::-1].copy())
    _, found = search_index(hnsw_index(changed, HnswSettings(ef_construction=41)), queries_of(changed), 1,
                            np.arange(ROWS), exact=False)
    assert len(count) == 3 and found.tolist() == (ROWS - 1 - first[1][:, :1]).tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "vectors.npy", f"vectors.npy.hnsw-{DIM}.faiss", f"vectors.npy.hnsw-{DIM}.faiss.json"]


@pytest.mark.parametrize("damage", ["short", "other bytes", "no description", "description"])
def test_damaged_graph_is_built_again(tmp_path, rows, monkeypatch, damage):
    vectors, settings = saved(tmp_path, rows), HnswSettings(ef_construction=40)
    hnsw_index(vectors, settings)
    index = Path(f"{vectors.path}.hnsw-{DIM}.faiss")
    content = index.read_bytes()
    if damage == "short":
        index.write_bytes(content[:-1])
    elif damage == "other bytes":
        index.write_bytes(b"\0" * len(content))
    elif damage == "no description":
        Path(f"{index}.json").unlink()
    else:
        Path(f"{index}.json").write_text("{")
    count = built(monkeypatch)
    assert hnsw_index(vectors, settings).ntotal == ROWS and len(count) == 1
    assert index.read_bytes() == content and json.loads(Path(f"{index}.json").read_text())["rows"] == ROWS


@pytest.mark.parametrize("kind", [
    "reversed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flat", "narrow", "links elsewhere",
                                                                          "no links"))])
def test_another_index_with_a_fitting_description_is_built_again(tmp_path, rows, monkeypatch, kind):
    vectors, settings = saved(tmp_path, rows), HnswSettings(ef_construction=40)
    good = hnsw_index(vectors, settings)
    path = f"{vectors.path}.hnsw-{DIM}.faiss"
    scaled = vectors.scaled(torch.from_numpy(rows)).numpy()
    other = {"flat": faiss.IndexFlatIP(DIM)}.get(kind) or faiss.IndexHNSWFlat(
        7 if kind == "narrow" else DIM, 32, faiss.METRIC_INNER_PRODUCT)
    other.add(np.ascontiguousarray({"reversed": scaled[::-1], "narrow": scaled[:, :7]}.get(kind, scaled)))
    if kind == "links elsewhere":
        neighbors = faiss.vector_to_array(other.hnsw.neighbors)
        neighbors[5] = ROWS
        faiss.copy_array_to_vector(neighbors, other.hnsw.neighbors)
    elif kind == "no links":
        other.hnsw.offsets = faiss.IndexHNSWFlat(DIM, 32).hnsw.offsets
    # Versions of FAISS that read links to nowhere follow them; later ones refuse the file.
    assert vector_index._is_graph_of(good, vectors, 32) and not vector_index._is_graph_of(other, vectors, 32)
    faiss.write_index(other, path)
    description = json.loads(Path(f"{path}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps({**description, "digest": vector_index._digest(path)}))
    count = built(monkeypatch)
    again = hnsw_index(vectors, settings)
    assert len(count) == 1
    queries = queries_of(vectors)
    assert search_index(again, queries, 5, np.arange(ROWS), exact=False)[1].tolist() == search_index(
        good, queries, 5, np.arange(ROWS), exact=False)[1].tolist()


def test_recall(tmp_path, rows):
    vectors = saved(tmp_path, rows)
    queries = queries_of(vectors)
    scores, found = search_index(flat_index(vectors), queries, 10, np.arange(ROWS), exact=True)
    assert recall_of(scores, queries, vectors) == 1
    assert recall_of(np.where(np.arange(10) < 7, scores, -1), queries, vectors) == pytest.approx(0.7)
    graph = hnsw_index(vectors, HnswSettings(links=4, ef_construction=8, ef_search=10))
    rough, approximate = search_index(graph, queries, 10, np.arange(ROWS), exact=False)
    shared = np.mean([len({*left} & {*right}) / 10 for left, right in zip(found, approximate, strict=True)])
    assert recall_of(rough, queries, vectors) == pytest.approx(shared) and shared < 1


@pytest.mark.parametrize("rows, words", [
    (np.zeros((2, 3), dtype=np.int64), "holds no vectors"), (np.zeros(3, dtype=np.float32), "holds no vectors"),
    (np.zeros((0, 3), dtype=np.float32), "holds no vectors"), (np.array([object()]), "not a .npy file of numbers")])
def test_other_arrays_are_refused(tmp_path, rows, words):
    with pytest.raises(ConfigError, match=f"--vectors .*vectors.npy: {words}"):
        saved(tmp_path, rows)


def test_vectors_that_are_not_finite_are_refused(tmp_path, rows):
    rows[7, 3] = np.nan
    with pytest.raises(DataError, match="vectors.npy:8: the vector is not finite"):
        flat_index(saved(tmp_path, rows))


def test_width_beyond_the_vectors_is_refused(tmp_path, rows):
    with pytest.raises(ConfigError, match=f"--dim 25: the vectors of .* have {DIM} components"):
        saved(tmp_path, rows, width=25)


def test_missing_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron_embed\[search\]'"):
        vector_index.load_faiss()
