import gzip
import json
import logging
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.corpus import TextsOnDisk, read_named_text
from megatron_embed.data.dataset import RecordFile, open_records
from megatron_embed.data.records import Record, text_id
from megatron_embed.data.row_source import open_rows
from megatron_embed.errors import ConfigError, DataError
from tests.data.conftest import MINI_ZH

WriteRows = Callable[..., str]
ROW = {"query": "what is it", "positive": ["this"]}


def test_real_rows_are_read_as_json_reads_them():
    file = RecordFile(str(MINI_ZH))
    rows = [json.loads(line) for line in MINI_ZH.read_text(encoding="utf-8").splitlines()]
    assert len(file) == len(rows) == 1000
    for index in (0, 1, 499, 999, -1):
        row = rows[index]
        assert file[index] == Record(query=row["query"], positive=tuple(row["positive"]), instruction=None,
                                      negatives=tuple(row["negatives"]), source=f"{MINI_ZH}:{index % 1000 + 1}")
    assert [record.query for record in file] == [row["query"] for row in rows]


def test_every_form_of_a_row(write_rows: WriteRows):
    path = write_rows([
        {"query": "a", "positive": "p"},
        {"query": " b ", "positive": ["p", "q"], "negatives": "n"},
        {"negatives": ["n", "m"], "positive": ["p"], "query": "c", "instruction": "find"},
        {"query": "d", "positive": ["p"], "negatives": None, "instruction": None},
        {"query": "e", "positive": ["p"], "negatives": []},
    ])
    fields = [(r.query, r.positive, r.negatives, r.instruction) for r in RecordFile(path)]
    assert fields == [("a", ("p",), (), None), (" b ", ("p", "q"), ("n",), None), ("c", ("p",), ("n", "m"), "find"),
                      ("d", ("p",), (), None), ("e", ("p",), (), None)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline(tmp_path: Path, name: str):
    rows = [json.dumps({**ROW, "query": "一"}), json.dumps({**ROW, "query": "二"}, ensure_ascii=False)]
    text = "\ufeff" + "\r\n".join(["", rows[0], "  \t", "", rows[1]])
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    file = RecordFile(str(path))
    assert [(record.query, record.source) for record in file] == [("一", f"{path}:2"), ("二", f"{path}:5")]


def test_several_files_follow_one_another_and_fill_in_instructions(write_rows: WriteRows):
    first = write_rows([ROW, {**ROW, "instruction": "own"}], "a.jsonl")
    second = write_rows([{**ROW, "positive": ["one", "two"]}], "b.jsonl")
    records = open_records((TrainFile(path=first, instruction="the file's"), TrainFile(path=second)))
    assert len(records) == 3
    assert [record.instruction for record in records] == ["the file's", "own", None]
    assert [record.source for record in records[1:]] == [f"{first}:2", f"{second}:1"]
    assert records[-1] == records[2]
    assert (records.files[0].most_positives, records.most_positives) == (1, 2)
    assert records.instructions == {"the file's": f"{first}:1", "own": f"{first}:2", None: f"{second}:1"}
    with pytest.raises(IndexError, match="row 3 of 3"):
        records[3]


def test_records_survive_pickling_after_use(write_rows: WriteRows):
    records = open_records((TrainFile(path=write_rows([ROW, {**ROW, "query": "second"}])),))
    assert records[1].query == "second"
    expected = list(records)
    copy = pickle.loads(pickle.dumps(records))
    del records  # closes its descriptor, which the copy must not have taken along
    assert list(copy) == expected
    assert pickle.loads(pickle.dumps(copy[1])) == expected[1]


def test_a_file_that_changes_under_the_run_is_refused(write_rows: WriteRows):
    path = write_rows([ROW, ROW])
    file = RecordFile(path)
    assert file[0].query == ROW["query"]
    Path(path).write_text(json.dumps({**ROW, "query": "other"}) + "\n" + json.dumps(ROW) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the file was changed after it was checked"):
        file[1]


def test_a_file_that_vanishes_is_refused(write_rows: WriteRows):
    path = write_rows([ROW])
    file = RecordFile(path)
    os.remove(path)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: cannot be read again: No such file"):
        file[0]


BAD_ROWS: list[tuple[object, str]] = [
    ("{broken", "not valid JSON: Expecting property name .* at character 2, near '{broken'; a line holds exactly one"),
    ('{"query": "a", "positive": ["b"]} {"query": "c"}', "not valid JSON: Extra data at character 35"),
    ('{"query": "a", "positive": ["b"]', "not valid JSON: Expecting ',' delimiter"),
    ('[{"query": "a", "positive": ["b"]}]', "a JSON array, .*one object per line, without enclosing brackets"),
    ('"text"', "a JSON string, 'text', where one JSON object per line is expected"),
    ("17", "a JSON number, 17"),
    ("null", "a JSON null, None"),
    ('{"query": NaN, "positive": ["b"]}', "NaN is not valid JSON; correct the line"),
    ('{"query": "a", "positive": ["b"], "score": -Infinity}', "-Infinity is not valid JSON"),
    ('{"query": "a", "query": "c", "positive": ["b"]}', "key 'query' occurs twice; keep one"),
    ("[" * 100_000, "nested more than 100 levels deep"),
    ('{"query": "a", "positive": ["b"], "n": ' + "9" * 5000 + "}", "digits"),
    (b'{"query": "caf\xe9", "positive": ["b"]}', "not UTF-8: byte 0xe9 at byte 15 of the line; save the file as UTF-8"),
    (r'{"query": "a\ud83d", "positive": ["b"]}', r"query contains an unpaired surrogate, \\ud83d, at character 2"),
    ({"positive": ["b"]}, "query is missing; the row has 'positive'; add 'query'"),
    ({"query": "a"}, "positive is missing; the row has 'query'; add 'positive'"),
    ({}, "query is missing; the row has no keys"),
    ({"text_a": "a", "text_b": "b"}, "query is missing; the row has 'text_a', 'text_b'; add 'query'"),
    ({"query": None, "positive": ["b"]}, "query = None is a JSON null; it must be a string"),
    ({"query": 3, "positive": ["b"]}, "query = 3 is a JSON number; it must be a string"),
    ({"query": ["a"], "positive": ["b"]}, r"query = \['a'\] is a JSON array; it must be a string"),
    ({"query": "", "positive": ["b"]}, "query = '' is empty; give it a text or remove the row"),
    ({"query": " \n\t\u3000", "positive": ["b"]}, "query = .* is empty"),
    ({"query": "a", "positive": []}, r"positive = \[\] is empty; give it at least one text or remove the row"),
    ({"query": "a", "positive": ""}, "positive = '' is empty"),
    ({"query": "a", "positive": ["b", " "]}, r"positive\[1\] = ' ' is empty"),
    ({"query": "a", "positive": ["b", 5]}, r"positive\[1\] = 5 is a JSON number; it must be a string"),
    ({"query": "a", "positive": None}, "positive = None: it must be a string or a list of strings"),
    ({"query": "a", "positive": {"text": "b"}}, "positive = {'text': 'b'}: it must be a string or a list"),
    ({"query": "a", "positive": "b", "negatives": [None]}, r"negatives\[0\] = None is a JSON null"),
    ({"query": "a", "positive": "b", "negatives": ["c", ""]}, r"negatives\[1\] = '' is empty"),
    ({"query": "a", "positive": "b", "negatives": 0}, "negatives = 0: it must be a string or a list"),
    ({"query": "a", "positive": "b", "instruction": 1}, "instruction = 1 is a JSON number"),
    ({"query": "a", "positive": "b", "instruction": ""}, "instruction = '' is empty"),
    ({"query": "a", "postive": ["b"]}, r"unknown key 'postive' = \['b'\]; did you mean 'positive'\?"),
    ({"query": "a", "pos": ["b"]}, r"a row of the format FlagEmbedding \(query, pos, neg\) in a file whose first row "
     "is megatron_embed .*; give each format a file of its own"),
    ({"query": "a", "positives": ["b"]}, r"unknown key 'positives' = .*; did you mean 'positive'\?"),
    ({"Query": "a", "positive": ["b"]}, r"unknown key 'Query' = 'a'; did you mean 'query'\?"),
    ({"query": "a", "positive": "b", "negative": ["c"]}, r"unknown key 'negative' = .*; did you mean 'negatives'\?"),
    ({"query": "a", "positive": "b", "neg": ["c"]}, r"unknown key 'neg' = .*; did you mean 'negatives'\?"),
    ({"query": "a", "positive": "b", "instructions": "c"}, r"did you mean 'instruction'\?"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_bad_row_is_refused_with_file_and_line(write_rows: WriteRows, row: object, message: str, name: str):
    path = write_rows([ROW, "", row, ROW], name)
    if name.endswith(".gz"):
        Path(path).write_bytes(gzip.compress(Path(path).read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        RecordFile(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(path) + 400


def test_files_that_cannot_be_opened_name_the_key_and_the_path(write_rows: WriteRows, tmp_path: Path):
    missing = str(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match=f"data.train = '{missing}': no such file; the current directory is"):
        open_records((TrainFile(path=missing),))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"data.train = .*folder\.jsonl': a directory without a file of rows"):
        RecordFile(str(tmp_path / "folder.jsonl"))
    path = write_rows([ROW])
    with pytest.raises(ConfigError, match=r"data.train = .*inside\.jsonl': cannot be read: Not a directory"):
        RecordFile(path + "/inside.jsonl")
    with pytest.raises(ConfigError, match=r"data.train = 'rows\.txt': not a file of rows by its name; readable are"):
        RecordFile("rows.txt")
    with pytest.raises(ConfigError, match=r"data.train = 'rows\.parquet': no such file; the current directory is"):
        RecordFile("rows.parquet")


def test_a_file_without_permission_is_refused(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write_rows([ROW])
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"data.train = .*rows\.jsonl': cannot be read: Permission denied"):
        RecordFile(path)


@pytest.mark.parametrize("content", [b"", b"\n\r\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl:1: no rows; a row is one line such as"):
        RecordFile(str(path))


def test_a_damaged_gzip_file_is_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps({**ROW, "query": random.Random(i).randbytes(40).hex()}).encode() + b"\n"
                                   for i in range(2000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:\d+: cannot be read on: .*damaged or incomplete"):
        RecordFile(str(path))
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:1: cannot be read on: Not a gzipped file"):
        RecordFile(str(path))


def test_other_keys_are_ignored_and_said_once(write_rows: WriteRows, caplog: pytest.LogCaptureFixture):
    rows = [{**ROW, "query_id": 1, "positive_id": "d1", "origin": 2}, {**ROW, "source": "web"}]
    with caplog.at_level(logging.INFO):
        assert len(RecordFile(write_rows(rows))) == 2
    assert [record.getMessage() for record in caplog.records if "ignored keys" in record.getMessage()] == [
        f"{write_rows(rows)}: ignored keys: origin, positive_id, source"]


def test_text_id_is_the_same_in_every_process():
    assert text_id("通用") == text_id("通" + "用")
    assert len({text_id(str(value)) for value in range(10_000)}) == 10_000
    assert {text_id(str(value)) < 0 for value in range(100)} == {False, True}
    assert all(-(2**63) <= text_id(str(value)) < 2**63 for value in range(100))
    program = "from megatron_embed.data.records import text_id; print(text_id('équipe'))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "5"})
    # `printf équipe | b2sum -l 64`, read as a little-endian signed value.
    assert bytes.fromhex("a8c4ddc6381ca573") == text_id("équipe").to_bytes(8, "little", signed=True)
    assert int(other.stdout) == text_id("équipe")


def test_texts_on_disk(write_rows: WriteRows, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        assert list(TextsOnDisk(write_rows([{"text": "一"}, "", {"text": " b", "id": 3}]), "--input")) == ["一", " b"]
    assert "ignored keys: id" in caplog.text
    for row, message in [({"txt": "a"}, "rows.jsonl:2: unknown key 'txt' = 'a'; did you mean 'text'"),
                         ({"passage": "a"}, "rows.jsonl:2: text is missing; the row has 'passage'; add 'text'"),
                         ({"text": ""}, "rows.jsonl:2: text = '' is empty"),
                         ({"text": 1}, "rows.jsonl:2: text = 1 is a JSON number"),
                         ("no", "rows.jsonl:2: not valid JSON")]:
        with pytest.raises(DataError, match=message):
            TextsOnDisk(write_rows([{"text": "a"}, row]), "--input")
    with pytest.raises(DataError, match="rows.jsonl:1: no rows"):
        TextsOnDisk(write_rows([]), "--input")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        rows = [{"_id": index, "text": "tea", "title": title} for index, title in enumerate(["T", "", None, " "])]
        path = write_rows([*rows, {"_id": "4", "title": "T", "text": ""}])
        assert list(TextsOnDisk(path, "--input")) == ["T tea", "tea", "tea", "tea", "T "]
        assert list(TextsOnDisk(path, "--input")) == [
            read_named_text(*row).text for row in open_rows(path, "--input").scan()]
    assert "2 of 5 rows have a title, which stands before their text" in caplog.text
    assert "ignored keys: _id" in caplog.text
    with pytest.raises(DataError, match="rows.jsonl:1: title = 1 is a JSON number"):
        TextsOnDisk(write_rows([{"text": "a", "title": 1}]), "--input")
    with pytest.raises(ConfigError, match="--input = 'gone.jsonl': no such file"):
        TextsOnDisk("gone.jsonl", "--input")


def _damaged(row: dict[str, object], generator: random.Random) -> bytes:
    """One random damage to a good row; some of them leave it good."""
    text = bytearray(json.dumps(row, ensure_ascii=generator.random() < 0.5).encode())
    values = ["", " ", "x", None, True, 1.5, [], [""], ["x"], [["x"]], {}, {"text": "x"}, "\x00", "\ud800", "😀" * 3000]
    kind = generator.randrange(6)
    if kind == 0:
        text[generator.randrange(len(text))] = generator.randrange(256)
    elif kind == 1:
        del text[generator.randrange(len(text)):]
    elif kind == 2:
        text.insert(generator.randrange(len(text)), generator.choice(b'{}[]",:\\\x00\xff\r\t 0e'))
    elif kind == 3:
        key = generator.choice([*row, "instruction", "extra", "Positive", "negs"])
        return json.dumps({**row, key: generator.choice(values)}).encode()
    elif kind == 4:
        return json.dumps({key: value for key, value in row.items() if key != generator.choice([*row])}).encode()
    else:
        text = text * 2 if generator.random() < 0.5 else bytearray(b"\xef\xbb\xbf") + text
    return bytes(text).replace(b"\n", b" ")


def test_fuzz_each_row_is_read_right_or_refused_with_its_line(write_rows: WriteRows):
    generator = random.Random(0)
    good = {"query": "什么是 it", "positive": ["a \"b\" \\ c", "d"], "negatives": ["é"]}
    num_read = num_refused = 0
    for _ in range(300):
        raw = _damaged(good, generator)
        path = write_rows([ROW, raw, ROW])
        try:
            record = RecordFile(path)[1]
        except DataError as error:
            assert str(error).startswith(f"{path}:2: "), error
            assert "\n" not in str(error)
            num_refused += 1
            continue
        num_read += 1
        if not raw.strip():
            assert record.source.endswith(":3")
            continue
        expected = json.loads(raw)  # what the standard library makes of the line, field by field
        as_tuple = {key: (value,) if isinstance(value, str) else tuple(value or ())
                    for key, value in expected.items() if key in ("positive", "negatives")}
        assert record.query == expected["query"]
        assert record.positive == as_tuple["positive"]
        assert record.negatives == as_tuple.get("negatives", ())
        assert record.instruction == expected.get("instruction")
    assert num_read > 30
    assert num_refused > 150


def _texts_in(value: object) -> list[str]:
    """Every string of a JSON value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in _texts_in(part)]


PEER = [{"query": "什么", "pos": ["a \"b\"", "d"], "neg": ["é"], "pos_scores": [1, 2.5], "neg_scores": [-1]},
        {"messages": [{"role": "user", "content": "q"}], "positive_messages": [[{"role": "user", "content": "p"}]]},
        {"query": "q", "positive_passages": [{"docid": "1", "title": "t", "text": "p"}], "negative_passages": []},
        {"sentence1": "一", "sentence2": "b", "score": 0.5}, {"text_a": "一", "text_b": "b", "score": 0.5}]


@pytest.mark.parametrize("good", PEER, ids=lambda row: "-".join(row)[:20])
def test_fuzz_of_rows_of_other_formats(good: dict[str, object], write_rows: WriteRows):
    """Damaged between good ones, with CRLF: read, as three rows or (blank) two, or refused with the row's line."""
    generator, kind = random.Random(1), "pairs" if "score" in good else "contrastive"
    num_read = num_refused = 0
    for _ in range(100):
        raw = _damaged(good, generator)
        if generator.random() < 0.2 and kind == "pairs":
            score = generator.choice([float("nan"), float("-inf"), "0.5", None, [1]])
            raw = json.dumps({**good, "score": score}).encode()
        path = write_rows([good, raw + b"\r", good])
        try:
            records = RecordFile(path, kind)
        except DataError as error:
            assert str(error).startswith(f"{path}:2: "), error
            assert "\n" not in str(error)
            num_refused += 1
            continue
        num_read += 1
        assert len(records) == (3 if raw.strip() else 2)
        if raw.strip():
            row, record = json.loads(raw), records[1]
            assert record.score == (row["score"] if kind == "pairs" else None)
            with_titles = "positive_passages" in row  # a title and its text are put together
            texts = {record.query} if with_titles else {record.query, *record.positive, *record.negatives}
            assert texts <= set(_texts_in(row))
    assert num_read > 5
    assert num_refused > 50
