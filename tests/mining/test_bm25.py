"""BM25 negatives are the library's ranking, over tokens of any script."""

import json

import bm25s
import numpy as np
import pytest

from megatron_embed.data.dataset import RecordFile
from megatron_embed.mining.bm25 import bm25_tokens, mine_bm25
from megatron_embed.mining.filters import MiningOptions
from megatron_embed.mining.task import build_task
from tests.helpers.given_vectors import record
from tests.helpers.mining_runs import corpus_of
from tests.helpers.ranks import REPOSITORY

MINI = REPOSITORY / "examples" / "data"


@pytest.mark.parametrize("text, tokens", [
    ("Hello, the WORLD's 2nd test_case", ["hello", "the", "world", "s", "2nd", "test_case"]),
    ("北京大学的历史", ["北京", "京大", "大学", "学的", "的历", "历史"]),
    ("東京タワーへ行く", ["東京", "京タ", "タワ", "ワー", "ーへ", "へ行", "行く"]),
    ("用Python写的 书", ["用", "python", "写的", "书"]),
    ("ｆｕｌｌ Straße ﬁne", ["full", "strasse", "fine"]),
    ("한국어 검색", ["한국", "국어", "검색"]),
    ("𠮷野家", ["𠮷野", "野家"]),
    ("?! ...", []),
])
def test_tokens(text, tokens):
    assert bm25_tokens(text) == tokens


def library_ranking(task):
    """For each query: documents and scores of bm25s, best first, zeros left out."""
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([bm25_tokens(text) for text in task.documents], show_progress=False)
    documents, scores = index.retrieve([bm25_tokens(text) for text in task.queries], k=len(task.documents),
                                       show_progress=False, backend_selection="numpy")
    return [[(int(d), float(s)) for d, s in zip(row, values, strict=True) if s > 0]
            for row, values in zip(documents, scores, strict=True)]


@pytest.mark.parametrize("language", ["mini_en", "mini_zh"])
def test_equals_the_ranking_of_the_library(language):
    records = list(RecordFile(str(MINI / language / "train.jsonl")))[:150]
    task = build_task(records, [""] * len(records), None)
    mined = mine_bm25(task, MiningOptions(num_negatives=4, range_min=1))
    found_first = 0
    for query, ranking in enumerate(library_ranking(task)):
        scores = dict(ranking)
        assert mined[query].positive_scores == pytest.approx(
            [scores.get(document, 0.0) for document in task.positives[query]], rel=1e-6)
        expected = [score for document, score in ranking if document not in task.positives[query]][1:5]
        # Equal scores may come in any order, so the scores are compared, and each with its document.
        assert [score for _, score in mined[query].negatives] == pytest.approx(expected, rel=1e-6)
        assert all(scores[document] == pytest.approx(score) for document, score in mined[query].negatives)
        assert not {document for document, _ in mined[query].negatives} & set(task.positives[query])
        found_first += ranking[0][0] in task.positives[query]
    assert found_first > 0.6 * len(task.queries)  # the tokens of both languages do find the positives


def test_margins_use_the_positive_s_own_score():
    records = [record("red apple pie", ("a red apple",)), record("blue car", ("a blue car",))]
    task = build_task(records, ["", ""],
                      corpus_of(["red apple pie recipe", "apple", "a car", "nothing at all"]))
    everything = mine_bm25(task, MiningOptions(num_negatives=9))[0]
    assert {task.documents[document] for document, _ in everything.negatives} == {"red apple pie recipe", "apple"}
    close = mine_bm25(task, MiningOptions(num_negatives=9, relative_margin=0.0))[0]
    assert [task.documents[document] for document, _ in close.negatives] == ["apple"]


def test_texts_without_words():
    records = [record("?!", ("...",)), record("car", ("a car",))]
    mined = mine_bm25(build_task(records, ["", ""], None), MiningOptions())
    assert mined[0].positive_scores == [0.0] and mined[0].negatives == []
    assert np.isfinite(mined[1].positive_scores[0]) and mined[1].negatives == []
    json.dumps([result.positive_scores for result in mined])
