"""Check that models can be merged: same tensor names, shapes, dtypes, configuration and tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import LARGEST_TOKENIZER, read_bytes, read_json_object
from megatron_embed.convert.dense_tensors import DenseWeights
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.errors import CheckpointError
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import MERGES_FILE, VOCABULARY_FILES

_IGNORED_SECTIONS = ("truncation", "padding", "version")
"""Sections of tokenizer.json that programs set on saving, or that do not change the ids of a text."""
_SETTINGS = ("pooling", "dense", "normalize", "similarity", "prompts", "lower_case", "chat")
"""Settings of a Sentence Transformers directory that must agree: they change what a vector means."""


def require_mergeable(models: Sequence[HFDirectory], base: HFDirectory | None) -> None:
    """Raise CheckpointError, naming both directories and the difference, unless the models can be merged.

    The base may have more tensors (an LM head) and another floating-point dtype; its pooling and prompts are ignored.
    """
    first = models[0]
    for other in models[1:]:
        _same_names(first, other)
        _same_shape(first, other)
        _same_tensors(first, other, dtypes=True)
        _same_settings(first.root, other.root)
        _same_tokenizer(first.path, other.path)
    if base is not None:
        if missing := sorted(first.stored_names.keys() - base.stored_names.keys()):
            raise _refusal(first.path, base.path, f"tensor {missing[0]} is only in the first ({len(missing)} such)",
                           "name the model that training began with as --base")
        _same_shape(first, base)
        _same_tensors(first, base, dtypes=False)
        _same_dense(first.root, base.root, dtypes=False)
        _same_tokenizer(first.path, base.path)


def _refusal(first: Path, other: Path, difference: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{first} and {other} cannot be merged: {difference}; {remedy}")


def _same_names(first: HFDirectory, other: HFDirectory) -> None:
    for one, two in ((first, other), (other, first)):
        if missing := sorted(one.stored_names.keys() - two.stored_names.keys()):
            raise _refusal(first.path, other.path, f"tensor {missing[0]} is only in {one.path} ({len(missing)} such)",
                           "merge models that were exported in the same way")


def _same_shape(first: HFDirectory, other: HFDirectory) -> None:
    """Compare every setting of the architecture; how new weights are initialized does not matter."""
    one, two = dataclasses.asdict(first.shape), dataclasses.asdict(other.shape)
    for key in one:
        if key != "initializer_range" and one[key] != two[key]:
            raise _refusal(first.path, other.path, f"config.json: {key} is {one[key]!r} in the first and {two[key]!r} "
                           "in the second", "only models of one architecture can be merged")


def _same_tensors(first: HFDirectory, other: HFDirectory, *, dtypes: bool) -> None:
    for name in first.stored_names:
        one, two = first.entry(name), other.entry(name)
        if one.shape != two.shape:
            raise _refusal(first.path, other.path, f"{name} has shape {list(one.shape)} in the first and "
                           f"{list(two.shape)} in the second", "merge models of the same shape")
        if one.dtype != two.dtype and (dtypes or not two.dtype.is_floating_point):
            raise _refusal(first.path, other.path, f"{name} is {_dtype_name(one.dtype)} in the first and "
                           f"{_dtype_name(two.dtype)} in the second", "export both in one dtype")


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _same_settings(first: Path, other: Path) -> None:
    one, two = dataclasses.asdict(read_saved_settings(first)), dataclasses.asdict(read_saved_settings(other))
    for key in _SETTINGS:
        if one[key] != two[key]:
            raise _refusal(first, other, f"{key} is {one[key]!r} in the first and {two[key]!r} in the second",
                           "such vectors cannot be averaged; merge models trained with the same setting")
    _same_dense(first, other, dtypes=True)


def _same_dense(first: Path, other: Path, *, dtypes: bool) -> None:
    """Compare the Dense modules of two directories; also reads the headers of their weights."""
    one, two = read_saved_settings(first).dense, read_saved_settings(other).dense
    if one != two:
        raise _refusal(first, other, f"their Dense modules are {one} and {two}"[:200], "merge models with the same "
                       "modules, without --base if that has none")
    for settings in one:
        with DenseWeights(first, settings) as left, DenseWeights(other, settings) as right:
            for name in left.names:
                if dtypes and left.entry(name).dtype != right.entry(name).dtype:
                    raise _refusal(first, other, f"{settings.path}: {name} is {_dtype_name(left.entry(name).dtype)} in "
                                   f"the first and {_dtype_name(right.entry(name).dtype)} in the second",
                                   "export both in one dtype")


def _same_tokenizer(first: Path, other: Path) -> None:
    one, two = _vocabulary(first), _vocabulary(other)
    for key in sorted(one.keys() | two.keys()):
        if key not in one or key not in two:
            only, without = (first, other) if key in one else (other, first)
            raise _refusal(first, other, f"{key} of the tokenizer is only in {only}", f"copy the tokenizer files of "
                           f"{only} to {without}, if the two models use the same")
        if one[key] != two[key]:
            raise _refusal(first, other, f"their tokenizers differ in {key}", "the same text would get different ids; "
                           "merge models with one tokenizer")


def _vocabulary(directory: Path) -> dict[str, Any]:
    """The parts of a tokenizer that determine the ids of a text, by file or section."""
    if (directory / "tokenizer.json").is_file():
        tokenizer = read_json_object(directory / "tokenizer.json", LARGEST_TOKENIZER)
        values = {f"tokenizer.json: {key}": value for key, value in tokenizer.items() if key not in _IGNORED_SECTIONS}
        model = values.get("tokenizer.json: model")
        if isinstance(model, dict) and isinstance(model.get("merges"), list):
            # Older versions of the tokenizers library write "a b" where newer ones write ["a", "b"].
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            values["tokenizer.json: model"] = {**model, "merges": merges}
        return values
    return {name: read_bytes(directory / name, LARGEST_TOKENIZER) for name in (*VOCABULARY_FILES, MERGES_FILE)
            if (directory / name).is_file()}
