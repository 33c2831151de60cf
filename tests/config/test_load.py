"""Configuration files and overrides: what is read, and the words of every refusal."""

import subprocess
import sys
from dataclasses import fields, is_dataclass, replace

import pytest

from megatron_embed.config.load import load_config, save_resolved, to_dict
from megatron_embed.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainFile,
    TrainingConfig,
)
from megatron_embed.errors import ConfigError

MODEL = "model: {path: m}\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a YAML text, with overrides, as the file run.yaml of the working directory."""
    monkeypatch.chdir(tmp_path)

    def load_text(text, *overrides):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load_config("run.yaml", list(overrides))

    return load_text


def test_defaults_come_from_the_schema(load):
    assert load(MODEL) == RunConfig(model=ModelConfig(path="m"))
    assert load("data: {}\n", "model.path=m") == RunConfig(model=ModelConfig(path="m"))


def test_every_type_is_read(load):
    config = load(
        "model: {path: some/dir, bidirectional: true}\n"
        "embedding: {pooling: null}\n"
        "objective: {temperature: 1}\n"
        "data:\n  train:\n    - a.jsonl\n    - {path: b.jsonl, instruction: find}\n  query_prompt: 'query: '\n"
        "parallel: {sequence_parallel: false, virtual_pipeline_model_parallel_size: 2}\n"
        "training: {learning_rate: 1e-5, min_learning_rate: 2E-7, adam_eps: 1.0e-6, epochs: 2}\n"
        "evaluation: {retrieval: [one, two]}\n"
    )
    assert (config.model.path, config.model.bidirectional, config.embedding.pooling) == ("some/dir", True, None)
    assert isinstance(config.objective.temperature, float)
    assert config.data.train == (TrainFile(path="a.jsonl"), TrainFile(path="b.jsonl", instruction="find"))
    assert config.data.query_prompt == "query: "
    assert config.parallel.sequence_parallel is False
    assert config.parallel.virtual_pipeline_model_parallel_size == 2
    training = config.training
    assert (training.learning_rate, training.min_learning_rate, training.adam_eps) == (1e-5, 2e-7, 1e-6)
    assert [item.path for item in config.evaluation.retrieval] == ["one", "two"]


@pytest.mark.parametrize("train", ["a.jsonl", "[a.jsonl]", "{path: a.jsonl}", "[{path: a.jsonl}]"])
def test_one_training_file_in_every_spelling(load, train):
    assert load(f"{MODEL}data: {{train: {train}}}\n").data.train == (TrainFile(path="a.jsonl"),)


def test_overrides_win_and_later_ones_over_earlier(load):
    config = load(
        f"{MODEL}training: {{learning_rate: 1e-5, seed: 7}}\n",
        "training.learning_rate=1e-4", "data.train=[a.jsonl, {path: b.jsonl}]", "training.seed=8", "training.seed=9",
        "data.query_prompt=Query: ", "data.document_prompt=\"it's\"", "training.train_steps=null",
    )  # fmt: skip
    assert (config.training.learning_rate, config.training.seed, config.training.train_steps) == (1e-4, 9, None)
    assert [file.path for file in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert (config.data.query_prompt, config.data.document_prompt) == ("Query: ", "it's")


@pytest.mark.parametrize(
    "text, message",
    [
        ("objective:\n  temprature: 0.1\n", "run.yaml:3: unknown key 'objective.temprature'; "
                                            "did you mean 'temperature'?"),
        ("objective:\n  learning_rate: 1\n", "run.yaml:3: unknown key 'objective.learning_rate'; "
                                             "did you mean 'training.learning_rate'?"),
        ("traning: {}\n", "run.yaml:2: unknown key 'traning'; did you mean 'training'?"),
        ("data: {train: [a, {pth: b}]}\n", "run.yaml:2: unknown key 'data.train.pth'; did you mean 'path'?"),
        ("optimizer: {xyz: 1}\n", "run.yaml:2: unknown key 'optimizer.xyz'; known here: name, distributed"),
        ("training: {seed: abc}\n", "run.yaml:2: training.seed = 'abc': expected a whole number; the default is 1234"),
        ("training: {seed: true}\n", "run.yaml:2: training.seed = true: expected a whole number"),
        ("training: {seed: 2.5}\n", "run.yaml:2: training.seed = 2.5: expected a whole number"),
        ("training: {seed: 1e3}\n", "run.yaml:2: training.seed = 1000.0: expected a whole number; write 1000"),
        ("training: {seed: '5'}\n", "run.yaml:2: training.seed = '5': expected a whole number; remove the quotes"),
        ("training: {seed: null}\n", "run.yaml:2: training.seed = null: expected a whole number"),
        ("training: {weight_decay: .inf}\n", "run.yaml:2: training.weight_decay = inf: expected a finite number"),
        ("training: {recompute: ful}\n", "run.yaml:2: training.recompute = 'ful': expected one of none, "
                                         "selective, full; did you mean 'full'?"),
        ("model: 5\n", "run.yaml:2: key 'model' is set twice, first at run.yaml:1; keep one"),
        ("data: {query_prompt: 5}\n", "run.yaml:2: data.query_prompt = 5: expected text or null; put it in quotes"),
        ("data: {shuffle: 1}\n", "run.yaml:2: data.shuffle = 1: expected true or false; the default is true"),
        ("data: {train: 3}\n", "run.yaml:2: data.train = 3: expected text or a mapping; write the path alone"),
        ("data: {train: null}\n", "run.yaml:2: data.train = null: expected a list of: text or a mapping"),
        ("training: 5\n", "run.yaml:2: training = 5: expected a mapping; indent its keys below it"),
        ("training:\n", "run.yaml:2: training = null: expected a mapping"),
        ("training:\n  seed: 1\n  seed: 2\n", "run.yaml:4: key 'training.seed' is set twice, first at run.yaml:3"),
        ("training:\n\tseed: 1\n", "run.yaml:3: not YAML: found character '\\t' that cannot start any token"),
        ("training: {seed: 1\n", "run.yaml:3: not YAML: "),
        ("data: &a {train: *a}\n", "run.yaml:2: data.train: an alias that contains itself"),
        ("data: !!python/name:os.system x\n", "run.yaml:2: data = 'x': not a plain YAML value"),
        ("? [a]\n: 1\n", "run.yaml:2: a key of the file is not plain text"),
        ("objective:\n\n  temperature: -1\n", "run.yaml:4: objective.temperature = -1.0: must be > 0"),
        ("training:\n  epochs: 2\n  train_steps: 5\n", "run.yaml:3: training.epochs = 2.0: training.train_steps = 5"),
        ("checkpoint:\n  export_at_end: out\n", "run.yaml:3: checkpoint.export_at_end = 'out': the export"),
    ],
)  # fmt: skip
def test_refusals_name_line_key_value_and_remedy(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(MODEL + text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_null_on_the_command_line_takes_a_setting_of_the_file_away(load):
    """Keys that may be null are null."""
    text = MODEL + ("objective: {loss: cosent, temperature: 0.05}\nlora: {rank: 4, target_modules: [query]}\n"
                    "training: {train_steps: 3, epochs: null, learning_rate: 1.0}\n")
    assert load(text, "lora=null").lora == LoraConfig()
    config = load(text, "objective.loss=cosine_similarity", "objective.temperature=null", "lora.rank=0",
                  "lora.target_modules=null", "training.learning_rate=~", "training.train_steps=null")
    assert (config.objective, config.lora) == (ObjectiveConfig(loss="cosine_similarity"), LoraConfig())
    assert (config.training.learning_rate, config.training.train_steps) == (TrainingConfig().learning_rate, None)
    assert load(text, "objective=null", "objective.loss=angle").objective == ObjectiveConfig(loss="angle")
    for overrides, message in (
            (["lora.rank=0"], "run.yaml:3: lora.target_modules = ('query',): does nothing while lora.rank is 0; set "
             "the rank, or remove this (on the command line: lora.target_modules=null)"),
            (["model.path=null"], "run.yaml:1: required key 'model.path' is missing"),
            (["training.learning_rate="], "command line: training.learning_rate = null: expected a finite number"),
            (["lora.rnk=null"], "command line: unknown key 'lora.rnk'")):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.most_negatives_with_a_query=1", "command line: unknown key 'data.most_negatives_with_a_query'; "
         "did you mean 'num_negatives' or 'query_max_length' or 'query_prompt'?"),
        ("data.negatives_for_query=1", "command line: unknown key 'data.negatives_for_query'; "
         "did you mean 'negatives_per_query'? negatives_per_query is data.num_negatives here"),
        ("training.sed=1", "command line: unknown key 'training.sed'; did you mean 'seed'?"),
        ("training.seed=x", "command line: training.seed = 'x': expected a whole number"),
        ("training.seed=-1", "command line: training.seed = -1: must be >= 0"),
        ("training.seed=99999999999999999999",
         "command line: training.seed = 99999999999999999999: must be <= 4611686018427387904"),
        ("training.epochs=1e308", "command line: training.epochs = 1e+308: must be > 0 and <= 1000000, or null"),
        ("parallel.timeout_seconds=100000000000000",
         "command line: parallel.timeout_seconds = 100000000000000: must be > 0 and <= 1000000"),
        ("model.path.to=1", "command line: model.path = {'to': 1}: expected text"),
        ("model.path=", "command line: model.path = null: expected text"),
        ("data.train=[a", "command line: data.train=[a: not YAML: "),
        ("training.seed", "command line: 'training.seed' is not a setting; write section.key=value"),
        ("training..seed=1", "command line: 'training..seed=1' is not a setting"),
    ],
)
def test_refusals_of_overrides_name_the_command_line(load, override, message):
    with pytest.raises(ConfigError) as caught:
        load(MODEL, override)
    assert str(caught.value).startswith(message)


def test_range_error_names_the_file_where_the_file_set_the_value(load):
    with pytest.raises(ConfigError, match=r"^run.yaml:2: training.min_learning_rate = 0.001: must be <= learning_rate"):
        load(MODEL + "training: {min_learning_rate: 1e-3}\n", "training.learning_rate=1e-4")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "run.yaml: the configuration is empty"),
        ("# nothing\n", "run.yaml: the configuration is empty"),
        ("- a\n", "run.yaml:1: expected sections"),
        ("data: {}\n", "run.yaml:1: required key 'model.path' is missing"),
        ("model:\n  dtype: float32\n", "run.yaml:1: required key 'model.path' is missing"),
        ("a: b\n---\nc: d\n", "run.yaml:2: not YAML: "),
        ("a: \x00\n", "run.yaml: not YAML: "),
        ('a: ["b\\0c"]\n', "run.yaml:1: a = 'b\\x00c': has a NUL character; remove it"),
    ],
)
def test_files_that_are_no_configuration(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).startswith(message)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: cannot read the configuration: No such file"):
        load_config(str(tmp_path / "none.yaml"), [])
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(str(tmp_path), [])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bytes.yaml: not YAML: byte 0 is not UTF-8"):
        load_config(str(tmp_path / "bytes.yaml"), [])


TEXTS = ["plain", "1e5", "1e-5", "5", "true", "null", "", " x ", "查询: ", "a: b #c", "it's \"q\"", "~"]


@pytest.mark.parametrize("text", TEXTS)
def test_resolved_config_loads_back_equal(tmp_path, text):
    path = f"./{text}"  # a path that is `~` alone would be written out
    data = DataConfig(query_prompt=text, train=(TrainFile(path=path, instruction=text), TrainFile(path="b")))
    config = replace(RunConfig(model=ModelConfig(path="m")), data=data)
    save_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(str(tmp_path / "resolved.yaml"), []) == config


def test_resolved_config_names_every_setting(tmp_path):
    config = RunConfig(model=ModelConfig(path="m"))
    values = to_dict(config)
    assert values["training"]["learning_rate"] == 1e-5
    for field in fields(RunConfig):
        section = getattr(config, field.name)
        if is_dataclass(section):
            assert set(values[field.name]) == {inner.name for inner in fields(section)}
    with pytest.raises(ConfigError, match="cannot write the configuration"):
        save_resolved(config, tmp_path / "absent" / "resolved.yaml")


def test_loading_needs_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_embed.config.load; heavy = {'torch', 'megatron.core', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
