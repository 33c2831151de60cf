"""Configurations that are small as files and would be large as values, or have no bottom: a sentence, at once."""

import itertools
import time

import pytest
import yaml

from megatron_embed.config.load import config_of_overrides, load_config, read_resolved
from megatron_embed.config.yaml_tree import LARGEST_FILE, read_file
from megatron_embed.errors import ConfigError


def laughs(levels, width=9, inner="x"):
    """Each list holds the one before `width` times."""
    lines = [f"a: &a [{', '.join([inner] * width)}]"]
    lines += [f"{after}: &{after} [{', '.join([f'*{before}'] * width)}]"
              for before, after in itertools.pairwise("abcdefghij"[:levels])]
    return "\n".join(lines) + "\n"


BOMBS = {
    "lists of aliases": (laughs(7), "configuration.yaml:1: e: more than 20,000 values"),
    "mappings of aliases": (
        "a: &a {x: 1, y: 1, z: 1}\n" + "".join(
            f"{after}: &{after} {{x: *{before}, y: *{before}, z: *{before}}}\n"
            for before, after in itertools.pairwise("abcdefghijkl")), "more than 20,000 values"),
    "a long text, often": (f"a: &a {'x' * 100_000}\nmodel: [{', '.join(['*a'] * 1000)}]\n", "more than 20,000 values"),
    "written out": (f"a: [{'1,' * 200_000}]", "configuration.yaml:1: more than 20,000 values"),
    "brackets": ("a: " + "[" * 200_000, "nested too deeply"),
    "dashes": ("- " * 200_000, "nested too deeply"),
    "no end": ("a: " + "x" * LARGEST_FILE, "longer than 1,048,576 characters"),
    "digits": ("model: {path: " + "9" * 10_000 + "}", "model.path = '999999"),
}


@pytest.mark.parametrize("text, words", BOMBS.values(), ids=BOMBS)
def test_bomb_is_refused_at_once(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configuration.yaml").write_text(text, encoding="utf-8")
    for read in (lambda: load_config("configuration.yaml", []), lambda: read_resolved("configuration.yaml")):
        start = time.process_time()
        with pytest.raises(ConfigError) as caught:
            read()
        assert words in str(caught.value) and len(str(caught.value)) < 400
        assert time.process_time() - start < 10


def test_bomb_on_the_command_line():
    text = "{" + ", ".join(laughs(7).splitlines()) + "}"
    with pytest.raises(ConfigError, match="^command line: .*more than 20,000 values"):
        config_of_overrides([f"data.train={text}"])


def test_aliases_for_values_that_are_needed_twice_stay(tmp_path):
    file = tmp_path / "configuration.yaml"
    file.write_text("a: &a [1, 2, 3]\nb: [" + ", ".join(["*a"] * 1000) + "]\n", encoding="utf-8")
    lists = read_file(str(file)).value["b"].value
    assert [[node.value for node in item.value] for item in lists] == [[1, 2, 3]] * 1000


def test_device_without_end_is_read_to_the_limit_only():
    with pytest.raises(ConfigError, match="/dev/zero: longer than"):
        read_file("/dev/zero")


@pytest.mark.parametrize("train", ["rows.jsonl", ["rows.jsonl"], [{"weight": 1.0}], [{"path": 3}], 7])
def test_a_saved_run_names_its_files_of_rows(tmp_path, train):
    """A run that is resumed compares them with its own."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"train": train}}))
    with pytest.raises(ConfigError, match=r"data\.train = .*must be a list of entries with a path"):
        read_resolved(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"train": [{"path": "rows.jsonl"}]}}))
    assert read_resolved(tmp_path / "config.yaml")["data"]["train"][0]["path"] == "rows.jsonl"
