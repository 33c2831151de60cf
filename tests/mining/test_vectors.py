"""Mining by vectors equals Sentence Transformers' `mine_hard_negatives` on the same vectors and options."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_embed.errors import ConfigError
from megatron_embed.mining.dense import mine_vectors
from megatron_embed.mining.filters import MiningOptions
from megatron_embed.mining.task import build_task
from tests.helpers.given_vectors import CORPUS, GivenVectors, record, rows, theirs, vector
from tests.helpers.mining_runs import corpus_of
from tests.helpers.ranks import REPOSITORY, run_on_ranks


def ours(records, corpus, *, block=17, **options):
    task = build_task(records, [""] * len(records), None if corpus is None else corpus_of(corpus))
    queries, documents = (torch.from_numpy(GivenVectors().encode_document(texts, normalize_embeddings=True))
                          for texts in (task.queries, task.documents))
    mined = mine_vectors(queries, documents.split(block), task.positives, MiningOptions(**options))
    for query, result in enumerate(mined):
        expected = documents[task.positives[query]] @ queries[query]
        torch.testing.assert_close(torch.tensor(result.positive_scores), expected)
        for document, score in result.negatives:
            assert score == pytest.approx(float(documents[document] @ queries[query]), abs=1e-6)
    return {task.queries[query]: [task.documents[document] for document, _ in result.negatives]
            for query, result in enumerate(mined) if result.negatives}


OPTIONS = {
    "defaults": {},
    "five": {"num_negatives": 5},
    "range": {"range_min": 2, "range_max": 9, "num_negatives": 4},
    "only as deep as the positives": {"range_max": 3},
    "max score": {"max_score": 0.3},
    "min score": {"min_score": 0.2, "num_negatives": 20},
    "both scores": {"max_score": 0.5, "min_score": 0.1, "num_negatives": 8},
    "absolute margin": {"absolute_margin": 0.1},
    "relative margin": {"relative_margin": 0.05, "num_negatives": 6},
    "all": {"relative_margin": 0.1, "absolute_margin": 0.05, "max_score": 0.6, "min_score": -0.1, "range_min": 1,
            "num_negatives": 4},
    "deeper than the corpus": {"range_max": 5000, "num_negatives": 100},
}


@pytest.mark.parametrize("corpus", [None, CORPUS], ids=["own documents", "corpus"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_mine_hard_negatives(name, corpus, monkeypatch):
    monkeypatch.setattr("megatron_embed.evaluation.search.DOCUMENTS_PER_CHUNK", 5)
    records, options = rows(), OPTIONS[name]
    expected, mined = theirs(records, corpus, **options), ours(records, corpus, **options)
    assert len(expected) > 4 and sum(map(len, expected.values())) > 10
    assert mined == expected


def test_margins_are_right_for_negative_scores():
    """The lowest positive is dissimilar: below its score, not above it."""
    records = [record("q1", ("d1.0", "d30.1")), *rows()[5:]]
    task = build_task(records, [""] * len(records), corpus_of(CORPUS))
    query, positives = vector("q1"), [vector(task.documents[document]) for document in task.positives[0]]
    lowest = min(float(query @ other) / np.linalg.norm(query) / np.linalg.norm(other) for other in positives)
    assert lowest < -0.05
    options = {"relative_margin": 0.5, "num_negatives": 10, "range_max": 300}
    assert ours(records, CORPUS, **options) == theirs(records, CORPUS, **options)


def test_positives_are_never_mined_whatever_row_names_them():
    records = [record("q1", ("d1.0",)), record("q1", ("d1.1",), instruction="other"), record("q2", ("d2.0",))]
    corpus = ["d1.0", "d1.1", "d1.2", "d1.1", "d2.0"]
    task = build_task(records, ["", "other: ", ""], corpus_of(corpus))
    assert list(task.documents) == ["d1.0", "d1.1", "d1.2", "d2.0"]
    assert task.queries == ["q1", "other: q1", "q2"]
    assert task.positives == [[0, 1], [0, 1], [3]]
    queries = documents = torch.eye(4)
    mined = mine_vectors(queries[:3], [documents], task.positives, MiningOptions(num_negatives=9))
    assert [sorted(document for document, _ in result.negatives) for result in mined] == [[2, 3], [2, 3], [0, 1, 2]]


def test_negatives_of_the_rows_are_documents_unless_a_corpus_is_given():
    records = [record("q1", ("d1.0",), negatives=("d1.1",)), record("q2", ("d2.0",))]
    assert list(build_task(records, ["", ""], None).documents) == ["d1.0", "d2.0", "d1.1"]
    assert list(build_task(records, ["", ""], corpus_of(["d9.0"])).documents) == ["d9.0", "d1.0", "d2.0"]


def test_random_sampling_draws_from_the_same_candidates():
    options = {"max_score": 0.6, "range_min": 1, "range_max": 12}
    allowed = ours(rows(), CORPUS, num_negatives=11, **options)
    drawn = {seed: ours(rows(), CORPUS, num_negatives=3, sampling="random", seed=seed, **options) for seed in (1, 2)}
    assert drawn[1] == ours(rows(), CORPUS, block=50, num_negatives=3, sampling="random", seed=1, **options)
    assert drawn[1] != drawn[2]
    for query, negatives in drawn[1].items():
        places = [allowed[query].index(text) for text in negatives]
        assert places == sorted(set(places)) and len(places) == 3
    assert len({places for query, negatives in drawn[1].items() for places in map(allowed[query].index, negatives)}) > 8


@pytest.mark.parametrize("options, words", [
    ({"num_negatives": 0}, "--num-negatives 0: must be at least 1"),
    ({"range_min": -1}, "--range-min -1: must be at least 0"),
    ({"absolute_margin": -0.1}, "--absolute-margin -0.1: must be at least 0"),
    ({"relative_margin": float("nan")}, "--relative-margin nan"),
    ({"max_score": 0.1, "min_score": 0.2}, "--min-score 0.2 is above --max-score 0.1"),
    ({"range_min": 5, "range_max": 7}, "--range-max 7 leaves no room for --range-min 5 and --num-negatives 3; raise it "
                                       "to 8"),
])
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        MiningOptions(**options)


def mined_on_this_rank():
    import torch.distributed as dist

    task = build_task(rows(), [""] * len(rows()), corpus_of(CORPUS))
    queries, documents = (torch.from_numpy(GivenVectors().encode_document(texts, normalize_embeddings=True))
                          for texts in (task.queries, task.documents))
    return mine_vectors(queries, documents.split(50), task.positives,
                        MiningOptions(max_score=0.6, sampling="random"), group=dist.group.WORLD)


def test_ranks_share_the_queries():
    one, (first, second, third) = run_on_ranks(mined_on_this_rank, 1)[0], run_on_ranks(mined_on_this_rank, 3)
    assert second is None and third is None
    assert len(one) == 40 and any(result.negatives for result in one)
    for alone, shared in zip(one, first, strict=True):
        assert [document for document, _ in alone.negatives] == [document for document, _ in shared.negatives]
        assert alone.positive_scores == pytest.approx(shared.positive_scores, abs=1e-6)


@pytest.mark.slow
def test_memory_is_the_vectors_and_one_chunk():
    arguments = [sys.executable, "tools/bench_mining.py", "--vectors", "20000", "--dim", "64", "--chunk", "4096"]
    report = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout)
    # A chunk of scores in float32, their signs, their keys in int64; beside it what was found: keys, later 12 bytes.
    chunk = 512 * (4096 + 50) * (4 + 4 + 8) / 2**20
    assert report["vectors_mib"] == pytest.approx(2 * 20000 * 64 * 4 / 2**20)
    assert report["peak_beyond_vectors_mib"] < chunk + 20
