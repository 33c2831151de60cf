"""Rows of a data set of the hub that are taken as they come. The hub itself is stood for by a directory as it holds
them, which `datasets` opens in the same way, and by streams that are put in its place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import RecordFile, open_records
from megatron_embed.errors import ConfigError, DataError
from tests.helpers.foreign_rows import beir, hub_copy, our_rows


def in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    """Streams of `rows`, a generator function; what was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load(repository: str, name: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((repository, name, split, streaming))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_stream_holds_the_rows_of_the_set_whatever_the_order_of_reading(tmp_path: Path):
    path = hub_copy(tmp_path, our_rows()).path
    whole, stream = RecordFile(path), RecordFile(TrainFile(path=path, streaming=True))
    assert len(stream) == len(whole) == 12
    for row in (11, 0, 5, 5, 3):
        assert stream[row] == whole[row]
        assert stream[row].query == our_rows()[row]["query"]
        assert stream[row].source == f"{path}:{row + 1}"
    assert stream.digest == whole.digest  # a run may resume with the other one
    part = RecordFile(TrainFile(path=path, streaming=True, rows=7))
    assert [record.query for record in part] == [record.query for record in whole][:7]
    assert part.digest != whole.digest


@pytest.mark.parametrize("streaming", [True, False])
def test_configurations_and_splits_of_a_copy_are_named_as_the_hubs(tmp_path: Path, streaming: bool):
    path = hub_copy(tmp_path, our_rows()).path
    records = RecordFile(TrainFile(path=f"{path}:de/dev", streaming=streaming))
    assert [record.query for record in records] == [row["query"] for row in our_rows()][6:]
    with pytest.raises(ConfigError, match=r"repository:de/test': cannot be read: "):
        RecordFile(TrainFile(path=f"{path}:de/test", streaming=streaming))


def test_no_more_rows_are_fetched_than_asked_for(monkeypatch: pytest.MonkeyPatch):
    fetched = []

    def endless() -> Iterator[dict[str, str]]:
        for row_id in range(10**9):
            fetched.append(row_id)
            yield {"anchor": f"q{row_id}", "positive": f"p{row_id}"}

    asked = in_place_of_the_hub(monkeypatch, endless)
    records = RecordFile(TrainFile(path="org/name:de/dev", streaming=True, rows=5))
    assert asked == [("org/name", "de", "dev", True)]
    assert [record.positive for record in records] == [(f"p{row_id}",) for row_id in range(5)]
    assert len(fetched) <= 6
    with pytest.raises(IndexError):
        records[5]


def test_a_bad_row_and_a_failing_line_are_named_by_the_rows_number(monkeypatch: pytest.MonkeyPatch):
    def bad() -> Iterator[dict[str, str]]:
        yield {"anchor": "q", "positive": "p"}
        yield {"anchor": "q", "positive": ""}

    def failing() -> Iterator[dict[str, str]]:
        yield {"anchor": "q", "positive": "p"}
        raise ConnectionError("the line\nis cut")

    for rows, words in ((bad, r"org/name:2: positive = '' is empty"),
                        (failing, r"org/name:2: cannot be fetched: the line; look at the network")):
        in_place_of_the_hub(monkeypatch, rows)
        with pytest.raises(DataError, match=words):
            RecordFile(TrainFile(path="org/name", streaming=True))


def test_what_lies_on_the_machine_is_not_streamed(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "positive": "p"}\n', encoding="utf-8")
    datasets.Dataset.from_list([{"query": "q", "positive": "p"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "beir").mkdir()
    for path in (str(tmp_path / "rows.jsonl"), str(tmp_path / "saved"), beir(tmp_path / "beir", our_rows(3)).path):
        with pytest.raises(ConfigError, match=r"data\.train\.streaming = True: .* is not a data set of the hub"):
            open_records((TrainFile(path=path, streaming=True),))
