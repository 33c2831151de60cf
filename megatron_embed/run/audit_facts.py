"""What a run says of itself in audit.jsonl at each start, for a later audit to compare."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from megatron_embed import __version__
from megatron_embed.config.load import to_dict
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.loader import StepLoader
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.objectives.base import Objective
from megatron_embed.objectives.replica_split import ReplicaSplit
from megatron_embed.parallel.topology import Topology
from megatron_embed.run.run_directory import describe_rows
from megatron_embed.run.task import Inputs
from megatron_embed.training.step import Trainer

SECTIONS = ("task", "model", "embedding", "reranker", "objective", "data", "training", "lora", "optimizer")
"""Sections of the configuration that decide a step's numbers, apart from the layout."""


_NOT_COMPARED = ("loader.packing.", "sampler.num_duplicates", "tokenizer.model_dir", "schedule.num_steps")
"""Beginnings of what depends on layout, progress or place."""


def facts_of_start(inputs: Inputs, topology: Topology) -> dict[str, Any]:
    """Version, layout, settings and rows of a run at one of its starts."""
    config, state = inputs.config, inputs.resume_state
    return {"version": __version__, "world_size": topology.world_size, "parallel": to_dict(config)["parallel"],
            "dtype": config.model.dtype, "threads": torch.get_num_threads(),
            "checkpoint": None if state.checkpoint is None else state.checkpoint.name,
            "settings": settings_digest(config), "train_steps": inputs.train_steps,
            "rows": describe_rows(inputs.records, inputs.order)}


def settings_digest(config: RunConfig) -> str:
    """Hash of all settings that decide a step's numbers, apart from the layout."""
    values = to_dict(config)
    text = json.dumps([values[name] for name in SECTIONS], sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def facts_of_objects(objective: Objective[Any], trainer: Trainer, loader: StepLoader[Any],
                     inputs: Inputs) -> dict[str, Any]:
    """The plain settings of the objects that a run is made of, by name: they say what it computes, whatever its
    configuration says. Only those that are equal under every layout."""
    model, groups = trainer.grad_cache.models[0], trainer.optimizer.param_groups
    inner = objective.inner if isinstance(objective, ReplicaSplit) else objective
    values = {**_plain("objective", inner), **_plain("tokenizer", vars(inputs.task).get("tokenizer")),
              **_plain("loader", loader), **_plain("sampler", inputs.sampler)}
    values |= {f"model.{name}": vars(model)[name] for name in ("pooling", "normalize", "causal")}
    values |= {"model.dropout": _largest_dropout(trainer.grad_cache.models)}
    values |= {"optimizer.clip_grad": trainer.optimizer.config.clip_grad, **{
        f"optimizer.{name}": sorted({repr(group.get(name)) for group in groups}) for name in ("betas", "eps")}}
    values |= _plain("schedule", trainer.scheduler)
    return dict(json.loads(json.dumps(values, default=repr)))


def _plain(name: str, value: object) -> dict[str, Any]:
    """Plain attributes of an object and of the dataclasses among them, by dotted name."""
    found: dict[str, Any] = {}
    for key, part in vars(value).items() if value is not None else ():
        dotted = f"{name}.{key.lstrip('_')}"
        if isinstance(part, bool | int | float | str | None) or _is_plain_list(part):
            found[dotted] = part
        elif isinstance(part, dict) and all(isinstance(item, bool | int | float | str) for item in part.values()):
            found |= {f"{dotted}.{item}": entry for item, entry in part.items()}
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            found |= _plain(dotted, part)
        elif isinstance(part, list | tuple) and part and all(map(dataclasses.is_dataclass, part)):
            found[dotted] = [repr(item) for item in part]
    return {key: item for key, item in found.items() if not key.startswith(_NOT_COMPARED)}


def _is_plain_list(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, bool | int | float | str) for part in value)


def _largest_dropout(models: Sequence[EmbeddingModel]) -> float:
    """The largest probability of dropout in this rank's layers."""
    found = [0.0]
    for module in (module for model in models for module in model.modules()):
        found += [vars(module).get(name) or 0.0 for name in ("hidden_dropout", "dropout")
                  if isinstance(vars(module).get(name), float)]
        found += [module.p] if isinstance(module, torch.nn.Dropout) else []
    return max(found)
