"""The cut of the data that the life cycle is shown on: no test query and no held-out row is trained on."""

import argparse
import json
import statistics
import sys

import megatron_embed
from megatron_embed.evaluation.beir import load_beir
from tests.helpers.toys import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
import circle


def test_the_cut_is_disjoint_and_whole(tmp_path):
    args = argparse.Namespace(data=str(REPOSITORY / "examples" / "data" / "mini_zh"), held_out=50, rows=200,
                              queries=40, documents=150)
    for name in ("one", "two"):
        circle.cut_data(args, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 7
    assert all((tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text() for file in files)
    rows = [json.loads(line) for line in (tmp_path / "one" / "train.jsonl").read_text().splitlines()]
    test, held = load_beir(str(tmp_path / "one" / "test")), load_beir(str(tmp_path / "one" / "held_out"))
    queries, read = {row["query"] for row in rows}, {text for row in rows for text in row["positive"]}
    assert len(rows) == 200 and len(held.query_ids) == 50 and len(test.query_ids) == 40
    assert not queries & {*held.query_texts, *test.query_texts}
    needed = {document for labels in test.qrels.values() for document in labels}
    assert len(test.document_ids) == 150 and needed <= set(test.document_ids)
    assert not read & {text for name, text in zip(test.document_ids, test.document_texts, strict=True)
                       if name in needed}


def test_the_table_gives_means_over_the_seeds():
    scores = dict.fromkeys(circle.STAGES, 0.5) | {"baseline": 0.25, "weight": 0.4}
    lines = circle.table({1: scores, 2: scores | {"merged": 0.7}}).splitlines()
    assert len(lines) == len(circle.STAGES) + 4
    assert lines[2].endswith("| 0.2500 ± 0.0000 | +0.0000 | 0.2500, 0.2500 |")
    assert "| slerp of both trained models | 0.6000 ± 0.1414 | +0.3500 | 0.5000, 0.7000 |" in lines


def test_the_gain_is_over_queries_of_means_over_seeds():
    by_seed = [[0.0, 0.5, -0.1, 0.2], [0.2, 0.3, 0.1, 0.0]]
    by_query = [0.1, 0.4, 0.0, 0.1]
    error = statistics.stdev(by_query) / 2
    words = circle.gain("reranked", by_seed)
    assert f": +0.1500, 95 % interval {0.15 - 1.96 * error:+.4f} to {0.15 + 1.96 * error:+.4f} (4 queries, " in words
    assert words.endswith(f"t = {0.15 / error:.2f})")


def test_a_command_in_a_child_gives_its_code_and_its_output(monkeypatch, capfd):
    monkeypatch.setattr(circle, "LIBRARIES", ())
    assert circle.run_forked(["--version"]) == (0, f"megatron-embed {megatron_embed.__version__}\n")
    assert circle.run_forked(["evaluate", "--model", "nowhere", "--data", "nowhere"]) == (2, "")
    out, err = capfd.readouterr()
    assert out == "" and "megatron-embed: error: " in err
