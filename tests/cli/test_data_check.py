"""`data check`: every number it prints, counted by hand on rows made for it, and what it refuses."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from transformers import AutoTokenizer

from megatron_embed.__main__ import main
from tests.helpers.toys import MINI_EN, MINILM, REPOSITORY

ROWS = [
    {"query": "a b c", "positive": ["p one"], "negatives": ["n one", "n two"]},
    {"query": "a b c", "positive": ["p two"], "negatives": ["n one"]},
    {"query": "d", "positive": ["p one", "p three"], "negatives": ["p three"]},
    {"query": "e", "positive": ["p four"]}]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def checked(capsys, *arguments):
    code = main(["data", "check", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_counts_of_rows(rows, capsys):
    (counts,) = json.loads(checked(capsys, rows, "--json"))
    assert counts == {
        "path": rows, "rows": 4, "pairs with a score": 0, "lists with labels": 0, "rows without negatives": 1,
        "rows with fewer negatives than data.num_negatives": 0, "rows whose positive is one of their negatives": 1,
        "rows with one id for a positive and a negative (training refuses them)": 0,
        "rows whose query an earlier row has": 1, "rows that share their positive with another": 2}
    assert checked(capsys, rows).splitlines() == [
        f"{rows}: 4 rows", "  rows without negatives: 1 (25.0%)",
        "  rows whose positive is one of their negatives: 1 (25.0%)",
        "  rows whose query an earlier row has: 1 (25.0%)",
        "  rows that share their positive with another: 2 (50.0%)"]


def test_files_of_all_kinds_side_by_side(rows, tmp_path, capsys):
    pairs, lists = tmp_path / "pairs.jsonl", tmp_path / "lists.jsonl"
    pairs.write_text('{"text_a": "a", "text_b": "b", "score": 1}\n')
    lists.write_text('{"query": "a", "docs": [{"text": "b", "label": 0}]}\n')
    counts = json.loads(checked(capsys, rows, str(pairs), str(lists), "--json"))
    assert [entry["rows"] for entry in counts] == [4, 1, 1]
    assert [entry["pairs with a score"] for entry in counts] == [0, 1, 0]
    assert [entry["lists with labels"] for entry in counts] == [0, 0, 1]
    assert [entry["rows without negatives"] for entry in counts] == [1, 0, 0]


def test_tokens_of_real_rows_under_a_configuration(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "model": {"path": str(MINILM)}, "embedding": {"pooling": "mean"},
        "data": {"train": [str(MINI_EN)], "num_negatives": 1, "query_prompt": "query: ", "query_max_length": 16,
                 "document_max_length": 200}}))
    (counts,) = json.loads(checked(capsys, str(config), "data.query_max_length=20", "--json"))
    lines = [json.loads(line) for line in MINI_EN.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(str(MINILM))
    texts = {"query": ["query: " + row["query"] for row in lines],
             "document": [text for row in lines for text in (row["positive"][0], *row["negatives"][:1])]}
    for role, limit in (("query", 20), ("document", 200)):
        lengths = [len(ids) for ids in tokenizer(texts[role])["input_ids"]]
        tokens = counts[f"{role} tokens"]
        assert (tokens["texts"], tokens["longest"], tokens["at"]) == (len(lengths), max(lengths), limit)
        assert tokens["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.06)
        assert tokens["cut"] == sum(length > limit for length in lengths) > 0
        assert tokens["median"] == sorted(lengths)[len(lengths) // 2]
        bins = Counter(max(16, 1 << (length - 1).bit_length()) for length in lengths)
        assert {int(name[3:]): count for name, count in tokens["histogram"].items() if count} == dict(bins)
    assert counts["rows with fewer negatives than data.num_negatives"] == sum(not row["negatives"] for row in lines)
    assert "texts are cut at 20, 0 have no tokens" in checked(capsys, str(config), "data.query_max_length=20")


def pair_lengths(rows, num_negatives):
    tokenizer = AutoTokenizer.from_pretrained(str(MINILM))
    return [len(tokenizer(row["query"], document)["input_ids"]) for row in rows
            for document in (*row["positive"], *row["negatives"][:num_negatives])]


def test_pairs_of_a_reranker_are_counted_at_their_own_length(tmp_path, capsys):
    lines = [json.loads(line) for line in MINI_EN.read_text().splitlines()][:48]
    lines = [{**line, "negatives": [*line["negatives"], *other["positive"], "short"][:3 * (row > 2)]}
             for row, (line, other) in enumerate(zip(lines, reversed(lines), strict=True))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "task": "reranker", "model": {"path": str(MINILM)}, "objective": {"loss": "listwise"},
        "reranker": {"max_length": 64}, "data": {"train": [str(data)], "num_negatives": 1}}))
    for settings, negatives, limit in ((["data.document_sampling=first"], 1, 64), ([], None, 64),
                                       (["reranker.max_length=null", "data.query_max_length=20",
                                         "data.document_max_length=80"], None, 100)):
        (counts,) = json.loads(checked(capsys, str(config), *settings, "--json"))
        lengths = pair_lengths(lines, negatives)
        pairs = counts["pair tokens"]
        assert (pairs["texts"], pairs["longest"], pairs["at"]) == (len(lengths), max(lengths), limit)
        assert pairs["cut"] == sum(length > limit for length in lengths) > 0
        assert not counts.keys() & {"query tokens", "document tokens"}
        assert counts["rows with fewer negatives than data.num_negatives"] == sum(not row["negatives"] for row in lines)
    assert f"of {len(lengths)} pairs are cut at reranker.max_length = 64" in checked(capsys, str(config))
    data.write_text('{"query": "' + "long " * 70 + '", "positive": "a"}\n')
    assert main(["data", "check", str(config)]) == 2
    assert "of reranker.max_length = 64 tokens, which leaves none for the document" in capsys.readouterr().err


def test_texts_are_cut_at_the_models_positions(rows, tmp_path, capsys, caplog):
    with open(rows, "a", encoding="utf-8") as file:
        file.write(json.dumps({"query": "f", "positive": "word " * 600}) + "\n")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"model": {"path": str(MINILM)}, "data": {
        "train": [rows], "query_max_length": 512, "document_max_length": 8192}}))
    (counts,) = json.loads(checked(capsys, str(config), "--json"))
    documents = counts["document tokens"]
    assert (documents["at"], documents["longest"], documents["cut"], counts["query tokens"]["at"]) == (512, 602, 1, 512)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["data.document_max_length = 8192 is longer than the model's 512 positions, which training refuses; "
                    "lengths are compared with these"]
    caplog.clear()
    for length, expected in ((), 256), (("--max-length", "300"), 300), (("--max-length", "8192"), 512):
        (counts,) = json.loads(checked(capsys, rows, "--model", str(MINILM), "--json", *length))
        assert counts["document tokens"]["at"] == counts["query tokens"]["at"] == expected
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "--max-length = 8192 is longer than the model's 512 positions; lengths are compared with these"]


def test_refusals(rows, tmp_path, capsys):
    with open(rows, "a", encoding="utf-8") as file:
        file.write('{"query": "q", "positive": ""}\n')
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {MINILM}}}\n")
    for arguments, words in (
            ([rows], f"{rows}:5: positive = '' is empty"), ([str(tmp_path / "no.jsonl")], "no such file"),
            ([str(config)], "data.train = []: there is nothing to check"),
            ([str(config), "--model", str(MINILM)], "leave --model and --max-length out")):
        assert main(["data", "check", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_the_command_in_a_process_of_its_own(rows):
    """Without a model no library is loaded that takes seconds."""
    code = ("import sys; from megatron_embed.__main__ import main\n"
            "code = main(sys.argv[1:])\n"
            "heavy = {'torch', 'transformers', 'datasets', 'megatron'} & set(sys.modules)\n"
            "assert not heavy, heavy\nsys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, "data", "check", rows], capture_output=True,
                          text=True, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY), "PATH": ""}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{rows}: 4 rows\n")
