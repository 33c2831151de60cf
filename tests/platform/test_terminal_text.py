"""Numbers of things in messages, and words that no message has."""

import ast
from pathlib import Path

import pytest

import megatron_embed
from megatron_embed.audit.case import of_ranks
from megatron_embed.platform.terminal_text import counted

PACKAGE = Path(megatron_embed.__file__).parent


@pytest.mark.parametrize("count, words, text", [
    (0, ("step",), "0 steps"), (1, ("rank",), "1 rank"), (1.0, ("epoch",), "1 epoch"), (0.5, ("epoch",), "0.5 epochs"),
    (2.0, ("epoch",), "2 epochs"), (1200, ("query", "queries"), "1,200 queries"), (1, ("query", "queries"), "1 query")])
def test_numbers_of_things(count, words, text):
    assert counted(count, *words) == text


def test_numbers_of_ranks():
    assert (of_ranks(["3"]), of_ranks([1, 3])) == ("rank 3", "ranks 1, 3")


def test_no_message_leaves_the_plural_to_the_reader():
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [f"{path.name}:{node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Constant)
                  and isinstance(node.value, str) and id(node) not in docstrings
                  and any(plural in node.value for plural in ("(s)", "(es)"))]
    assert found == []
