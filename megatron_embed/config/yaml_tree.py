"""Parse YAML text and `section.key=value` arguments into one tree in which every value has its location."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from megatron_embed.errors import ConfigError

COMMAND_LINE = "command line"

LARGEST_FILE = 1 << 20
"""Bytes of a configuration; the longest that ships has 2 KB."""
MOST_VALUES = 20_000
"""Values of a configuration with aliases expanded: nested aliases make 400 million values of 255 bytes."""

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    (_INT, re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")),
    (_FLOAT, re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
                        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"), list("-+.0123456789")))
"""Tags of plain scalars that are not strings, with patterns and first characters: YAML 1.2.2, section 10.3.2."""


class Loader(yaml.SafeLoader):
    """The plain types of YAML 1.2 (PyYAML's own are those of 1.1: `010` is 8 there, `1:30` is 90, `on` is true)."""

    values_written, values_read = 0, 0
    """Counts so far: as written, and with aliases expanded."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Count the node, then compose it as the base class does."""
        self.values_written += 1
        if self.values_written > MOST_VALUES:
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(None, None, f"more than {MOST_VALUES:,} values", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


Loader.yaml_implicit_resolvers = {}  # without those of the base class


class Dumper(yaml.SafeDumper):
    """Write values so that Loader reads back the same; text that is a number or bool in YAML 1.1 or 1.2 is quoted."""


for _class in (Loader, Dumper):
    for _tag, _pattern, _first in _CORE_SCHEMA:
        _class.add_implicit_resolver(_tag, _pattern, _first)


def _whole_number(loader: Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _number(loader: Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


Loader.add_constructor(_INT, _whole_number)
Loader.add_constructor(_FLOAT, _number)


@dataclass(frozen=True)
class Node:
    """A value and where it was written: `FILE:LINE`, or `command line`."""

    value: "object | dict[str, Node] | list[Node]"
    """A scalar as YAML reads it, a dict of nodes by key, or a list of nodes."""
    location: str
    is_explicit_null: bool = False
    """`KEY=null` of the command line, not `KEY=`, which an empty variable of a shell gives."""


def read_file(path: str) -> Node:
    """The tree of a YAML file.

    Raises:
        ConfigError: no such file, unreadable, empty, too long, not YAML, not a mapping, or a key that is set twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    if len(text) > LARGEST_FILE:
        raise ConfigError(f"{path}: longer than {LARGEST_FILE:,} characters; name a YAML file of settings")
    node = _compose(text, path)
    if node is None:
        raise ConfigError(f"{path}: the configuration is empty; it needs at least `model: {{path: DIRECTORY}}`")
    return node


def read_text(text: str, source: str) -> Node:
    """The tree of a YAML text; `source` stands for its file. Raises ConfigError, as `read_file` does."""
    node = _compose(text, source)
    if node is None:
        raise ConfigError(f"{source}: the configuration is empty")
    return node


def read_override(argument: str) -> tuple[list[str], Node]:
    """`training.learning_rate=1e-4` as (["training", "learning_rate"], node).

    The value is a YAML scalar or a flow value (`[a, b]`, `{path: a}`); other text is taken literally, with its spaces.

    Raises:
        ConfigError: not of this form, or an unterminated flow value.
    """
    key, equals, text = argument.partition("=")
    keys = key.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{COMMAND_LINE}: {argument!r} is not a setting; write section.key=value")
    if not text.lstrip().startswith(("[", "{", '"', "'")):
        # Not read as a YAML document: `query: ` would become a mapping, and a prompt would lose its trailing space.
        value = plain_scalar(text)
        return keys, Node(value, COMMAND_LINE, is_explicit_null=value is None and bool(text.strip()))
    return keys, _compose(text, COMMAND_LINE, f"{key}={text}: ") or Node(None, COMMAND_LINE)


def plain_scalar(text: str) -> object:
    """`None`, bool or number as YAML 1.2 reads it; any other text unchanged, with its spaces."""
    plain = text.strip()
    tag = next((tag for tag, pattern, _ in _CORE_SCHEMA if pattern.match(plain)), None)
    if tag is None:
        return text
    loader = Loader("")
    try:
        return loader.construct_object(yaml.ScalarNode(tag, plain))
    except ValueError:  # an integer of thousands of digits
        return text
    finally:
        loader.dispose()


def overridden(tree: Node, keys: Sequence[str], value: Node) -> Node:
    """The tree with the value at `keys`; missing sections are created."""
    if not keys:
        return value
    children, location = (tree.value, tree.location) if isinstance(tree.value, dict) else ({}, COMMAND_LINE)
    child = children.get(keys[0], Node({}, COMMAND_LINE))
    return Node(children | {keys[0]: overridden(child, keys[1:], value)}, location)


def location_of(tree: Node, dotted_key: str) -> str:
    """Location of a key, or of the nearest enclosing section that was written."""
    for key in dotted_key.split("."):
        if not isinstance(tree.value, dict) or key not in tree.value:
            break
        tree = tree.value[key]
    return tree.location


def _compose(text: str, source: str, prefix: str = "") -> Node | None:
    """The tree of a YAML text; None if it is empty."""
    try:
        loader = Loader(text)
        try:
            root = loader.get_single_node()
            if loader.yaml_version not in (None, (1, 2)):
                version = ".".join(map(str, loader.yaml_version))
                raise ConfigError(f"{source}: {prefix}%YAML {version}: configurations are YAML 1.2, in which 010 is 10 "
                                  "and yes is text; remove the line")
            return None if root is None else _read(loader, root, source, (), ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = _location(source, mark.line) if mark else source
        if str(error.problem).startswith("more than"):
            raise ConfigError(f"{location}: {prefix}{error.problem}; name a YAML file of settings") from None
        remedy = "indent with spaces" if "\\t" in str(error.problem) else "quote texts that hold `: `, `#`, brackets"
        raise ConfigError(f"{location}: {prefix}not YAML: {error.problem or error.context}; {remedy}") from None
    except RecursionError:
        raise ConfigError(f"{source}: {prefix}nested too deeply for a configuration; remove the brackets") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {prefix}not YAML: {' '.join(str(error).split())}; save it as text") from None


def _location(source: str, line: int) -> str:
    return source if source == COMMAND_LINE else f"{source}:{line + 1}"


def _read(loader: Loader, node: yaml.Node, source: str, keys: tuple[str, ...], above: tuple[yaml.Node, ...]) -> Node:
    """One YAML node and everything below it."""
    location = _location(source, node.start_mark.line)
    name = ".".join(keys)
    if any(node is ancestor for ancestor in above):
        raise ConfigError(f"{location}: {name}: an alias that contains itself; write the value out")
    loader.values_read += 1 + (len(node.value) // 64 if isinstance(node, yaml.ScalarNode) else 0)
    if loader.values_read > MOST_VALUES:
        raise ConfigError(f"{location}: {f'{name}: ' if name else ''}more than {MOST_VALUES:,} values, each alias "
                          "counted as what it stands for; write out the values that you need")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return Node([_read(loader, item, source, keys, above) for item in node.value], location)
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value:  # no path can hold it
            raise ConfigError(f"{location}: {name} = {node.value[:100]!r}: has a NUL character; remove it")
        try:
            return Node(loader.construct_object(node), location)
        except (yaml.YAMLError, ValueError):
            shown = repr(node.value[:100])
            raise ConfigError(f"{location}: {name} = {shown}: not a plain YAML value; put it in quotes") from None
    children: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_location = _location(source, key_node.start_mark.line)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{key_location}: a key of {name or 'the file'} is not plain text; write `key: value`")
        key = key_node.value
        if key == "<<" and key_node.style is None:
            raise ConfigError(f"{key_location}: {name or 'the file'}: merge keys (`<<`) are not part of YAML 1.2; "
                              "write the keys out")
        dotted = ".".join((*keys, key))
        if key in children:
            raise ConfigError(f"{key_location}: key '{dotted}' is set twice, first at {children[key].location}; "
                              "keep one")
        child = _read(loader, value_node, source, (*keys, key), above)
        children[key] = Node(child.value, key_location)
    return Node(children, location)
