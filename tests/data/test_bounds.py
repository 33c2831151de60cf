"""Files that are small on the disk and large in memory, and rows without a bottom: FILE:LINE, at once."""

import gzip
import json
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow
import pytest

from megatron_embed.data import jsonl
from megatron_embed.data.corpus import TextsOnDisk
from megatron_embed.data.dataset import RecordFile
from megatron_embed.data.jsonl import parse_object
from megatron_embed.errors import ConfigError, DataError
from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.reranking import load_rerank_file
from megatron_embed.evaluation.sts import load_sts
from tests.helpers.toys import REPOSITORY

ROW = b'{"query": "a", "positive": "b"}\n'


def write_bomb(path, size, filling=b"x", before=ROW):
    """A file of one row and one line of `size` bytes without end, as compressed as its name says."""
    block = filling * (1 << 20)
    if path.suffix == ".gz":
        packer = zlib.compressobj(1, wbits=31)
        with path.open("wb") as file:
            file.write(packer.compress(before))
            for _ in range(size >> 20):
                file.write(packer.compress(block))
            file.write(packer.flush())
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(before)
            for _ in range(size >> 20):
                file.write(block)
    else:
        with path.open("wb") as file:
            file.write(before)
            file.truncate(len(before) + size)  # zeros, which take no space
    return str(path)


READ = """
import resource, sys
from megatron_embed.data.dataset import RecordFile
from megatron_embed.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    RecordFile(sys.argv[1])
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_line_of_half_a_gigabyte_is_refused_in_little_memory(tmp_path, name):
    path = write_bomb(tmp_path / name, 1 << 29)
    assert name == "rows.jsonl" or Path(path).stat().st_size < 4 << 20
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=60, check=True,
                          env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "OMP_NUM_THREADS": "1"})
    message, mebibytes = done.stdout.splitlines()
    assert message.startswith(f"{path}:2: a line of more than 64 MiB; ")
    assert int(mebibytes) < 300


@pytest.fixture
def short_lines(monkeypatch):
    """A limit that a test can afford to exceed."""
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1000)
    monkeypatch.setattr(jsonl, "MOST_BLANK_LINES", 50)


def test_line_at_the_limit_is_read(tmp_path, short_lines):
    path = tmp_path / "rows.jsonl"
    for length in (999, 1000, 1001):
        row = json.dumps({"text": ""})
        path.write_text(json.dumps({"text": "x" * (length - len(row) - 1)}) + "\n", encoding="utf-8")
        assert path.stat().st_size == length
        if length <= 1000:
            assert len(TextsOnDisk(str(path), "--input")) == 1
        else:
            with pytest.raises(DataError, match="rows.jsonl:1: a line of more than"):
                TextsOnDisk(str(path), "--input")


def beir_folder(folder, qrels="q\td\t1\n", corpus='{"_id": "d", "text": "b"}\n', queries='{"_id": "q", "text": "a"}\n'):
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    (folder / "queries.jsonl").write_text(queries, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("files, words", [
    ({"qrels": "q\td\t1\n" + "q" * 2000}, "test.tsv:2: a line of more than"),
    ({"corpus": '{"_id": "d", "text": "' + "b" * 2000 + '"}\n'}, "corpus.jsonl:1: a line of more than"),
    ({"queries": '{"_id": "q", "text": "a"}\n' + " " * 2000}, "queries.jsonl:2: a line of more than"),
    ({"queries": "\n" * 100 + '{"_id": "q", "text": "a"}\n'}, "queries.jsonl:51: more than 50 blank lines"),
    ({"qrels": f"q\td\t{2**31 - 1}\n"}, "test.tsv:1: score = 2147483647: ranking metrics take grades up to 1000000"),
    ({"qrels": f"q\td\t-{10**18}\n"}, "test.tsv:1: score = -1000000000000000000: ranking metrics"),
    ({"qrels": f"q\td\t{'9' * 900}\n"}, "test.tsv:1: score = 9999"),
])
def test_evaluation_files_have_the_same_bounds(tmp_path, short_lines, files, words):
    with pytest.raises(DataError) as caught:
        load_beir(beir_folder(tmp_path, **files))
    assert words in str(caught.value) and len(str(caught.value)) < 400


def test_labels_of_lists_and_scores_of_pairs(tmp_path):
    """trec_eval takes 16 GB and two minutes for a grade of 2**31 - 1, and makes 0.0 of nDCG 1.0 for one of 10**18."""
    lists, pairs = tmp_path / "lists.jsonl", tmp_path / "pairs.jsonl"
    lists.write_text(json.dumps({"query": "a", "documents": ["b", "c"], "labels": [2**31 - 1, 0]}) + "\n")
    with pytest.raises(DataError, match="lists.jsonl:1: label = 2147483647.0: ranking metrics take grades up to"):
        load_rerank_file(str(lists))
    pairs.write_text('{"text_a": "a", "text_b": "b", "score": 1' + "0" * 400 + "}\n")
    with pytest.raises(DataError, match="pairs.jsonl:1: score = .* is not finite"):
        load_sts(str(pairs))


@pytest.mark.parametrize("depth", [101, 900, 985, 100_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_deep_rows_are_refused_with_their_line(depth, opening, closing):
    """Just below Python's own limit a row was read, and then could not be printed."""
    raw = f'{{"query": {opening * depth}1{closing * depth}}}'.encode()
    with pytest.raises(DataError, match="^rows.jsonl:7: nested more than 100 levels deep; correct the line$"):
        parse_object(raw, "rows.jsonl:7")
    parse_object(f'{{"query": {opening * 49}1{closing * 49}}}'.encode(), "rows.jsonl:7")


def test_brackets_in_texts_are_no_depth():
    text = "[{" * 100_000
    assert parse_object(json.dumps({"text": text}).encode(), "rows.jsonl:1") == {"text": text}


def test_row_of_empty_lists_is_refused_before_it_is_held():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="rows.jsonl:1: more than 1,000,000 brackets"):
        parse_object(b'{"positive": [' + b"[]," * 8_000_000 + b"[]]}", "rows.jsonl:1")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 200 << 10


def test_damaged_file_still_names_its_line(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(ROW * 1000)[:-20])
    with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: cannot be read on"):
        RecordFile(str(path))


def test_parquet_that_says_how_large_it_is(tmp_path, monkeypatch):
    from pyarrow import parquet, table

    from megatron_embed.data import row_source as raw_rows

    monkeypatch.setattr(raw_rows, "LONGEST_LINE", 1 << 20)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.parquet"
    parquet.write_table(table({"query": ["a"], "positive": ["x" * (2 << 20)]}), path, use_dictionary=False)
    assert path.stat().st_size < 1 << 18
    with pytest.raises(ConfigError, match=r"rows.parquet'?: cannot be read: row group 0 says that its 1 rows take"):
        RecordFile(str(path))
