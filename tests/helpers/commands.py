"""A small BEIR set, and the results of `evaluate` on ranks."""

import json

import pytest

from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.toys import MINI_EN

BEIR = MINI_EN.parent / "beir"

@pytest.fixture(scope="module")
def small_beir(tmp_path_factory):
    """Forty documents and the queries that ask for them."""
    folder = tmp_path_factory.mktemp("beir") / "few"
    (folder / "qrels").mkdir(parents=True)
    header, *judgements = (BEIR / "qrels" / "test.tsv").read_text().splitlines()
    documents = (BEIR / "corpus.jsonl").read_text().splitlines()[:40]
    known = {json.loads(line)["_id"] for line in documents}
    kept = [line for line in judgements if line.split("\t")[1] in known]
    assert len(kept) >= 10
    asked = {line.split("\t")[0] for line in kept}
    queries = [line for line in (BEIR / "queries.jsonl").read_text().splitlines() if json.loads(line)["_id"] in asked]
    (folder / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    (folder / "qrels" / "test.tsv").write_text("\n".join([header, *kept]) + "\n")
    return folder


def evaluated(arguments, ranks):
    results = run_on_ranks(command, ranks, ["evaluate", *arguments])
    assert all(code == 0 for code, *_ in results), results[0][2]
    assert all(out == "" for _, out, *_ in results[1:])
    return json.loads(results[0][1].splitlines()[-1])
