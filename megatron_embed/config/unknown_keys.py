"""The refusal of unknown keys: all of a file at once, each with what it is here."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from megatron_embed.config.foreign_table import foreign_word, near_foreign_name
from megatron_embed.config.yaml_tree import COMMAND_LINE, Node
from megatron_embed.errors import ConfigError

_MANY_FOREIGN = 2
"""Number of foreign keys from which on the refusal names the command that translates a file."""


_A_SLIP = 0.85
"""Similarity from which on a key is a name with a slip of the pen, as difflib measures it."""


def refuse_unknown_keys(target: Any, tree: Node) -> None:
    """Refuse every key of the tree that `target`, the dataclass of a run, does not have.

    Raises:
        ConfigError: one message for all of them, beginning with the location of the first.
    """
    known = _Known(target)
    refusals = list(known.refusals(target, tree, ""))
    if not refusals:
        return
    file = tree.location.rpartition(":")[0]
    if known.num_foreign >= _MANY_FOREIGN and file and tree.location != COMMAND_LINE:
        refusals.append(f"`megatron-embed init --from {file}` translates a configuration of another trainer")
    raise ConfigError(" | ".join(refusals))


def setting_for_option(target: Any, name: str) -> str:
    """Advice: the setting to write in place of an option of another trainer's command line.

    Args:
        target: the dataclass of a run.
        name: the option without its dashes, in lower case, with underscores.
    """
    known: dict[str, list[str]] = {}
    for dotted in _dotted_keys(target, ""):
        known.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    word, same = foreign_word(name), known.get(name, [])
    if word is not None and not set(same).intersection(word.keys):
        return word.answer(name) + (f"; write {word.keys[0]}=VALUE" if word.keys else "")
    near = same or [key for key in difflib.get_close_matches(name, known, n=1, cutoff=0.75) for key in known[key]]
    return "write " + " or ".join(f"{dotted}=VALUE" for dotted in near or ["section.key"])


class _Known:
    """The keys of a run.

    Attributes:
        num_foreign: keys so far that the table of other trainers' settings knows.
    """

    def __init__(self, target: Any) -> None:
        self.num_foreign = 0
        dotted = list(_dotted_keys(target, ""))
        self._by_name = {name.rpartition(".")[2]: name for name in reversed(dotted)}

    def refusals(self, target: Any, node: Node, name: str) -> Iterator[str]:
        """A sentence for each unknown key below a mapping that is to become `target`; `name` is its dotted key."""
        annotations = get_type_hints(target)
        assert isinstance(node.value, dict)
        for key, child in node.value.items():
            dotted = f"{name}.{key}" if name else key
            if key not in annotations:
                yield from self._answers(target, dotted, child)
            elif (section := _dataclass_in(annotations[key])) is not None:
                for item in child.value if isinstance(child.value, list) else [child]:
                    if isinstance(item.value, dict):
                        yield from self.refusals(section, item, dotted)
                    elif dotted == "model" and isinstance(item.value, str):
                        yield (f"{item.location}: model = {item.value!r} is a name in place of a section; write "
                               f"`model: {{path: {item.value}}}`")

    def _answers(self, target: Any, dotted: str, node: Node) -> Iterator[str]:
        """A sentence about one unknown key, or about each key below it that is a setting of another trainer."""
        inside = list(_foreign_below(dotted, node))
        if inside:
            self.num_foreign += len(inside)
            yield from (f"{child.location}: unknown key '{key}'; {answer}" for key, child, answer in inside)
            return
        yield f"{node.location}: unknown key '{dotted}'; {self._remedy(target, dotted, node.value)}"

    def _remedy(self, target: Any, dotted: str, value: object) -> str:
        """The key's name here, the same key in another section, the nearest key, or the list of known keys."""
        key = dotted.rpartition(".")[2]
        own = [field.name for field in dataclasses.fields(target)]
        word, same = foreign_word(dotted), self._by_name.get(key)
        if word is not None and (same is None or same not in word.keys):
            self.num_foreign += 1
            return word.answer(key, value)
        if same is not None:
            return f"did you mean '{same}'?"
        if not difflib.get_close_matches(key, own, n=1, cutoff=_A_SLIP) and (name := near_foreign_name(key, _A_SLIP)):
            meant = foreign_word(name)
            assert meant is not None
            return f"did you mean '{name}'? {meant.answer(name)}"
        if near := difflib.get_close_matches(key, own, n=1):
            return f"did you mean '{near[0]}'?"
        if near := difflib.get_close_matches(key, self._by_name, n=1, cutoff=0.75):
            return f"did you mean '{self._by_name[near[0]]}'?"
        if near := _with_most_words_of(key, own):
            return "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
        return f"known here: {', '.join(own)}"


def _with_most_words_of(key: str, names: list[str]) -> list[str]:
    """The names that share most words with the key, like num_negatives with negatives_per_query; none if none does."""
    words = {word for word in key.split("_") if len(word) > 3}
    shared = {name: len(words.intersection(name.split("_"))) for name in names}
    most = max(shared.values(), default=0)
    return [name for name, count in shared.items() if count == most > 0]


def _foreign_below(dotted: str, node: Node) -> Iterator[tuple[str, Node, str]]:
    """Dotted key, value and answer of each setting of another trainer in a mapping."""
    if not isinstance(node.value, dict):
        return
    for key, child in node.value.items():
        inner = f"{dotted}.{key}"
        if isinstance(child.value, dict):
            yield from _foreign_below(inner, child)
        elif (word := foreign_word(inner)) is not None:
            yield inner, child, word.answer(key, child.value)


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass that an annotation is, or that its list holds; None if there is none."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    if get_origin(annotation) is tuple and dataclasses.is_dataclass(get_args(annotation)[0]):
        return get_args(annotation)[0]
    return None


def _dotted_keys(target: Any, name: str) -> Iterator[str]:
    for key, annotation in get_type_hints(target).items():
        dotted = f"{name}.{key}" if name else key
        yield dotted
        if dataclasses.is_dataclass(annotation):
            yield from _dotted_keys(annotation, dotted)
