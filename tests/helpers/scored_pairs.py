"""A file of labelled pairs."""

import json

import pytest

from tests.helpers.commands import evaluated, small_beir  # noqa: F401  a fixture
from tests.helpers.toys import MINI_EN


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [json.loads(line) for line in MINI_EN.read_text().splitlines()[:20]]
    path = tmp_path_factory.mktemp("sts") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text_a": row["query"], "text_b": row["positive"][0], "score": index % 5})
                            + "\n" for index, row in enumerate(rows)))
    return str(path)
