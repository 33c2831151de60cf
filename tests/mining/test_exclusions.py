"""Other forms of a positive are never its query's negatives: the same id, the same text, a title more or less."""

import json
from pathlib import Path

import pytest
import torch

from megatron_embed.__main__ import main
from megatron_embed.config.data import TrainFile
from megatron_embed.data.dataset import RecordFile, open_records
from megatron_embed.errors import DataError
from megatron_embed.mining.bm25 import mine_bm25
from megatron_embed.mining.dense import mine_vectors
from megatron_embed.mining.documents import CorpusFile
from megatron_embed.mining.filters import MiningOptions
from megatron_embed.mining.task import build_task

FOX, PARIS = "The quick fox jumps over the lazy dog", "Paris is the capital of France"
CORPUS = [{"_id": "d1", "title": "Fox", "text": FOX}, {"_id": "d2", "title": "France", "text": PARIS},
          {"_id": "d3", "title": "Germany", "text": "Berlin is the capital of Germany"},
          {"_id": "d4", "title": "Italy", "text": "Rome is the capital of Italy"},
          {"_id": "d5", "title": "", "text": "which animal jumps over the dog"},
          {"_id": "d6", "title": "", "text": "the quick fox jumps over the lazy dog."}]
ROWS = [{"query": "which animal jumps over the dog", "positive": [FOX], "positive_ids": ["d1"]},
        {"query": "capital of France", "positive": [PARIS], "positive_ids": ["d2"]}]
CAPITALS = ["capital of Italy", "capital of Spain"]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def mined(tmp_path, rows, corpus, **options):
    """The texts mined for the first row's query, of all documents that share a word with it."""
    records = list(RecordFile(write(tmp_path / "rows.jsonl", rows)))
    there = None if corpus is None else CorpusFile(write(tmp_path / "corpus.jsonl", corpus))
    task = build_task(records, [""] * len(records), there, **options)
    result = mine_bm25(task, MiningOptions(num_negatives=len(task.documents)))[0]
    return [task.documents[document] for document, _ in result.negatives]


def test_the_case_as_it_was_reported(tmp_path, capsys):
    """Query 2's own positive (id d2, with its title) was its first negative."""
    output = tmp_path / "mined.jsonl"
    arguments = ["mine", "--model", "bm25", "--data", write(tmp_path / "rows.jsonl", ROWS), "--corpus",
                 write(tmp_path / "corpus.jsonl", CORPUS), "--num-negatives", "2", "--output", str(output)]
    assert main(arguments) == 0, capsys.readouterr().err
    fox, paris = (json.loads(line) for line in output.read_text().splitlines())
    assert (fox["negative_ids"][0], sorted(paris["negative_ids"])) == ("d6", ["d3", "d4"])
    assert ROWS[0]["query"] not in fox["negatives"]
    assert main([*arguments, "--mine-query-text"]) == 0
    fox = json.loads(output.read_text().splitlines()[0])
    assert fox["negatives"][0] == ROWS[0]["query"] and fox["negative_ids"][0] == "d5"
    RecordFile(str(output))


ROW = {"query": "capital of France", "positive": [PARIS]}
OTHERS = [{"_id": row_id, "text": text} for row_id, text in enumerate(CAPITALS, 100)]


@pytest.mark.parametrize("rows, corpus", [
    # An id that is a number here and text there, under each of its keys.
    ([{**ROW, "positive_ids": [7]}], [{"_id": "7", "text": "France and its capital"}]),
    ([{**ROW, "positive_ids": ["7"]}], [{"docid": 7, "text": "France and its capital"}]),
    ([{**ROW, "positive_ids": ["7"]}], [{"id": 7, "title": "France", "text": "its capital"}]),
    # Several positives, of several rows with one query.
    ([{**ROW, "positive": [PARIS, "Lutetia"], "positive_ids": ["1", "7"]}], [{"_id": "7", "text": "capital France"}]),
    ([ROW, {**ROW, "positive": ["Lutetia"], "positive_ids": ["7"]}], [{"_id": "7", "text": "the capital of Gaul"}]),
    # The text without the title that the corpus gives it, with another line break, and under another id.
    ([ROW], [{"_id": "7", "title": "France", "text": PARIS}]),
    ([{**ROW, "positive": [f"France\n{PARIS}"]}], [{"_id": "7", "title": "France", "text": PARIS}]),
    ([{**ROW, "positive": [f"France {PARIS}"]}],
     [{"_id": "7", "title": "France", "text": PARIS}, {"_id": "8", "text": PARIS}]),
    ([{**ROW, "positive_ids": ["7"]}],
     [{"_id": "7", "title": "La", "text": "capital city"}, {"_id": "8", "text": "La  capital city"},
      {"_id": "9", "text": "capital city"}]),
    # The query itself.
    ([ROW], [{"_id": "7", "text": "capital of  France"}, {"_id": "8", "title": "capital", "text": "of France"}]),
])
def test_other_forms_of_a_positive_are_left_out(tmp_path, rows, corpus):
    assert sorted(mined(tmp_path, rows, [*corpus, *OTHERS])) == CAPITALS


def test_a_common_text_under_other_titles_is_another_document(tmp_path):
    corpus = [{"_id": "1", "title": "France", "text": "capital: see below"},
              {"_id": "2", "title": "Spain", "text": "capital: see below"}]
    rows = [{**ROW, "positive": ["France capital: see below"], "positive_ids": ["1"]}]
    assert mined(tmp_path, rows, corpus) == ["Spain capital: see below"]
    rows = [{**ROW, "positive": ["capital: see below"], "positive_ids": ["3"]}]  # and ids that differ say so
    assert mined(tmp_path, rows, corpus) == ["Spain capital: see below", "France capital: see below"][::-1]


def test_ids_of_other_rows_count_without_a_corpus(tmp_path):
    """Tevatron's rows, one passage of which has no id: the others' count all the same."""
    rows = [{"query": "capital of France", "positive_passages": [{"docid": 7, "text": PARIS}], "negative_passages": []},
            {"query": "x", "positive_passages": [{"docid": "9", "text": "y"}],
             "negative_passages": [{"docid": "7", "title": "Town", "text": "A capital"}, {"text": CAPITALS[0]}]}]
    assert mined(tmp_path, rows, None) == [CAPITALS[0]]
    assert RecordFile(str(tmp_path / "rows.jsonl"))[1].document_ids[:2] == ("9", "7")


BOTH = [
    {"query": "q", "positive": ["a"], "negatives": ["b", "c"], "positive_ids": [7], "negative_ids": ["8", "7"]},
    {"query": "q", "positive_passages": [{"docid": "7", "text": "a"}],
     "negative_passages": [{"text": "b"}, {"docid": 7, "text": "c"}]},
    {"question": "q", "positive_ctxs": [{"passage_id": "7", "text": "a"}],
     "hard_negative_ctxs": [{"passage_id": "8", "text": "b"}], "negative_ctxs": [{"psg_id": 7, "text": "c"}]},
    {"query": "q", "documents": ["a", "b"], "labels": [2, 0], "document_ids": ["7", 7]},
    {"query": "q", "pos": ["a"], "neg": ["b"], "pos_id": ["7"], "neg_id": [7]}]


@pytest.mark.parametrize("row", BOTH, ids=[list(row)[1] for row in BOTH])
def test_an_id_on_both_sides_is_refused_with_its_line_and_counted(tmp_path, capsys, row):
    """Training of both kinds and mining refuse it; `data check` counts it."""
    path = write(tmp_path / "rows.jsonl", [row])
    for kind in ("contrastive", "rerank"):
        with pytest.raises(DataError, match=r"rows\.jsonl:1: id '7' is that of a positive and of a negative; a doc"):
            open_records((TrainFile(path=path),), kind)
    assert main(["mine", "--model", "bm25", "--data", path, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "rows.jsonl:1: id '7' is that of a positive" in capsys.readouterr().err
    assert main(["data", "check", path]) == 0
    assert "rows with one id for a positive and a negative (training refuses them): 1 (100.0%)" in (
        capsys.readouterr().out)


def test_ids_of_a_corpus_are_compared_too(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", [{"docid": 7, "text": "a"}])
    row = {"query": "q", "positive_document_ids": ["7"], "negative_document_ids": [7]}
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: id '7' is that of a positive and of a negative"):
        open_records((TrainFile(path=path, corpus=corpus),))


def test_ids_of_negatives_alone_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"query": "q", "positive": "a", "negatives": "b", "negative_ids": ["7"]}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: negative_ids = \['7'\] is given without positive_ids; give b"):
        RecordFile(path)


def test_search_by_vectors_leaves_them_out_and_looks_further():
    """As many candidates as without exclusions, and the positive's score is still the positive's."""
    documents = torch.linspace(1, 0, 8)[:, None]
    options = MiningOptions(num_negatives=2, absolute_margin=0.0)
    (plain,) = mine_vectors(torch.ones(1, 1), [documents], [[2]], options)
    (further,) = mine_vectors(torch.ones(1, 1), documents.split(3), [[2]], options, excluded=[[2, 3, 4, 5]])
    assert [document for document, _ in plain.negatives] == [3, 4]
    assert [document for document, _ in further.negatives] == [6, 7]
    assert further.positive_scores == plain.positive_scores
