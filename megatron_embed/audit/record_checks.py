"""Checks of the lines of an audit.jsonl that may come from anywhere: every later reader relies on their types."""

import json
import math
import re
from typing import Any

from megatron_embed.config.load import config_of_values, to_dict
from megatron_embed.errors import ConfigError
from megatron_embed.training.fingerprints import COUNTS, HASHES

_LARGEST = 1 << 62
_MOST_MICRO_BATCHES = 1 << 24
"""An audit counts them one by one."""
_HASH = re.compile("[0-9a-f]{16}")
_METRICS = ("loss", "grad_norm", "learning_rate", "skipped")
"""Metrics of every step; the last two are always finite."""


def checked_record(record: object) -> dict[str, Any]:
    """A line of audit.jsonl: a start, a save or a step. Raises ValueError, naming the key, if it is none."""
    if not isinstance(record, dict):
        raise ValueError("must be an object")
    _whole(record, "step")
    if "start" in record or "save" in record:
        _hash(record, "parameter_bits")
        _number(record, "parameter_norm")
    if "start" in record:
        record["start"] = _start(record["start"])
    elif "save" in record:
        _hash(record, "optimizer_bits")
        for name, entry in _object(record, "save").items():
            if not isinstance(entry, list) or len(entry) != 2 or not all(map(_is_number, entry)):
                raise ValueError(f"save: {name[:80]!r} must be [bits, norm]")
    else:
        _check_step(record)
    if "drifted" in record:
        for rank in _object(record, "drifted"):
            if not rank.isdecimal():
                raise ValueError("drifted: must be norms by rank")
            _number(record["drifted"], rank)
        _number(record, "parameter_norm")
    return record


def _start(facts: object) -> dict[str, Any]:
    """The facts of a start, with the sizes of its layout as the configuration has them."""
    if not isinstance(facts, dict):
        raise ValueError("start: must be an object")
    world_size = _whole(facts, "world_size")
    _object(facts, "rows")
    if not isinstance(facts.get("dtype"), str) or not isinstance(facts.get("settings", ""), str):
        raise ValueError("start: dtype and settings must be texts")
    if "objects" in facts:
        _object(facts, "objects")
    try:
        config = config_of_values({"model": {"path": "."}, "parallel": _object(facts, "parallel")})
    except ConfigError as error:
        raise ValueError(f"start: {error}") from None
    parallel = to_dict(config)["parallel"]
    ranks = math.prod(parallel[f"{name}_parallel_size"] for name in ("tensor_model", "pipeline_model", "context"))
    if world_size < 1 or world_size % ranks:
        raise ValueError(f"start: world_size = {world_size} is not a multiple of the layout's {ranks} ranks")
    return {**facts, "parallel": parallel}


def _check_step(record: dict[str, Any]) -> None:
    for name in HASHES:
        _hash(record, name)
    for name in COUNTS:
        _whole(record, name)
    if _whole(record, "micro_batches") > _MOST_MICRO_BATCHES:
        raise ValueError(f"micro_batches must be at most {_MOST_MICRO_BATCHES:,}")
    metrics = _object(record, "metrics")
    for name in dict.fromkeys((*_METRICS, *metrics)):
        if name not in metrics or (metrics[name] is None and name in _METRICS[2:]) or not (
                metrics[name] is None or _is_number(metrics[name])):
            raise ValueError(f"metrics: {name[:80]} must be a number")
    if "parameter_bits" in record:
        _hash(record, "parameter_bits")
    for name in ("parameter_norm", "norm_weights"):
        if name in record:
            _number(record, name)


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object")
    return value


def _whole(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{name} = {json.dumps(value)[:80]} must be a whole number from 0 on")
    return value


def _hash(values: dict[str, Any], name: str) -> None:
    value = values.get(name)
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"{name} = {json.dumps(value)[:80]} must be 16 hexadecimal digits")


def _number(values: dict[str, Any], name: str) -> None:
    if not _is_number(values.get(name)):
        raise ValueError(f"{name} = {json.dumps(values.get(name))[:80]} must be a number")


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold; a diverged run's may be infinite, or none."""
    return isinstance(value, float) or (type(value) is int and abs(value) <= 1e300)
