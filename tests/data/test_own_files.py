"""Files as people have them: CSV, arrays, several files, other names of columns, other ranges of scores."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_embed.config.load import load_text, save_resolved, to_dict
from megatron_embed.config.schema import TrainFile
from megatron_embed.data.check import check_records
from megatron_embed.data.dataset import RecordFile, open_records
from megatron_embed.data.records import Record, RerankRecord
from megatron_embed.data.row_source import require_rows
from megatron_embed.errors import ConfigError, DataError

HEADER = "question,answer,negative_1,score\n"


def records(path: Path | str, kind: str | None = "contrastive", **settings: object) -> list[Record | RerankRecord]:
    """All records by scanning, compared with each by its index."""
    file = RecordFile(TrainFile(path=str(path), **settings), kind)
    assert [file[index] for index in range(len(file))] == list(file)
    return list(file)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", ";"), ("a.csv.gz", ",")])
def test_csv_reads_quotes_line_breaks_and_blank_lines(tmp_path, name, separator):
    lines = ["question,answer", '"q, 1\t;","a ""1"""', "", '"two', 'lines",a2', "   q3 ,a3"]
    text = "\r\n".join(lines).replace(",", separator) if separator != "," else "\r\n".join(lines)
    body = ("\ufeff" + text + "\r\n").encode()
    path = write(tmp_path / name, gzip.compress(body) if name.endswith(".gz") else body)
    rows = records(path)
    assert [(row.query, row.positive) for row in rows] == [
        (f"q{separator} 1\t;" if separator != "," else "q, 1\t;", ('a "1"',)), ("two\r\nlines", ("a2",)),
        ("   q3 ", ("a3",))]
    assert [row.source.rpartition(":")[2] for row in rows] == ["2", "4", "6"]


def test_csv_types_scores_and_lists_and_drops_empty_fields(tmp_path):
    path = write(tmp_path / "pairs.csv", "sentence1,sentence2,score\na,b,4.5\nc,d,0\n")
    assert [row.score for row in records(path, "pairs")] == [4.5, 0.0]
    path = write(tmp_path / "rows.csv", ',query,positive,negatives\n0,1985,b,"[""c"", ""d""]"\n1,[x],b,\n')
    first, second = records(path)
    assert (first.query, first.negatives, second.query, second.negatives) == ("1985", ("c", "d"), "[x]", ())


@pytest.mark.parametrize("text, message", [
    ("query,positive\na\n", ":2: 1 fields, and the header has 2"),
    ("query,positive\na,b,c\n", ":2: 3 fields, and the header has 2"),
    ("query,query\na,b\n", ":1: column 'query' occurs twice"),
    ('query,positive\n"a"x,b\n', ":2: not CSV: "),
    ('query,positive\na,b\n"open,b\n', ":3: not CSV: "),
    (b"query,positive\na,\xff\n", ":2: not UTF-8: byte 0xff"),
    ("query,positive\na,\n", ":2: "), ("query,positive\n", ":1: no rows"), ("", ":1: no rows"),
    ("query,positve\na,b\n", ":2: unknown key 'positve' = 'b'; did you mean 'positive'?"),
])
def test_wrong_csv_names_its_line(tmp_path, text, message):
    path = write(tmp_path / "rows.csv", text)
    with pytest.raises(DataError) as caught:
        records(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_csv_that_changes_is_refused(tmp_path):
    path = write(tmp_path / "rows.csv", "query,positive\na,b\nc,d\n")
    file = RecordFile(str(path))
    write(path, "query,positive\na,b\nc,d and more\n")
    with pytest.raises(DataError, match="was changed after it was checked"):
        file[1]


def test_array_of_objects_is_read_with_lines(tmp_path):
    rows = [{"query": f"q{index} \u00e9", "positive": ["a ] , {"]} for index in range(3)]
    path = write(tmp_path / "rows.json", "\ufeff" + json.dumps(rows, indent=1))
    assert [(row.query, row.source.rpartition(":")[2]) for row in records(path)] == [
        ("q0 \u00e9", "2"), ("q1 \u00e9", "8"), ("q2 \u00e9", "14")]
    one_line = write(tmp_path / "one.json.gz", gzip.compress(json.dumps(rows).encode()))
    assert [(row.query, row.source.rpartition(":")[2]) for row in records(one_line)] == [
        (row["query"], str(number)) for number, row in enumerate(rows, start=1)]
    lines = write(tmp_path / "lines.json", "\n".join(map(json.dumps, rows)))
    assert len(records(lines)) == 3


@pytest.mark.parametrize("text, message", [
    ('[{"query": "a", "positive": "b"}', ":1: not valid JSON: a comma or `]` is missing"),
    ('[{"query": "a", "positive": "b"},]', ":1: not valid JSON: "), ("[\n1]", ":2: a JSON number, 1, where"),
    ('[{"query": "a", "positive": "b"}] x', ":1: text behind the array"), ("[]", ":1: no rows"),
    ('[\n{"query": "a", "query": "b"}]', ":2: key 'query' occurs twice"), (b'["\xff"]', ":1: not UTF-8"),
    ('[{"query": "a",\n\n"positive": NaN}]', ":1: NaN is not valid JSON"),
])
def test_wrong_array_names_its_line(tmp_path, text, message):
    path = write(tmp_path / "rows.json", text)
    with pytest.raises(DataError) as caught:
        records(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_directories_and_patterns_are_one_data_set(tmp_path):
    (tmp_path / "part" / "deep").mkdir(parents=True)
    write(tmp_path / "part" / "b.jsonl", '{"query": "b", "positive": "p"}\n')
    write(tmp_path / "part" / "a.csv", "query,positive\na,p\n")
    write(tmp_path / "part" / "deep" / "c.json", '[{"query": "c", "positive": "p"}]')
    write(tmp_path / "part" / "notes.txt", "not rows")
    write(tmp_path / "part" / ".hidden.jsonl", "not rows")
    assert [row.query for row in records(tmp_path / "part")] == ["a", "b"]
    assert [row.query for row in records(tmp_path / "part" / "*.jsonl")] == ["b"]
    assert [row.query for row in records(tmp_path / "**" / "*.[cj]s*")] == ["a", "b", "c"]
    assert require_rows(str(tmp_path / "part"), "data.train") == "files"
    together = open_records((TrainFile(path=str(tmp_path / "part")),))
    assert together[1].source.endswith("b.jsonl:1") and len(together.files) == 1
    counts = check_records(together)
    assert [(entry["path"], entry["rows"]) for entry in counts] == [(str(tmp_path / "part"), 2)]
    write(tmp_path / "[x].jsonl", '{"query": "brackets", "positive": "p"}\n')
    assert records(tmp_path / "[x].jsonl")[0].query == "brackets"
    write(tmp_path / "part" / "c.jsonl", '{"text_a": "b", "text_b": "p", "score": 1}\n')
    with pytest.raises(DataError, match=r"c.jsonl:1: a row of the format .* in a file whose first row is"):
        records(tmp_path / "part")


@pytest.mark.parametrize("name, message", [
    ("sheet.xlsx", "a spreadsheet; save the sheet as CSV"), ("Sheet.XLS", "a spreadsheet"), ("a.ods", "a spreadsheet"),
    ("none*.jsonl", "no file of rows matches"), ("rows.txt", "not a file of rows by its name; readable are"),
])
def test_what_is_no_file_of_rows_is_told_the_way_out(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        records(name)
    assert caught.value.key == "data.train" and "\n" not in str(caught.value)


def test_columns_are_renamed_and_others_stay(tmp_path):
    path = write(tmp_path / "faq.csv", "id,question,reply,negative\n1,q,a,n\n")
    row = records(path, columns={"reply": "positive", "question": "query"})[0]
    assert (row.query, row.positive, row.negatives) == ("q", ("a",), ("n",))
    jsonl = write(tmp_path / "rows.jsonl", '{"query": "an id", "text": "q", "positive": "p", "stars": 3}\n')
    assert records(jsonl, columns={"text": "query"})[0].query == "q"
    pair = records(jsonl, "pairs", columns={"text": "text_a", "positive": "text_b", "stars": "score"})[0]
    assert (pair.query, pair.positive, pair.score) == ("q", ("p",), 3.0)
    with pytest.raises(DataError, match=r"rows.jsonl:1: data.train.columns names 'titel', and the row has 'query'"):
        records(jsonl, columns={"titel": "query"})
    with pytest.raises(DataError, match="write the column first: {text: query_text}"):
        records(jsonl, columns={"query_text": "text"})


@pytest.mark.parametrize("columns", [{"text": "query", "good": "positive", "bad": "negatives"},
                                     {"text": "question", "good": "pos_doc", "bad": "neg_doc"},
                                     {"text": "anchor", "good": "positive", "bad": "negative"}])
def test_column_of_an_optional_field_may_be_absent(tmp_path, columns):
    path = write(tmp_path / "rows.jsonl", '{"text": "q", "good": "p"}\n{"text": "r", "good": "o", "bad": "n"}\n'
                 '{"text": "s", "good": "m"}\n')
    assert [row.negatives for row in records(path, columns=columns)] == [(), ("n",), ()]
    write(path, path.read_text() + '{"good": "p", "bad": "n"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:4: data.train.columns names 'text', and the row has 'good', "
                                        r"'bad'; every row needs '\w+'; correct the name, or the row"):
        records(path, columns=columns)


def test_column_that_is_no_field_or_a_field_beside_it_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"q": "a", "positive": "b", "bad": "c"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: data.train.columns says that 'bad' is 'foo', which is no field "
                                        r"of these rows \(query, positive, negatives, "):
        records(path, columns={"q": "query", "bad": "foo"})
    for column, field in (("q", "query"), ("bad", "negatives")):
        row = {"q": "a", "positive": "b", "bad": "c", field: "other"}
        del row[column]
        both = write(tmp_path / "both.jsonl", path.read_text() + json.dumps(row) + "\n")
        with pytest.raises(DataError, match=f"both.jsonl:2: data.train.columns names '{column}', and the row has .*; "
                                            f"its own '{field}' is not read in place of it: correct the name, or "):
            records(both, columns={"q": "query", "bad": "negatives"})


def test_column_that_no_row_has_is_refused(tmp_path):
    jsonl = write(tmp_path / "rows.jsonl", '{"q": "a", "positive": "b", "bad": "c"}\n' * 2)
    table = write(tmp_path / "rows.csv", "q,positive,bad\na,b,c\n")
    array = write(tmp_path / "rows.json", '[{"q": "a", "positive": "b", "bad": "c"}]')
    for path, line in ((jsonl, 1), (table, 2), (array, 1)):
        with pytest.raises(DataError, match=rf"{path.name}:{line}: data.train.columns names 'bat', and the row has "
                                            "'q', 'positive', 'bad'; did you mean 'bad'?"):
            records(path, columns={"q": "query", "bat": "negatives"})
        with pytest.raises(DataError, match="names 'other', .*; no other row has it either; correct the name, or lea"):
            records(path, columns={"q": "query", "other": "negatives"})
        with pytest.raises(DataError, match=f":{line}: data.train.columns names 'query', .*; write the column first: "
                                            "{q: query}"):
            records(path, columns={"query": "q"})
        with pytest.raises(DataError, match="write the column first: {bad: negatives}"):
            records(path, columns={"q": "query", "negatives": "bad"})
        assert records(path, columns={"q": "query", "bad": "negatives"})[0].negatives == ("c",)
    with pytest.raises(DataError, match=r"rows.jsonl:1: unknown key 'negatve' = 'c'; did you mean 'negatives'"):
        records(jsonl, columns={"q": "query", "bad": "negatve"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: positive is missing; the row has"):
        records(write(jsonl, '{"q": "a", "bad": "c"}\n'), columns={"q": "query", "other": "negatives"})


def test_scores_are_rescaled_by_their_range(tmp_path):
    path = write(tmp_path / "stsb.tsv", "sentence1\tsentence2\tscore\na\tb\t5\nc\td\t1.25\ne\tf\t0\n")
    assert [row.score for row in records(path, "pairs", score_range=(0, 5))] == [1.0, 0.25, 0.0]
    assert [row.labels for row in records(path, "rerank", score_range=(0, 5))] == [(1.0,), (0.25,), (0.0,)]
    assert [row.score for row in records(path, "pairs", score_range=(-5, 5))] == [1.0, 0.625, 0.5]
    with pytest.raises(DataError, match=r"stsb.tsv:2: score 5 lies outside data.train.score_range = \[0, 4\]"):
        records(path, "pairs", score_range=(0, 4))
    rows = write(tmp_path / "rows.jsonl", '{"query": "a", "positive": "b"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: data.train.score_range .* the row is not a pair with a score"):
        records(rows, score_range=(0, 5))


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "q", "response": ["a", "b", "c"], "labels": [1, 0, 0]}, ("q", ("a", "b", "c"), (1, 0, 0), None)),
    ({"anchor": "q", "positive": ["a", "b"], "scores": [0.9, 0.5]}, ("q", ("a", "b"), (1, 0), (0.9, 0.5))),
    ({"query": "q", "response": ["a", "b"], "labels": [1, 0]}, ("q", ("a", "b"), (1, 0), None)),
    ({"query": "q", "answer": ["a", "b"], "labels": [0, 2]}, ("q", ("a", "b"), (0, 2), None)),
    ({"question": "q", "passage": ["a"], "scores": [0.9]}, ("q", ("a",), (1,), (0.9,))),
])
def test_labelled_lists_of_the_miner(tmp_path, row, expected):
    path = write(tmp_path / "mined.jsonl", json.dumps(row) + "\n")
    read = records(path, "rerank")[0]
    assert (read.query, read.documents, read.labels, read.teacher_scores) == expected
    contrastive = records(path)[0]
    labelled = zip(expected[1], expected[2], strict=True)
    assert contrastive.positive == tuple(text for text, label in labelled if label > 0)


@pytest.mark.parametrize("row", [
    {"prompt": "q", "response": "a", "label": 1}, {"query": "q", "answer": "a", "score": 1.0},
    {"question": "q", "positive": "a", "label": 1}, {"query": "q", "document": "a", "label": 1},
])
def test_labelled_pairs_of_the_miner(tmp_path, row):
    path = write(tmp_path / "mined.jsonl", json.dumps(row) + "\n")
    assert (records(path, "pairs")[0].score, records(path, "rerank")[0].labels) == (1.0, (1.0,))


def test_labelled_list_whose_numbers_do_not_match_is_refused(tmp_path):
    path = write(tmp_path / "mined.jsonl", '{"anchor": "q", "positive": ["a", "b"], "labels": [1]}\n')
    with pytest.raises(DataError, match=r"mined.jsonl:1: labels has 1 numbers for 2 texts of positive"):
        records(path)


def test_prompt_and_response_are_a_query_and_its_positive(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"prompt": "q", "response": "a"}\n')
    assert records(path)[0].positive == ("a",) and records(path)[0].score is None


def test_settings_that_change_the_rows_change_their_digest(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", '{"a": "a", "b": "b", "query": "q", "positive": "p"}\n'))
    columns = ({}, {"a": "query"}, {"b": "query"}, {"a": "query", "b": "positive"}, {"b": "positive", "a": "query"})
    digests = [RecordFile(TrainFile(path=path, columns=mapping)).digest for mapping in columns]
    assert len(set(digests)) == 4 and digests[3] == digests[4]


def test_settings_of_an_entry_are_checked_and_kept(tmp_path):
    text = "model: {path: m}\ndata:\n  train:\n  - {path: a.csv, columns: {q: query}, score_range: [0, 5]}\n"
    config = load_text(text, "run.yaml")
    assert config.data.train[0] == TrainFile(path="a.csv", columns={"q": "query"}, score_range=(0.0, 5.0))
    save_resolved(config, tmp_path / "resolved.yaml")
    assert load_text((tmp_path / "resolved.yaml").read_text(), "again") == config
    assert to_dict(config)["data"]["train"][0]["columns"] == {"q": "query"}


@pytest.mark.parametrize("entry, message", [
    ("columns: {q: 1}", "run.yaml:3: data.train.columns.q = 1: expected text; put it in quotes"),
    ("columns: [q]", "run.yaml:3: data.train.columns = ['q']: expected a mapping of text to text"),
    ("columns: {a: query, b: query}", "run.yaml:3: data.train.columns = {'a': 'query', 'b': 'query'}: gives"),
    ("columns: {a: ''}", "run.yaml:3: data.train.columns = {'a': ''}: must name columns and fields"),
    ("score_range: [5, 0]", "run.yaml:3: data.train.score_range = [5.0, 0.0]: must be the lowest and the highest"),
    ("score_range: [5]", "run.yaml:3: data.train.score_range = [5.0]: must be the lowest and the highest"),
])
def test_wrong_settings_of_an_entry_are_refused(entry, message):
    with pytest.raises(ConfigError) as caught:
        load_text(f"model: {{path: m}}\ndata:\n  train: [{{path: a.csv, {entry}}}]\n", "run.yaml")
    assert str(caught.value).startswith(message)


def test_beir_folder_takes_no_columns(tmp_path):
    (tmp_path / "qrels").mkdir()
    write(tmp_path / "corpus.jsonl", '{"_id": "d", "text": "a"}\n')
    write(tmp_path / "queries.jsonl", '{"_id": "q", "text": "b"}\n')
    write(tmp_path / "qrels" / "train.tsv", "q\td\t1\n")
    with pytest.raises(ConfigError, match=r"data.train.columns = .* is a BEIR folder"):
        open_records((TrainFile(path=str(tmp_path), columns={"a": "b"}),))
