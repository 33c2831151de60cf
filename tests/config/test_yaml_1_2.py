"""Values of files and of the command line are read alike, as YAML 1.2 (section 10.3.2, the core schema) says."""

import math

import pytest

from megatron_embed.config.load import load_config, save_resolved
from megatron_embed.config.yaml_tree import plain_scalar, read_file, read_override
from megatron_embed.errors import ConfigError

SCALARS = [
    ("010", 10), ("+7", 7), ("-0", 0), ("0o10", 8), ("0x1F", 31), ("1e-5", 1e-5), ("1E5", 1e5), (".5", 0.5),
    ("1.", 1.0), ("+.5e1", 5.0), ("0.5e+3", 500.0), ("010.5", 10.5), (".inf", math.inf), ("-.INF", -math.inf),
    ("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None), ("NULL", None),
    ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("1_000", "1_000"), ("0b11", "0b11"), ("-0x1F", "-0x1F"), ("08", 8),
    ("0o8", "0o8"), ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("tRue", "tRue"),
    ("2001-12-14", "2001-12-14"), ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"), ("=", "="),
    ("e5", "e5"), ("1e", "1e"), ("1.2.3", "1.2.3"), ("٣", "٣"), ("nUll", "nUll"), ("+.nan", "+.nan"), ("inf", "inf")]
"""Plain texts and what the table of the specification makes of them."""


@pytest.mark.parametrize("text, value", SCALARS)
def test_plain_values(tmp_path, text, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"a: {text}\nb: [{text or '~'}]\n")
    tree = read_file(str(path)).value
    for parsed in (tree["a"].value, tree["b"].value[0].value, plain_scalar(text), read_override(f"a.b={text}")[1].value,
                  read_override(f"a.b=[{text or '~'}]")[1].value[0].value):
        assert (type(parsed), parsed) == (type(value), value)


@pytest.mark.parametrize("text, value", SCALARS)
def test_quoted_values_are_text_and_texts_survive_saving(tmp_path, text, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: m}}\ndata: {{query_prompt: '{text}'}}\n")
    config = load_config(str(path), [])
    assert config.data.query_prompt == text
    save_resolved(config, path)
    assert load_config(str(path), []) == config


def test_not_a_number_is_one():
    assert math.isnan(plain_scalar(".NaN"))
    assert plain_scalar(" 5 ") == 5 and plain_scalar(" x ") == " x " and plain_scalar("5 # a") == "5 # a"
    assert plain_scalar("9" * 5000) == "9" * 5000


@pytest.mark.parametrize("text, override, words", [
    ("data: {shuffle: on}", "", "run.yaml:2: data.shuffle = 'on': expected true or false; write true"),
    ("data: {}", "data.shuffle=No", "command line: data.shuffle = 'No': expected true or false; write false"),
    ("training: {train_steps: 1_000}", "", "expected a whole number or null; write 1000"),
    ("data: {}", "training.learning_rate=1_0e-5", "expected a finite number; write 10e-5"),
    ("training: {train_steps: 1:30}", "", "run.yaml:2: training.train_steps = '1:30': expected a whole number"),
    ("data: &a {shuffle: true}\nobjective: {<<: *a}", "", "run.yaml:3: objective: merge keys (`<<`) are not part of"),
    ("training: {seed: 1, 'seed': 2}", "", "run.yaml:2: key 'training.seed' is set twice, first at run.yaml:2"),
])
def test_values_of_yaml_1_1_are_refused_with_the_new_spelling(tmp_path, monkeypatch, text, override, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model: {{path: m}}\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", [override] if override else [])
    assert words in str(caught.value)


def test_a_directive_for_another_version_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("%YAML 1.2\n---\nmodel: {path: m}\ntraining: {seed: 010}\n")
    assert load_config(str(path), []).training.seed == 10
    path.write_text("%YAML 1.1\n---\nmodel: {path: m}\n")
    with pytest.raises(ConfigError, match=r"%YAML 1\.1: configurations are YAML 1\.2, in which 010 is 10"):
        load_config(str(path), [])
