"""The settings in another trainer's YAML or JSON file or command line, under the names of the table of its words."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_embed.config.foreign_table import foreign_word, normalized
from megatron_embed.config.foreign_word import ForeignWord
from megatron_embed.config.json_file import json_value, read_json_file
from megatron_embed.config.load import load_config
from megatron_embed.config.yaml_tree import Node, plain_scalar, read_file
from megatron_embed.errors import ConfigError
from megatron_embed.init.launch import HYDRA, NESTED, Launch, is_settings_file, launch_of
from megatron_embed.init.shell_words import commands_of

_LARGEST = 1 << 20
_VARIABLES = ("INFONCE_", "LISTWISE_", "GENERATIVE_", "MAX_POSITIVE_SAMPLES", "MAX_NEGATIVE_SAMPLES")
"""Beginnings of the variables that ms-swift reads as settings."""
_OF_LAUNCHERS = ("mixed_precision", "gradient_accumulation_steps", "zero_stage", "use_deepspeed", "use_fsdp",
                 "deepspeed_config_file", "gradient_clipping", "offload_optimizer_device")
"""Options of accelerate that are settings of the run."""
_OTHER_PROGRAMS = ("infer", "export", "deploy", "eval", "app", "sample", "encode", "search", "hn_mine", "merge-lora",
                   "add_reranker_score", "web-ui", "rollout")


@dataclass(frozen=True)
class Setting:
    """One setting as it was given."""

    name: str
    """As the table spells it: the first name of its entry, or its own name where that has no key here."""
    written: str
    """For comments: `--learning_rate 1e-5`, `train_args.learning_rate: 1e-5`."""
    value: object
    word: ForeignWord | None


@dataclass
class ForeignSettings:
    """The settings of one run of another trainer.

    Attributes:
        given: by name, the last one where a name is given twice.
        launch: trainer, program and devices.
        source: what was read, for the first line of the translation.
    """

    given: dict[str, Setting]
    launch: Launch
    source: str
    used: set[str] = field(default_factory=set)

    def take(self, name: str) -> Setting | None:
        """The setting of a name, which thereby counts as translated; None if it is not given."""
        self.used.add(name)
        return self.given.get(name)

    def peek(self, name: str) -> object:
        """The value of a setting; None if it is not given."""
        return self.given[name].value if name in self.given else None

    def unused(self) -> list[Setting]:
        """The settings that have not been taken."""
        return [setting for name, setting in self.given.items() if name not in self.used]


def read_foreign(text: str) -> ForeignSettings:
    """The settings of a file, or of a command line.

    Args:
        text: the path of a YAML, JSON or shell file, or a command line.
    Raises:
        ConfigError: it is none of these.
    """
    path = os.path.expanduser(text)
    if "\n" not in text and len(text) < 4096 and os.path.isfile(path):
        return _from_file(path)
    if not re.search(r"\s", text.strip()) and not text.lstrip().startswith("-"):
        raise ConfigError(f"--from = {text!r}: no such file; give a YAML file of another trainer, a shell script with "
                          "its command, or the command line itself in quotes")
    return _from_shell(text, "the command line")


def _from_file(path: str) -> ForeignSettings:
    if path.endswith((".yaml", ".yml")) and _is_ours(path):
        raise ConfigError(f"--from = {path!r}: a configuration of megatron-embed already; train with it")
    if path.endswith(".py"):
        raise ConfigError(f"--from = {path!r}: a Python program, which is not read; give the command line that starts "
                          "it, or write `megatron-embed init MODEL DATA`")
    if path.endswith((".yaml", ".yml", ".json")):
        tree = _json_tree(path) if path.endswith(".json") else read_file(path)
        if not isinstance(tree.value, dict):
            raise ConfigError(f"--from = {path!r}: no mapping of settings; give a trainer's configuration")
        return _from_tree(tree, path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--from = {path!r}: cannot be read: {error}; give a YAML file or a shell script") from None
    if len(text) > _LARGEST:
        raise ConfigError(f"--from = {path!r}: longer than {_LARGEST:,} characters; give the command alone")
    return _from_shell(text, path)


def _is_ours(path: str) -> bool:
    """Whether the file is a configuration of this program."""
    try:
        load_config(path, [])
    except ConfigError:
        return False
    return True


def _json_tree(path: str) -> Node:
    """The tree of a JSON file, which may have tabs, as YAML may not."""
    try:
        return _node(read_json_file(path), path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--from = {path!r}: not readable as JSON: {error}; give a trainer's configuration") from None


def _node(value: object, path: str) -> Node:
    if isinstance(value, dict):
        return Node({key: _node(item, path) for key, item in value.items()}, path)
    return Node([_node(item, path) for item in value] if isinstance(value, list) else value, path)


def _from_shell(text: str, source: str) -> ForeignSettings:
    commands, variables = commands_of(text)
    commands = [command for words in commands for command in _with_nested(words)]
    launches = [(launch, rest) for words in commands if (launch := launch_of(words, variables)) is not None
                for rest in [launch.rest]]
    if not launches:
        raise ConfigError(f"--from: {source} holds no command with options such as --learning_rate 1e-5; give a "
                          "trainer's command line in quotes, or its YAML file")
    training = [(launch, rest) for launch, rest in launches
                if not re.search(rf"(^|[\s./_])({'|'.join(_OTHER_PROGRAMS)})($|[\s.])", launch.program)]
    launches = training or launches
    if len(launches) > 1:
        raise ConfigError(f"--from: {source} holds {len(launches)} commands ({launches[0][0].program}, "
                          f"{launches[1][0].program}, ...); give one of them in quotes")
    launch, words = launches[0]
    settings = [_setting(name, f"{name}={value}", plain_scalar(value)) for name, value in launch.environment.items()
                if name.startswith(_VARIABLES)]
    settings += [_setting(name, f"--{name} {value}", plain_scalar(value)) for name, value in launch.options.items()
                 if name in _OF_LAUNCHERS]
    settings += _options(words)
    given = {setting.name: setting for setting in settings}
    result = ForeignSettings(given, launch, f"{launch.program}: {source}")
    config = given.get("config")
    before_options = itertools.takewhile(lambda word: not _is_option(word), words)
    file = str(config.value) if config is not None else next(filter(is_settings_file, before_options), None)
    if file is not None:
        if not os.path.isfile(file):
            raise ConfigError(f"--from: the command reads its settings from {file!r}, which is not here; start this "
                              "where it is, or give the file to --from")
        result.given = _from_tree(_json_tree(file) if file.endswith(".json") else read_file(file), file).given | given
        result.used.add("config")
    return result


def _with_nested(words: list[str]) -> list[list[str]]:
    """The command, or those inside one of its words, as behind `bash -c` and `--wrap`."""
    nested = next((word for word in words if NESTED.fullmatch(word)), None)
    return [words] if nested is None else commands_of(nested)[0]


def _options(words: list[str]) -> Iterator[Setting]:
    """`--name value`, `--name=value`, `--name a b c`, `--name` alone, which is true, and Hydra's `name=value`."""
    if not any(word.startswith("--") for word in words):
        words = [f"--{word.lstrip('+')}" if HYDRA.fullmatch(word) else word for word in words]
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not _is_option(word):
            continue
        name, equals, text = word.partition("=")
        values = [text] if equals else []
        while position < len(words) and not _is_option(words[position]):
            values.append(words[position])
            position += 1
        written = " ".join((name, *values)) if not equals else word
        parsed = [_value(value) for value in values]
        yield _setting(name, written, True if not parsed else parsed[0] if len(parsed) == 1 else parsed)


def _is_option(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-[\d.].*|-", word)


def _value(text: str) -> object:
    """A value of a command line: JSON where it is an object or a list, Hydra's `[a,b]`, else a plain value of YAML."""
    value = _json_in(text) if text.startswith(("{", "[")) else plain_scalar(text)
    if isinstance(value, str) and re.fullmatch(r"\[[^\[\]]*\]", value):
        return [plain_scalar(item.strip()) for item in value[1:-1].split(",") if item.strip()]
    return value


def _json_in(text: str) -> object:
    """The object or list that a text is as JSON; otherwise the text."""
    try:
        return json_value(text.encode()) if text.startswith(("{", "[")) else text
    except ValueError:
        return text


def _setting(name: str, written: str, value: object) -> Setting:
    """A setting under the name of the table; `--no_x` is x with the value false."""
    word = foreign_word(name)
    plain = normalized(name)
    if word is None and plain.startswith("no_") and (positive := foreign_word(plain[3:])) is not None and value is True:
        word, value = positive, False
    return Setting(word.name if word and word.keys else plain, written, value, word)


def _from_tree(tree: Node, path: str) -> ForeignSettings:
    settings = {setting.name: setting for setting in _leaves(tree, "")}
    launch = Launch(program=path)
    return ForeignSettings(settings, dataclasses.replace(launch, trainer=_trainer_of(settings)), path)


def _leaves(node: Node, name: str) -> Iterator[Setting]:
    """The settings of a mapping and of those below it; a mapping that the table knows as one value stays whole."""
    assert isinstance(node.value, dict)
    for key, child in node.value.items():
        dotted = f"{name}.{key}" if name else key
        word = foreign_word(dotted)
        if isinstance(child.value, dict) and not (word is not None and word.name in _WHOLE):
            yield from _leaves(child, dotted)
            continue
        value = _plain_value(child)
        yield _setting(dotted, f"{dotted}: {_short(value)}", value)


_WHOLE = ("columns", "prompts", "lr_scheduler_kwargs", "fsdp")
"""Settings whose value is a mapping."""


def _plain_value(node: Node) -> object:
    if isinstance(node.value, dict):
        return {key: _plain_value(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain_value(child) for child in node.value]
    return _json_in(node.value) if isinstance(node.value, str) else node.value


def _short(value: object) -> str:
    plain = isinstance(value, dict | list | bool) or value is None
    text = json.dumps(value, ensure_ascii=False) if plain else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _trainer_of(settings: dict[str, Setting]) -> str:
    """The trainer whose names a file uses."""
    keys = [normalized(setting.written.partition(":")[0]) for setting in settings.values()]
    names = {key.rpartition(".")[2] for key in keys}
    if "model" in names and (names & {"tuner_type", "train_type", "split_dataset_ratio", "torch_dtype", "task_type"}
                             or any(key.startswith("train_args.") for key in keys)):
        return "ms-swift"
    if "train_group_size" in names:
        return "FlagEmbedding" if names & {"train_data", "sentence_pooling_method"} else "Tevatron"
    if names & {"batch_sampler", "multi_dataset_batch_sampler", "prompts", "router_mapping"}:
        return "Sentence Transformers"
    if "train_micro_batch_size_per_gpu" in names or any("zero_optimization" in name for name in settings):
        return "DeepSpeed"
    return "Transformers" if names & {"per_device_train_batch_size", "num_train_epochs"} else ""
