"""`mine` and `evaluate` over vectors that `encode` wrote: the results without them, exact and by an index."""

import json

import numpy as np
import pytest

from tests.helpers.commands import BEIR, evaluated
from tests.helpers.mining_runs import data, mined, model  # noqa: F401
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command

pytestmark = pytest.mark.slow
pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def vectors(model, tmp_path_factory):
    """Vectors of the corpus of the whole small set."""
    folder = tmp_path_factory.mktemp("vectors") / "shards"
    (result,) = run_on_ranks(command, 1, ["encode", "--model", str(model), "--input", str(BEIR / "corpus.jsonl"),
                                          "--output", str(folder), "--role", "document"])
    assert result[0] == 0, result[2]
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_mined_rows_are_those_of_the_same_vectors_computed(model, data, vectors, ranks, tmp_path):
    arguments = ["--model", model, "--data", data, "--corpus", BEIR / "corpus.jsonl", "--relative-margin", "0.001"]
    plain, given, ivf, hnsw = (tmp_path / f"{name}.jsonl" for name in ("plain", "given", "ivf", "hnsw"))
    mined([*arguments, "--output", plain], ranks)
    mined([*arguments, "--output", given, "--vectors", vectors], ranks)
    wanted, result = rows(plain), rows(given)
    assert [row["negatives"] for row in result] == [row["negatives"] for row in wanted]
    for mine, theirs in zip(result, wanted, strict=True):
        assert np.allclose(mine["teacher_scores"], theirs["teacher_scores"], atol=1e-5)
    for kind, file, further in (("ivf", ivf, ["--probes", "1000"]), ("hnsw", hnsw, ["--ef-search", "400"])):
        mined([*arguments, "--output", file, "--vectors", vectors, "--index", kind, *further], ranks)
        same = np.mean([mine["negatives"] == theirs["negatives"] for mine, theirs in zip(rows(file), wanted,
                                                                                         strict=True)])
        assert same > 0.8, (kind, same)  # float16 in the lists may exchange two neighbours
        for mine, theirs in zip(rows(file), wanted, strict=True):
            assert np.allclose(mine["teacher_scores"][:len(mine["positive"])],
                               theirs["teacher_scores"][:len(mine["positive"])], atol=1e-5)


def test_metrics_are_those_of_the_same_vectors_computed(model, vectors):
    arguments = ["--model", str(model), "--data", str(BEIR)]
    plain = evaluated([*arguments, "--dims", "8"], 1)
    assert evaluated([*arguments, "--dims", "8", "--vectors", str(vectors)], 2) == pytest.approx(plain, abs=1e-6)
    for further in (["--index", "ivf", "--probes", "1000"], ["--index", "hnsw", "--ef-search", "1000"]):
        found = evaluated([*arguments, "--vectors", str(vectors), *further], 2)
        assert found["ndcg@10"] == pytest.approx(plain["ndcg@10"], abs=0.02)
        assert found["recall@100"] == pytest.approx(plain["recall@100"], abs=0.02)


def test_what_does_not_fit_is_refused(model, data, vectors, tmp_path):
    mine = ["mine", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out.jsonl")]
    evaluate = ["evaluate", "--model", str(model), "--data", str(BEIR)]
    few = tmp_path / "few.npy"
    np.save(few, np.load(vectors / "000000.npy")[:10])
    for arguments, message in (
            ([*mine, "--vectors", str(vectors)], "are those of the documents of --corpus; name that file too"),
            ([*mine, "--index", "ivf"], "--index ivf: searches vectors that are on the disk; write them with"),
            ([*evaluate, "--vectors", str(vectors), "--probes", "3"], "--probes 3: has no effect without --index ivf"),
            ([*evaluate, "--vectors", str(few)], "10 vectors for the "),
            ([*evaluate, "--vectors", str(vectors), "--index", "ivf", "--dims", "8"], "--dims: compares parts of"),
            ([*evaluate, "--vectors", str(tmp_path)], "name what `megatron-embed encode` wrote")):
        if "name what" in message:
            few.unlink()
        assert_refused(run_on_ranks(command, 1, arguments), message)
