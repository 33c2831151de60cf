"""What a run says of itself in audit.jsonl at each start, for a later audit to compare."""

import hashlib
import json
from typing import Any

import torch

from megatron_embed import __version__
from megatron_embed.config.load import to_dict
from megatron_embed.config.schema import RunConfig
from megatron_embed.parallel.topology import Topology
from megatron_embed.run.run_directory import describe_rows
from megatron_embed.run.task import Inputs

SECTIONS = ("task", "model", "embedding", "reranker", "objective", "data", "training", "lora", "optimizer")
"""Of the configuration: what decides a step's numbers, apart from the layout."""


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
