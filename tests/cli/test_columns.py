"""--columns of the commands that read training rows without a configuration: as the rows renamed, and its refusals."""

import json

import pytest
import yaml

from megatron_embed.__main__ import main
from megatron_embed.config.load import load_text
from megatron_embed.evaluation.reranking import load_rerank_file
from megatron_embed.evaluation.sts import load_sts
from megatron_embed.run.evaluate_command import holds_pairs
from tests.helpers.toys import MINILM

ROWS = [{"uid": row, "search text": f"what is number {row}", "gold": f"it is {row} of all",
         **({} if row % 3 else {"bad": [f"it is not {row}"]})} for row in range(1, 9)]
NAMES = {"search text": "query", "gold": "positive", "bad": "negatives"}
COLUMNS = ("--columns", "search text=query, gold=positive", "--columns", "bad=negatives")


def written(path, rows, names):
    path.write_text("".join(json.dumps({names.get(key, key): value for key, value in row.items()}) + "\n"
                            for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A file with names of its own, and the same rows with ours."""
    return written(tmp_path / "own.jsonl", ROWS, {}), written(tmp_path / "ours.jsonl", ROWS, NAMES)


def test_mine_and_data_check_read_them_as_the_rows_renamed(files, tmp_path, capsys):
    own, ours = files
    for given, arguments in ((own, COLUMNS), (ours, ())):
        output = given.replace(".jsonl", "-mined.jsonl")
        assert main(["mine", "--model", "bm25", "--data", given, "--num-negatives", "2", "--output", output,
                     *arguments]) == 0
    mined = [(tmp_path / f"{name}-mined.jsonl").read_text() for name in ("own", "ours")]
    assert mined[0] == mined[1] and '"it is not 3"' in mined[0]
    capsys.readouterr()
    counts = []
    for given, arguments in ((own, COLUMNS), (ours, ())):
        assert main(["data", "check", given, "--json", *arguments]) == 0
        counts += [{**entry, "path": ""} for entry in json.loads(capsys.readouterr().out)]
    assert counts[0] == counts[1] and counts[0]["rows without negatives"] == 6


def test_init_writes_them(files, capsys):
    own, _ = files
    assert main(["init", str(MINILM), own, *COLUMNS]) == 0
    text = capsys.readouterr().out
    (entry,) = load_text(text, "run.yaml").data.train
    assert (entry.path, entry.columns) == (own, NAMES)
    assert yaml.safe_load(text)["data"]["num_negatives"] == 1


def test_evaluate_reads_pairs_and_lists_with_them(tmp_path):
    pairs = [{"left": f"a {row}", "right": f"b {row}", "stars": row} for row in range(3)]
    names = {"left": "text_a", "right": "text_b", "stars": "score"}
    own, ours = written(tmp_path / "own.jsonl", pairs, {}), written(tmp_path / "ours.jsonl", pairs, names)
    assert holds_pairs(own, names)
    read, expected = load_sts(own, "--data", names), load_sts(ours)
    assert (read.texts, read.scores) == (expected.texts, expected.scores)
    lists = [{"ask": "q", "texts": ["a", "b"], "grades": [1, 0]}]
    names = {"ask": "query", "texts": "documents", "grades": "labels"}
    own = written(tmp_path / "lists.jsonl", lists, {})
    assert not holds_pairs(own, names)
    (read,) = load_rerank_file(own, columns=names).lists
    assert (read.query, read.documents, read.labels) == ("q", ("a", "b"), (1, 0))


MISSING = ":1: query is missing; the row has 'uid', 'search text', 'gold'; add 'query'"
REMEDY = ", or say which column it is: --columns COLUMN=query"


@pytest.mark.parametrize("command", [
    ("mine", "--model", "bm25", "--output", "mined.jsonl", "--data"), ("data", "check"), ("init", str(MINILM)),
    ("evaluate", "--model", "/nowhere", "--data")])
def test_every_command_names_its_own_remedy(command, files, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    own, _ = files
    assert main([*command, own]) == 2
    assert f"{own}{MISSING}{REMEDY}\n" in capsys.readouterr().err
    assert main([*command, own, "--columns", "search text=query,gold=positive,bat=negatives"]) == 2
    error = capsys.readouterr().err
    assert f"{own}:1: --columns names 'bat', and the row has 'uid', 'search text', 'gold'; no other row has" in error


def test_a_set_of_a_configuration_has_no_such_remedy(files):
    own, _ = files
    for load in (load_sts, load_rerank_file):
        with pytest.raises(Exception, match="query is missing") as caught:
            load(own, "evaluation.sts")
        assert str(caught.value) == own + MISSING


@pytest.mark.parametrize("arguments, words", [
    (["data", "check", "rows", "--columns", "query"], "argument --columns: 'query' is not COLUMN=FIELD"),
    (["data", "check", "rows", "--columns", "=query"], "'=query' is not COLUMN=FIELD"),
    (["data", "check", "rows", "--columns", "a=query,b=query"], "'b=query': query is there twice"),
    (["data", "check", "rows", "--columns", "a=query", "--columns", "a=positive"], "'a=positive': a is there twice"),
    (["data", "check", "run.yaml", "--columns", "a=query"], "--columns: run.yaml sets the columns of its data"),
    (["data", "tokenize", "run.yaml", "--columns", "a=query"], "--columns: run.yaml sets the columns of its data"),
    (["init", "--from", "a.yaml", "--columns", "a=query"], "--gpus and --columns are for a starting configuration"),
    (["evaluate", "--model", "/nowhere", "--data", "{beir}", "--columns", "a=query"], "is a BEIR folder, whose files"),
    (["init", str(MINILM), "{beir}", "--columns", "a=query"], "--columns = {'a': 'query'}: '"),
])
def test_what_has_no_meaning_is_refused(arguments, words, tmp_path, capsys):
    (tmp_path / "qrels").mkdir()
    written(tmp_path / "corpus.jsonl", [{"_id": "d", "text": "a"}], {})
    written(tmp_path / "queries.jsonl", [{"_id": "q", "text": "b"}], {})
    for split in ("train", "test"):
        (tmp_path / "qrels" / f"{split}.tsv").write_text("q\td\t1\n")
    assert main([text.replace("{beir}", str(tmp_path)) for text in arguments]) == 2
    assert words in capsys.readouterr().err
