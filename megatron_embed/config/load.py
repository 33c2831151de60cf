"""Load a YAML file and dotted overrides as a RunConfig: closed, typed, and every refusal names its line."""

import dataclasses
import difflib
import functools
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_embed.config.data import TrainFile
from megatron_embed.config.evaluation import EvaluationSet
from megatron_embed.config.foreign_values import our_value, reason
from megatron_embed.config.schema import RunConfig
from megatron_embed.config.unknown_keys import refuse_unknown_keys
from megatron_embed.config.yaml_tree import (
    COMMAND_LINE,
    Dumper,
    Node,
    location_of,
    overridden,
    plain_scalar,
    read_file,
    read_override,
    read_text,
)
from megatron_embed.errors import ConfigError

SHORTHAND: dict[Any, str] = {TrainFile: "path", EvaluationSet: "path"}
"""Key that a plain string in place of one of these mappings is the value of."""

SECTIONS = tuple(name for name, kind in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind))
"""Keys of a configuration that hold mappings."""
_LONGEST_VALUE = 100


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """The checked settings of one run; see `load_with_locations`."""
    return load_with_locations(path, overrides)[0]


def config_of_overrides(overrides: list[str]) -> RunConfig:
    """Settings from the command line only. Raises ConfigError beginning `command line: `."""
    tree = Node({}, COMMAND_LINE)
    for override in overrides:
        tree = overridden(tree, *read_override(override))
    return _with_home(_run_config(tree))


def config_of_values(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Settings from nested dicts, lists and scalars. Raises ConfigError beginning `config: ` or `command line: `."""

    def tree_of(value: Any) -> Node:
        if isinstance(value, Mapping):
            return Node({str(key): tree_of(child) for key, child in value.items()}, "config")
        if isinstance(value, list | tuple):
            return Node([tree_of(item) for item in value], "config")
        return Node(os.fspath(value) if isinstance(value, os.PathLike) else value, "config")

    tree = tree_of(values)
    for override in overrides:
        tree = overridden(tree, *read_override(override))
    return _with_home(_run_config(tree))


def load_with_locations(path: str, overrides: list[str]) -> tuple[RunConfig, Callable[[str], str]]:
    """The checked settings of one run, and where each was written (dotted key -> `FILE:LINE` or `command line`).

    Args:
        path: YAML file. Relative paths inside it are relative to the working directory; `~` is the home directory.
        overrides: `section.key=value` each; later ones win, and all win over the file. `=null` takes a setting or a
            section of the file away, unless null is a value of that key.
    Raises:
        ConfigError: anything wrong with file, keys, types or ranges; begins `FILE:LINE: ` or `command line: `.
    """
    tree = read_file(path)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.location}: expected sections, found {_shown(tree)}; "
                          "write `model: {path: DIRECTORY}`")
    for override in overrides:
        keys, value = read_override(override)
        tree = overridden(tree, keys, value)
    try:
        config = _run_config(tree)
    except ConfigError as error:
        if overrides and error.key and str(error).endswith(("remove it", "remove this")):
            raise ConfigError(f"{error} (on the command line: {error.key}=null)", key=error.key) from None
        raise
    return _with_home(config), functools.partial(location_of, tree)


def load_text(text: str, source: str) -> RunConfig:
    """The checked settings of a YAML text; `source` stands for its file. Raises ConfigError."""
    return _with_home(_run_config(read_text(text, source)))


def in_subdirectory(config: RunConfig, name: str | None) -> RunConfig:
    """The run with every output directory that it sets one folder deeper; unchanged if `name` is None."""
    if name is None:
        return config

    def deeper(directory: str | None) -> str | None:
        return None if directory is None else os.path.join(directory, name)

    checkpoint = dataclasses.replace(config.checkpoint, directory=deeper(config.checkpoint.directory),
                                     export_at_end=deeper(config.checkpoint.export_at_end))
    logging_section = dataclasses.replace(config.logging, directory=deeper(config.logging.directory))
    return dataclasses.replace(config, checkpoint=checkpoint, logging=logging_section)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every setting, defaults included, as plain dicts, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    result = plain(dataclasses.asdict(config))
    assert isinstance(result, dict)
    return result


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Write every setting as YAML; `load_config(path, [])` gives an equal config.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=_LONGEST_VALUE)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the configuration: {error.strerror}; choose another path") from None


def read_resolved(path: str | Path) -> dict[str, Any]:
    """The values that `save_resolved` wrote, unchecked: another version may have written them, with other keys.

    Raises:
        ConfigError: the file cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path}: cannot be read: not an ordinary file; take another checkpoint")
    values = _plain(read_file(str(path)))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections; the file is damaged, take another checkpoint")
    for name in SECTIONS:
        if not isinstance(values.get(name, {}), dict):
            raise ConfigError(f"{path}: {name} = {values[name]!r:.80} must be a section of settings; the file is "
                              "damaged, take another checkpoint")
    files = values.get("data", {}).get("train", [])
    if not isinstance(files, list) or not all(isinstance(file, dict) and isinstance(file.get("path"), str)
                                              for file in files):
        raise ConfigError(f"{path}: data.train = {files!r:.80} must be a list of entries with a path; the file is "
                          "damaged, take another checkpoint")
    return values


def _with_home(config: RunConfig) -> RunConfig:
    """The configuration with `~` and `~user` at the beginning of paths expanded, as a shell does."""

    def home(path: str | None) -> str | None:
        return None if path is None else os.path.expanduser(path)

    def sets(items: tuple[EvaluationSet, ...]) -> tuple[EvaluationSet, ...]:
        return tuple(replace(item, path=os.path.expanduser(item.path)) for item in items)

    replace = dataclasses.replace
    train, validation = (
        tuple(replace(file, path=os.path.expanduser(file.path), corpus=home(file.corpus)) for file in files)
        for files in (config.data.train, config.data.validation))
    return replace(
        config, model=replace(config.model, path=os.path.expanduser(config.model.path)),
        data=replace(config.data, train=train, validation=validation),
        objective=replace(config.objective, compatible_with=home(config.objective.compatible_with),
                          compatible_texts=home(config.objective.compatible_texts),
                          guide_model=home(config.objective.guide_model),
                          teacher_model=home(config.objective.teacher_model),
                          vector_cache=home(config.objective.vector_cache)),
        checkpoint=replace(config.checkpoint, directory=home(config.checkpoint.directory),
                           export_at_end=home(config.checkpoint.export_at_end)),
        evaluation=replace(config.evaluation, retrieval=sets(config.evaluation.retrieval),
                           reranking=tuple(map(os.path.expanduser, config.evaluation.reranking)),
                           sts=sets(config.evaluation.sts)),
        logging=replace(config.logging, directory=home(config.logging.directory)))


def _run_config(tree: Node) -> RunConfig:
    refuse_unknown_keys(RunConfig, tree)
    config = _mapping(RunConfig, tree, "", tree)
    assert isinstance(config, RunConfig)
    return config


def _mapping(target: Any, node: Node, name: str, root: Node) -> object:
    """A dataclass from a mapping; `name` is its dotted key, "" for the whole run."""
    if not isinstance(node.value, dict):
        raise _wrong_type(target, node, name, dataclasses.MISSING)
    annotations = get_type_hints(target)
    fields = {field.name: field for field in dataclasses.fields(target)}
    values = {}
    for key, field in fields.items():
        dotted, annotation = _join(name, key), annotations[key]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if key in node.value and not _is_taken_away(annotation, node.value[key]):
            values[key] = _value(annotation, node.value[key], dotted, root, field.default)
        elif required and dataclasses.is_dataclass(annotation):
            values[key] = _mapping(annotation, Node({}, node.location), dotted, root)
        elif required:
            raise ConfigError(f"{node.location}: required key '{dotted}' is missing; set it here or as {dotted}=VALUE")
    try:
        return target(**values)
    except ConfigError as error:  # From __post_init__.
        raise ConfigError(f"{location_of(root, error.key or name)}: {error}", key=error.key) from None


def _is_taken_away(annotation: Any, node: Node) -> bool:
    """Whether `KEY=null` on the command line takes the file's setting away: null is no value of the key itself."""
    return node.is_explicit_null and types.NoneType not in _members(annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _value(annotation: Any, node: Node, name: str, root: Node, default: Any) -> object:
    """A value of the annotated type; `default` is only shown."""
    members = _members(annotation)
    if node.value is None and types.NoneType in members:
        return None
    for member in members:
        if dataclasses.is_dataclass(member):
            short = member in SHORTHAND and isinstance(node.value, str)
            return _mapping(member, Node({SHORTHAND[member]: node}, node.location) if short else node, name, root)
        if get_origin(member) is tuple and node.value is not None:
            element = get_args(member)[0]
            items = node.value if isinstance(node.value, list) else [node]  # One item may be written without brackets.
            return tuple(_value(element, item, name, root, dataclasses.MISSING) for item in items)
        if get_origin(member) is dict and isinstance(node.value, dict):
            text = get_args(member)[1]
            return {key: _value(text, item, f"{name}.{key}", root, dataclasses.MISSING)
                    for key, item in node.value.items()}
        accepted, value = _scalar(member, node.value)
        if accepted:
            return value
    raise _wrong_type(annotation, node, name, default)


def _scalar(member: Any, value: object) -> tuple[bool, object]:
    """(whether the value has this type, the value as that type); a whole number is also a float."""
    if get_origin(member) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(member)), value
    if member is float and type(value) in (int, float):
        assert isinstance(value, int | float)
        return math.isfinite(value), float(value)
    return type(value) is member, value  # type() and not isinstance: a bool is not an int here


def _wrong_type(annotation: Any, node: Node, name: str, default: Any) -> ConfigError:
    return ConfigError(f"{node.location}: {name} = {_shown(node)}: expected {_described(annotation)}; "
                       f"{_foreign(name, node.value) or _remedy(annotation, node.value, default)}")  # fmt: skip


def _foreign(name: str, value: object) -> str:
    """The remedy for a value of another trainer; empty if it is none."""
    if isinstance(value, dict | list | types.NoneType):
        return ""
    ours = our_value(name, value)
    return reason(name, value) or ("" if ours is None else f"{value} is {ours} here")


def _remedy(annotation: Any, value: object, default: Any) -> str:
    members = get_args(annotation) or (annotation,)
    literals = [member for member in (annotation, *members) if get_origin(member) is Literal]
    choices = [choice for literal in literals for choice in map(str, get_args(literal))]
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    if str in members and not isinstance(value, dict | list | types.NoneType):
        return "put it in quotes"
    if int in members and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, str) and type(plain_scalar(value)) in {int, float, bool} & set(members):
        return "remove the quotes"
    if isinstance(value, str) and (spelling := _in_yaml_1_2(value, members)):
        return f"write {spelling}"
    if annotation in SHORTHAND:
        return f"write the {SHORTHAND[annotation]} alone, or {{{SHORTHAND[annotation]}: ...}}"
    if dataclasses.is_dataclass(annotation):
        return "indent its keys below it, or remove it to take the defaults"
    if default not in (dataclasses.MISSING, None):
        return f"the default is {_yaml(default)}"
    return "give it such a value"


def _in_yaml_1_2(text: str, members: tuple[Any, ...]) -> str:
    """The YAML 1.2 spelling of a YAML 1.1 value of one of these types; empty if there is none."""
    if bool in members and text.lower() in ("yes", "on", "y", "no", "off", "n"):
        return "true" if text.lower() in ("yes", "on", "y") else "false"
    plain = text.replace("_", "")
    return plain if "_" in text and type(plain_scalar(plain)) in {int, float} & set(members) else ""


def _described(annotation: Any) -> str:
    """The type in YAML's words."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_described(member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if get_origin(annotation) is tuple:
        return f"a list of: {_described(get_args(annotation)[0])}"
    if dataclasses.is_dataclass(annotation):
        return "text or a mapping" if annotation in SHORTHAND else "a mapping"
    if get_origin(annotation) is dict:
        return "a mapping of text to text"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return "null" if annotation is types.NoneType else words[annotation]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _shown(node: Node) -> str:
    """The value on one short line."""
    text = _yaml(_plain(node))
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _plain(node: Node) -> Any:
    """The value without its locations."""
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return [_plain(child) for child in node.value] if isinstance(node.value, list) else node.value
