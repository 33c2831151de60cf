"""What mining says of its result: every candidate is accounted for, the table's numbers, sample rows, rows left out."""

import io
import json

import numpy as np
import pytest

from megatron_embed.__main__ import main
from megatron_embed.mining.bm25 import mine_bm25
from megatron_embed.mining.filters import EXCLUDED, MiningOptions, select_negatives
from megatron_embed.mining.report import report, samples
from megatron_embed.mining.task import Mined, MinedRows, build_task, write_rows
from tests.helpers.given_vectors import record

CANDIDATES = [(document, 1.0 - document / 20) for document in range(20)]


@pytest.mark.parametrize("options, skipped", [
    ({}, {EXCLUDED: 2, "--range-max": 14, "not needed": 1}),
    ({"num_negatives": 30}, {EXCLUDED: 2, "--range-max": 14}),
    ({"range_min": 3}, {EXCLUDED: 2, "--range-min": 3, "--range-max": 14}),
    ({"max_score": 0.8, "min_score": 0.5}, {EXCLUDED: 2, "--max-score": 2, "--min-score": 9, "--range-max": 3,
                                            "not needed": 1}),
    # A score below one bound and above another counts at the first: the lowest positive is 0.85.
    ({"max_score": 0.8, "absolute_margin": 0.1, "relative_margin": 0.5},
     {EXCLUDED: 2, "--max-score": 2, "--absolute-margin": 1, "--relative-margin": 7, "--range-max": 4,
      "not needed": 1}),
    ({"reranked": True}, {EXCLUDED: 2})])
def test_every_candidate_is_a_negative_or_skipped_for_one_reason(options, skipped):
    settings = MiningOptions(**options)
    selection = select_negatives(CANDIDATES, {0, 3}, [1.0, 0.85], settings, last_rank=4, query=0)
    assert selection.skipped == skipped
    assert len(selection.negatives) + sum(skipped.values()) == len(CANDIDATES)


@pytest.mark.parametrize("collect", [list, "rows"])
def test_table(collect):
    """Also from the compact form, which knows the sum of what was skipped only."""
    mined = [Mined(positive_scores=[0.9, 0.5], negatives=[(1, 0.4), (2, 0.2)], skipped={EXCLUDED: 2, "--max-score": 5}),
             Mined(positive_scores=[0.7], negatives=[], skipped={"--max-score": 1200}),
             Mined(positive_scores=[0.75], negatives=[(0, 0.25)])]
    if collect == "rows":
        rows = MinedRows()
        for result in mined:
            rows.append(result)
        mined = rows
    lines = report(mined, MiningOptions(max_score=0.8)).splitlines()
    table = {line[:14].strip(): line[14:].split() for line in lines[1:10]}
    assert table[""] == ["positive", "negative", "difference"]
    assert table["count"] == ["4", "3", "3"]
    assert table["mean"] == ["0.7125", "0.2833", "0.3000"]
    assert table["median"] == ["0.7250", "0.2500", "0.3000"]
    assert (table["minimum"], table["maximum"]) == (["0.5000", "0.2000", "0.1000"], ["0.9000", "0.4000", "0.5000"])
    assert table["quantile 25 %"][1] == f"{np.quantile([0.4, 0.2, 0.25], 0.25):.4f}"
    assert [line.split(maxsplit=1) for line in lines[11:]] == [
        ["2", "positives, other forms of them, or the query's own text"], ["1,205", "--max-score 0.8"]]


def test_samples_and_rows_left_out():
    records = [record(f"query {row} alpha", [f"alpha beta {row} 中" + "x" * 200], []) for row in range(30)]
    task = build_task(records, [""] * 30, None)
    mined = mine_bm25(task, MiningOptions(num_negatives=2))
    shown = samples(records, task, mined, 4).splitlines()
    assert [line.split()[-2] for line in shown if ":1: query" in line] == ["0", "10", "19", "29"]
    assert sum(line.startswith("  + ") for line in shown) == 4 and sum(line.startswith("  - ") for line in shown) == 8
    assert all(len(line) < 130 for line in shown) and "中" in shown[1]
    mined[7].negatives.pop()
    mined[8].negatives.clear()
    assert "query 8 alpha" in samples(records, task, mined, 30) and "query 8 alpha" not in samples(
        records, task, mined, 30, 2)
    for least, left in ((0, 30), (1, 29), (2, 28)):
        file = io.StringIO()
        write_rows(file, records, task, mined, least)
        queries = [json.loads(line)["query"] for line in file.getvalue().splitlines()]
        assert len(queries) == left and ("query 8 alpha" in queries) == (least == 0)


def test_command_drops_and_shows(tmp_path, caplog, capsys):
    data, output = tmp_path / "train.jsonl", tmp_path / "mined.jsonl"
    rows = [{"query": f"alpha {row}", "positive": [f"alpha text {row}"]} for row in range(6)]
    rows.append({"query": "omega", "positive": ["omega text alone"]})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["mine", "--model", "bm25", "--data", str(data), "--output", str(output), "--num-negatives", "2"]
    with caplog.at_level("INFO", logger="megatron_embed"):
        assert main([*arguments, "--drop-incomplete", "--show", "2"]) == 0
    assert len(output.read_text().splitlines()) == 6
    messages = [entry.getMessage() for entry in caplog.records]
    assert f"{output}: 1 rows with fewer than 2 negatives are left out, 6 remain" in messages
    assert any("candidates skipped:" in message for message in messages)
    assert f"{data}:1: alpha 0" in messages[-1] and f"{data}:6: alpha 5" in messages[-1]
    assert main([*arguments, "--drop-incomplete", "9"]) == 2
    assert "--drop-incomplete 9: every row has fewer negatives, at most 2" in capsys.readouterr().err
