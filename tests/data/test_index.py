"""The index of rows: it says what the rows say, is read instead of them, and is completed by the next start."""

import errno
import fcntl
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_embed.config.data import DataConfig, TrainFile
from megatron_embed.data import entry_index, file_mapping, index_parts, index_store
from megatron_embed.data.dataset import RecordSet, hold_out, open_records
from megatron_embed.data.formats import FORMATS, RowReader
from megatron_embed.data.index_store import IndexPlace
from megatron_embed.data.indexed_rows import JsonlRows
from megatron_embed.data.mixture import build_sampler
from megatron_embed.data.records import shared_keys, text_id
from megatron_embed.errors import ConfigError, DataError
from tests.data.conftest import MINI_EN, MINI_ZH

WriteRows = Callable[..., str]
REPOSITORY = Path(__file__).resolve().parents[2]


def mixed_rows(count: int) -> list[str]:
    """Rows of many shapes, with blank lines between them."""
    draw, lines = random.Random(1), []
    for index in range(count):
        row: dict[str, object] = {"query": f"q{index % (count - 9)} é", "positive": f"p{index}"}
        if index % 3 == 0:
            row["positive"] = [f"p{index}", f"p{index % 7}"]
            row["negatives"] = [f"n{index % 5}"] * draw.randrange(4)
        if index % 11 == 0:
            row["instruction"] = f"find {index % 2}"
        if index % 5 == 0:
            positives, negatives = row["positive"], row.get("negatives") or []
            row["positive_ids"] = [f"d{index}"] * (2 if isinstance(positives, list) else 1)
            row["negative_ids"] = [f"x{k}" for k in range(len(negatives))]  # type: ignore[arg-type]
        lines += [""] * draw.randrange(2) + [json.dumps(row)]
    return lines


def opened(path: str, directory: Path | str, **settings: object) -> RecordSet:
    return open_records((TrainFile(path=path, **settings),), place=IndexPlace(directory=str(directory)))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_index, "UNIT_BYTES", 5000)
    monkeypatch.setattr("megatron_embed.data.row_index.ROWS_OF_PART", 70)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and every later attempt to read rows in order fails."""
    def refuse(*_: object) -> None:
        raise AssertionError("rows are read")

    return lambda: monkeypatch.setattr(JsonlRows, "read", refuse)


def test_an_index_says_what_the_rows_say(write_rows: WriteRows, tmp_path: Path, small_parts: None,
                                         unreadable: Callable[[], None]):
    path = write_rows(mixed_rows(1000))
    alone = opened(path, "none")
    expected = list(alone)
    assert [int(record.source.rpartition(":")[2]) for record in expected] == [
        number for number, line in enumerate(Path(path).read_text().splitlines(), start=1) if line]
    opened(path, tmp_path / "index")
    unreadable()
    for records in (opened(path, tmp_path / "index"), alone):
        assert list(records) == expected
        assert (records.digest, records.instructions) == (alone.digest, alone.instructions)
        assert (records.most_positives, records.most_negatives, records.most_documents) == (2, 3, 5)
        rows = np.random.default_rng(0).permutation(1000)[:300]
        for num_negatives in (0, 2, 9):
            ids, owners = records.text_ids(rows, num_negatives)
            for position, row in enumerate(rows.tolist()):
                assert set(ids[owners == position].tolist()) == {
                    text_id(key) for key in shared_keys(expected[row], num_negatives)}
        kept, held = hold_out(records, 0.1, 1)
        assert held is not None
        assert sorted(map(expected.index, [*kept, *held])) == list(range(1000))
        np.testing.assert_array_equal(kept.text_ids(np.arange(50), 1)[0], records.text_ids(np.array([
            expected.index(record) for record in kept[:50]]), 1)[0])


def test_the_digest_is_that_of_the_rows_in_any_units(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch):
    lines = mixed_rows(300)
    digest = opened(write_rows(lines, "a.jsonl"), "none").digest
    monkeypatch.setattr(entry_index, "UNIT_BYTES", 999)
    assert opened(write_rows([line for line in lines if line], "b.jsonl"), "none").digest == digest
    assert opened(write_rows([*lines[2:], *lines[:2]], "c.jsonl"), "none").digest != digest
    assert opened(write_rows(lines[:-1], "d.jsonl"), "none").digest != digest


@pytest.mark.parametrize("change", ["text", "time", "columns", "damage", "half"])
def test_what_does_not_fit_any_more_is_read_again(write_rows: WriteRows, tmp_path: Path, small_parts: None, change: str,
                                                  monkeypatch: pytest.MonkeyPatch):
    path, settings = write_rows(mixed_rows(200)), {}
    before = opened(path, tmp_path / "index")
    folder = next((tmp_path / "index").iterdir())
    if change == "text":
        Path(path).write_text(Path(path).read_text().replace("p77", "P77"))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "columns":
        settings = {"columns": {"positive": "positive", "query": "query"}}
    elif change == "damage":
        next(folder.glob("*.bin")).write_bytes(b"12345678")
    else:
        (folder / "index.json").unlink()
        (folder / "000002.json").unlink()
    read: list[int] = []
    original = JsonlRows.read
    monkeypatch.setattr(JsonlRows, "read", lambda rows, begin=0, end=None, first_line=1: [
        read.append(begin)] and original(rows, begin, end, first_line))
    again = opened(path, tmp_path / "index", **settings)
    assert (again.digest == before.digest) == (change not in ("text", "columns"))
    assert len(again) == 200
    num_units = -(-os.path.getsize(path) // 5000)
    assert len(set(read)) == (2 if change in ("damage", "half") else num_units)
    folders = list((tmp_path / "index").iterdir())
    assert len(folders) == (2 if change == "columns" else 1)  # that of the file as it was is removed


@pytest.mark.parametrize("change", ["fewer rows", "text for a number", "another file's"])
def test_an_edited_index_is_made_again(write_rows: WriteRows, tmp_path: Path, small_parts: None, change: str):
    path = write_rows(mixed_rows(200))
    before = opened(path, tmp_path / "index")
    folder = before.files[0].index_folder
    assert folder is not None
    file, values = folder / "index.json", json.loads((folder / "index.json").read_text())
    if change == "fewer rows":
        file.write_text(json.dumps({**values, "values": values["values"][:1]}))
    elif change == "text for a number":
        file.write_text(file.read_text().replace('"most_positives": 2', '"most_positives": "2"'))
    else:
        other = opened(write_rows(mixed_rows(90), "other.jsonl"), tmp_path / "index").files[0].index_folder
        assert other is not None
        for part in other.iterdir():
            part.rename(folder / part.name)
    again = opened(path, tmp_path / "index")
    assert (len(again), again.digest, again.most_positives) == (200, before.digest, before.most_positives)
    assert [again[row] for row in range(200)] == [before[row] for row in range(200)]


def test_an_index_may_be_deleted_while_it_is_used(write_rows: WriteRows, tmp_path: Path, small_parts: None):
    """Its parts are mapped, and none is kept open: rows of 250 GB have 16,000 of them."""
    path = write_rows(mixed_rows(200))
    records = opened(path, tmp_path / "index")
    descriptors = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not [file for file in descriptors if file.endswith(".bin")]
    shutil.rmtree(tmp_path / "index")
    assert [record.query for record in records] == [record.query for record in opened(path, "none")]


@pytest.mark.parametrize("change", ["rows", "keys", "positives", "offsets"])
def test_a_row_that_the_index_was_not_made_of_is_refused(write_rows: WriteRows, tmp_path: Path, change: str):
    """Size and time of the file are those of before, or the index is damaged."""
    path = Path(write_rows([json.dumps({"query": f"q{row}", "positive": f"p{row}"}) for row in range(10, 30)]))
    records = opened(str(path), tmp_path / "index")
    folder, status, text = records.files[0].index_folder, path.stat(), path.read_text()
    assert folder is not None
    if change == "offsets":
        part = next(folder.glob("*.bin"))
        part.write_bytes(random.Random(1).randbytes(part.stat().st_size))
    else:
        path.write_text({"rows": "".join(line + "\n" for line in reversed(text.splitlines())),
                         "keys": text.replace("query", "queri"), "positives": text.replace("p17", "p71")}[change])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    records = opened(str(path), tmp_path / "index")
    row = 8 if change == "positives" else 1
    with pytest.raises(DataError, match=rf"rows\.jsonl: row {row} is not the one that its index was made of: .* remove "
                                        rf"the folder {folder}, then start the run again"):
        list(records)


def test_ranks_without_locks_write_the_same_index(write_rows: WriteRows, tmp_path: Path, small_parts: None,
                                                  monkeypatch: pytest.MonkeyPatch):
    """Both read all rows; the first to end removes what it takes for the remains of killed ones."""
    path, rename = write_rows(mixed_rows(200)), Path.rename
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        opened(path, tmp_path / "index")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert opened(path, tmp_path / "index").digest == opened(path, "none").digest


@pytest.mark.parametrize("directory", ["index", "none"])
def test_columns_are_found_in_any_unit_and_missed_at_every_start(write_rows: WriteRows, tmp_path: Path,
                                                                 small_parts: None, directory: str):
    """A process that reads other units than that with the column, or none, answers as one that reads all."""
    lines = [json.dumps({"text": f"q{row}", "positive": f"p{row}"}) for row in range(400)]
    path = write_rows([*lines[:-1], json.dumps({"text": "q", "positive": "p", "bad": "n"})])
    kept = directory if directory == "none" else tmp_path / directory
    for _ in range(2):
        assert opened(path, kept, columns={"text": "query", "bad": "negatives"}).most_negatives == 1
    errors = []
    for start in range(3):
        with pytest.raises(DataError) as caught:
            opened(path, kept, columns={"text": "query", "worst": "negatives"})
        errors.append(str(caught.value))
        if start == 1 and directory == "index":  # what a process finds that reads the last unit alone
            folder = max((tmp_path / directory).iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
            (folder / "index.json").unlink()
            max(folder.glob("0*.json")).unlink()
    assert set(errors) == {f"{path}:1: data.train.columns names 'worst', and the row has 'text', 'positive'; no other "
                           "row has it either; correct the name, or leave it out"}


@pytest.mark.parametrize("line", [150, 4])
def test_a_bad_row_is_named_by_its_line_every_time(write_rows: WriteRows, tmp_path: Path, small_parts: None, line: int):
    lines = mixed_rows(300)
    lines[line - 1:line] = ["", '{"query": " ", "positive": "b"}', "{broken"]
    lines[400:400] = ["also broken"]
    path = write_rows(lines)
    for directory in ("none", tmp_path / "index", tmp_path / "index"):
        with pytest.raises(DataError, match=rf"rows\.jsonl:{line + 1}: query = ' ' is empty"):
            opened(path, directory)
    good = [row for row in lines if row and "broken" not in row and '" "' not in row]
    Path(path).write_text("\n".join(good) + "\n")
    assert len(opened(path, tmp_path / "index")) == len(good)


SEVERAL = """
import sys, time
from megatron_embed.config.data import TrainFile
from megatron_embed.data import entry_index
from megatron_embed.data.dataset import open_records
from megatron_embed.data.index_store import IndexPlace
from megatron_embed.errors import DataError
entry_index.UNIT_BYTES, rank, pause = 5000, int(sys.argv[3]), float(sys.argv[4])
original, read = entry_index._Entry.read_unit, []
def slow(self, unit, *rest):
    read.append(unit.begin // 5000)
    time.sleep(pause)
    return original(self, unit, *rest)
entry_index._Entry.read_unit = slow
try:
    records = open_records((TrainFile(path=sys.argv[1]),),
                           place=IndexPlace(directory=sys.argv[2], rank=rank, world_size=2))
    print(records.digest, len(read))
except DataError as error:
    print(error)
"""


def start(path: str, directory: Path, rank: int, pause: float) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", SEVERAL, path, str(directory), str(rank), str(pause)], text=True,
                            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_processes_share_the_work_and_a_killed_one_leaves_what_it_has_done(write_rows: WriteRows, tmp_path: Path,
                                                                          small_parts: None):
    path, directory = write_rows(mixed_rows(2000)), tmp_path / "index"
    num_units = -(-os.path.getsize(path) // 5000)
    first = start(path, directory, 0, 0.05)
    while len(list(directory.glob("*/*.json"))) < 3:
        time.sleep(0.02)
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = len(list(directory.glob("*/*.json")))
    assert 3 <= done < num_units
    both = [start(path, directory, rank, 0.02) for rank in range(2)]
    results = [process.communicate()[0].split() for process in both]
    assert {digest for digest, _ in results} == {opened(path, "none").digest}
    assert sum(int(read) for _, read in results) == num_units - done
    assert opened(path, directory).digest == results[0][0]


def test_processes_refuse_one_row_alike(write_rows: WriteRows, tmp_path: Path):
    lines = mixed_rows(1500)
    lines[700], lines[2000] = "{", "{"
    path = write_rows(lines)
    results = {process.communicate()[0] for process in [start(path, tmp_path / "index", rank, 0.01)
                                                        for rank in range(2)]}
    assert len(results) == 1
    assert results.pop().startswith(f"{path}:701: not valid JSON")


def test_the_directory(write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                       caplog: pytest.LogCaptureFixture):
    path = write_rows(mixed_rows(50))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    default = IndexPlace(directory=None)
    open_records((TrainFile(path=path),), place=default)
    assert not (tmp_path / "cache").exists()  # few rows are read sooner than found
    monkeypatch.setattr(index_store, "SMALLEST_KEPT", 10)
    with caplog.at_level(logging.INFO):
        open_records((TrainFile(path=path),), place=default)
    assert "are read and checked for the index, once for all starts, by 1 process" in caplog.text
    assert len(list((tmp_path / "cache" / "megatron_embed" / "index").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.index_directory = '.*file': cannot be written .*choose a directory"):
        opened(path, tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_records((TrainFile(path=path),), place=default)) == 50
    assert "so every start reads all rows; set data.index_directory" in caplog.text
    with pytest.raises(ConfigError, match="data.index_directory = '': must name a directory"):
        DataConfig(index_directory="")


@pytest.mark.parametrize("directory", ["index", None])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_full_disk(write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     caplog: pytest.LogCaptureFixture, directory: str | None, writes: int):
    """From the first file on, or behind the first: an error in a directory that is named, else a start without one."""
    path = write_rows(mixed_rows(50))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setattr(index_store, "SMALLEST_KEPT", 10)
    done: list[int] = []

    def fail(number: int) -> None:
        done.append(number)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        if directory is None:
            whole = open_records((TrainFile(path=path),), place=IndexPlace(directory=None))
            assert len(done) == writes + 1
        else:
            with pytest.raises(ConfigError, match=rf"data.index_directory = {directory!r}: .*rows-.* cannot be written "
                                                  r"\(No space left on device\); free space there, set another "
                                                  "directory, or 'none' to read all rows"):
                open_records((TrainFile(path=path),), place=IndexPlace(directory=directory))
    assert ("cannot be written (No space left on device), so every start reads all rows; set data.index_directory"
            in caplog.text) == (directory is None)
    assert sorted(file.name for file in tmp_path.glob("**/rows-*/*")) == ["000000.000.bin", "locks"][1 - writes:]
    again = open_records((TrainFile(path=path),), place=IndexPlace(directory=directory))
    assert len(again) == 50
    if directory is None:
        assert (len(whole), whole.digest) == (50, again.digest)
        assert [whole[row] for row in range(50)] == [again[row] for row in range(50)]


def test_rows_cost_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Hashes and offsets of many rows are in a file that is mapped, also where no index is kept."""
    monkeypatch.setattr(index_parts, "_IN_MEMORY", 0)
    writer = index_parts.PartWriter()
    for row in range(3):
        writer.add_texts([b"q", b"p"], (1, 0, False), (row + 1, 10 * row, 10 * row + 10))
    part = index_parts.Part(*writer.finish())
    assert isinstance(part._array("texts").base.base, file_mapping._Mapping)
    assert part.location(1) == (2, 10, 20)


ODD_VALUES = ["text", "", " ", "\u2003", "é", "\ud83d", None, [], ["a", "b"], ["a", " "], ["a", None], [["a"]], 0, 3,
              False, {}, {"text": "a"}, [""]]


@pytest.mark.parametrize("key", ["query", "positive", "negatives", "instruction", "negative_ids", "other", "negativ"])
def test_rows_on_the_short_way_are_those_of_the_long_way(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch,
                                                         key: str):
    def outcome(path: str) -> object:
        try:
            records = opened(path, "none")
            return records.digest, list(records), [part.tolist() for part in records.text_ids(np.arange(3), 2)], (
                records.most_positives, records.most_negatives, records.instructions)
        except DataError as error:
            return str(error)

    good = {"query": "q", "positive": "p", "negatives": ["n"], **({} if key == "query" else {key: "text"})}
    if key in ("negativ", "negative_ids"):
        del good[key]
    good["negatives"], shorts = ["n"], []
    original = RowReader.plain_texts
    monkeypatch.setattr(RowReader, "plain_texts", lambda *given: shorts.append(original(*given)) or shorts[-1])
    paths = [write_rows([json.dumps(row) for row in (good, {**good, key: value}, good)], f"{number}.jsonl")
             for number, value in enumerate(ODD_VALUES)]
    short = [outcome(path) for path in paths]
    assert any(texts is not None for texts in shorts) == (key not in ("instruction",))
    monkeypatch.setattr(RowReader, "plain_texts", lambda *_: None)
    assert [outcome(path) for path in paths] == short


def test_what_a_run_of_an_earlier_version_knows():
    """Digest, rows held out and rows of some steps, as the version before the index had them."""
    records = open_records((TrainFile(path=str(MINI_EN)), TrainFile(path=str(MINI_ZH))))
    train, held = hold_out(records, 0.05, 3, order=1)
    assert held is not None
    sampler = build_sampler(train, DataConfig(num_negatives=1), global_batch_size=64, seed=5, order=1)
    assert train.digest_of_order_1 == "e225ec85097a7d921760cbaae92998c1" != train.digest
    assert [int(record.source.rpartition(":")[2]) for record in held[:6]] == [1, 18, 73, 90, 137, 179]
    assert [sampler.rows_of_step(step)[:3] for step in (0, 3, 17, 40, 90)] == [
        [829, 455, 514], [1519, 1444, 1811], [1180, 1694, 1208], [530, 458, 856], [886, 560, 792]]


def test_checks_of_all_rows_are_passed_once(write_rows: WriteRows, tmp_path: Path):
    path, calls = write_rows(mixed_rows(30)), []
    for directory, times in ((tmp_path / "index", 2), ("none", 6)):
        for settings in "aabaab":
            opened(path, directory).check_once(settings, functools.partial(calls.append, directory))
        assert calls.count(directory) == times
    with pytest.raises(ConfigError, match="no"):
        opened(path, tmp_path / "index").check_once("c", lambda: (_ for _ in ()).throw(ConfigError("no")))
    opened(path, tmp_path / "index").check_once("c", lambda: calls.append("c"))
    assert "c" in calls  # what was refused is checked again
    assert len({form.name for form in FORMATS}) == len(FORMATS)  # an index names the format
