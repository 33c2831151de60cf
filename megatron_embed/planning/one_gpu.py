"""How much of a model can be trained on one GPU: all of it, adapters, or adapters over quantized weights."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_embed.config.schema import LoraConfig, RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.models.families import ModelShape
from megatron_embed.models.quantization import StoredQuantization, check_block_widths
from megatron_embed.planning.advice import adapted_linears, budget_holds
from megatron_embed.planning.hardware import GPU
from megatron_embed.planning.layouts import Plan, is_possible, plan_layout
from megatron_embed.planning.memory import GIB
from megatron_embed.planning.token_budget import MEMORY_SHARE, advised_budget

USUAL_RANK, USUAL_ALPHA = 16, 32.0
"""Adapters of a run that has none."""
RATE_NOTE = "# adapters learn at about ten times the learning rate of all parameters"

Changes = dict[str, dict[str, Any]]
"""Settings by section."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train a model."""

    name: str
    changes: Changes
    """What differs from the given configuration, with the fastest micro-batch and recomputation."""
    plan: Plan | None
    """None: it does not fit, whatever the micro-batch, or is refused."""
    refusal: str = ""
    """The message of a run that asked for it; empty: the model can be trained so."""


def compare_methods(config: RunConfig, shape: ModelShape, gpu: GPU, *, trains_all: bool, quantizes: bool,
                    stored: StoredQuantization | None = None) -> list[Method]:
    """Every method on one GPU, from all parameters with a fast optimizer to adapters over 4 bits.

    Args:
        stored: how the model's weights are quantized already, which leaves adapters over them alone.
        trains_all: whether all parameters can be trained: the model has no adapters yet.
        quantizes: whether the base weights can be quantized: they are a Hugging Face directory's.
    """
    return [_method(name, config, changes, shape, gpu)
            for name, changes in _ways(config, trains_all=trains_all, quantizes=quantizes, stored=stored)]


def _ways(config: RunConfig, *, trains_all: bool, quantizes: bool,
          stored: StoredQuantization | None) -> Iterator[tuple[str, Changes]]:
    """(name, settings) of every method."""
    full: Changes = {"lora": {}, "model": {"quantization": "none", "double_quantization": True},
                     "optimizer": {"name": "adamw", "cpu_offload": False, "precision_aware": False}}
    adamw_8bit = {"optimizer": full["optimizer"] | {"name": "adamw_8bit", "distributed": True}}
    lora = {} if config.lora.rank else {"rank": USUAL_RANK, "alpha": USUAL_ALPHA}
    adapters: Changes = {"lora": {"rank": config.lora.rank, **lora}}
    frozen = {"fp8": "none", "backend": "torch" if config.model.backend == "te" else config.model.backend}
    if stored is not None:
        yield f"QLoRA, {stored.quantization}", full | adapters | {"model": dataclasses.asdict(stored) | frozen}
        return
    if trains_all:
        yield "all parameters", full
        yield "all parameters, 8-bit AdamW", full | adamw_8bit
        if config.model.dtype != "float32":
            yield "all parameters, AdamW in host memory", full | {
                "optimizer": full["optimizer"] | {"cpu_offload": True, "distributed": True}}
    yield "LoRA", full | adapters
    if quantizes:
        yield "QLoRA, nf4", full | adapters | {
            "model": {"quantization": "nf4", "double_quantization": True, **frozen}}


def _method(name: str, config: RunConfig, changes: Changes, shape: ModelShape, gpu: GPU) -> Method:
    """The method with the fastest micro-batch, with recomputation only where nothing fits without."""
    for recompute in ("none", "full"):
        training = dataclasses.replace(config.training, recompute=recompute)
        try:
            candidate = _with(dataclasses.replace(config, training=training), changes)
            check_block_widths(candidate, shape)
            plan = _largest_micro_batch(candidate, shape, gpu)
        except ConfigError as error:
            return Method(name=name, changes={}, plan=None, refusal=str(error))
        if plan is not None:
            return Method(name=name, changes=_differences(config, plan.config), plan=plan)
    return Method(name=name, changes={}, plan=None)


def _largest_micro_batch(config: RunConfig, shape: ModelShape, gpu: GPU) -> Plan | None:
    """The plan with the advised token budget, else with one query at a time; None if neither fits."""
    adapted = adapted_linears(config, shape)
    plan = advised_budget(config, shape, 1, gpu, adapted, accepts=budget_holds)
    if plan is not None:
        return plan
    single = dataclasses.replace(config, training=dataclasses.replace(
        config.training, micro_batch_tokens=None, micro_batch_size=1))
    plan = plan_layout(single, shape, 1, gpu, adapted) if is_possible(single, shape, 1) else None
    return plan if plan is not None and within_share(plan, gpu) else None


def within_share(plan: Plan, gpu: GPU) -> bool:
    """Whether a plan leaves the memory that estimates of activations may need."""
    return plan.memory.total <= MEMORY_SHARE * gpu.memory_gib * GIB


def _with(config: RunConfig, changes: Changes) -> RunConfig:
    """The configuration with these settings. Without a rank, section lora is left out."""
    sections = {name: dataclasses.replace(vars(config)[name], **values) for name, values in changes.items()
                if name != "lora"}
    lora = dataclasses.replace(config.lora, **changes["lora"]) if changes["lora"] else LoraConfig()
    return dataclasses.replace(config, lora=lora, **sections)


def _differences(config: RunConfig, other: RunConfig) -> Changes:
    """The settings of `other` that differ from those of `config`."""
    changes: Changes = {}
    for section in ("model", "lora", "optimizer", "training"):
        before, now = vars(vars(config)[section]), vars(vars(other)[section])
        different = {key: value for key, value in now.items() if before[key] != value}
        if different:
            changes[section] = different
    return changes


def first_that_fits(methods: list[Method]) -> Method | None:
    """The method to take: the first of the list, but a slow optimizer in host memory only where nothing else fits."""
    fitting = [method for method in methods if method.plan is not None]
    return next((method for method in fitting if not method.changes.get("optimizer", {}).get("cpu_offload")),
                fitting[0] if fitting else None)


def methods_report(methods: list[Method], gpu: GPU) -> str:
    """A table of the methods, and the settings of the one to take."""
    lines = [f"\nOn one GPU of {gpu.name}, in {MEMORY_SHARE:.0%} of its memory"]
    width = max(len(method.name) for method in methods)
    for method in methods:
        if method.plan is None:
            reason = f"refused: {method.refusal}" if method.refusal else "does not fit"
            lines.append(f"  {method.name.ljust(width)}  {reason}")
            continue
        plan, training = method.plan, method.plan.config.training
        micro = (f"{training.micro_batch_tokens} tokens" if training.micro_batch_tokens is not None
                 else f"{training.micro_batch_size} query")
        host = f", {plan.memory.host / GIB:.0f} GiB on the host" if plan.memory.host else ""
        lines.append(f"  {method.name.ljust(width)}  fits: {plan.memory.total / GIB:5.1f} of {gpu.memory_gib:g} GiB"
                     f"{host}, micro-batches of {micro}, recompute {training.recompute}, {plan.time.total:.2g} s/step")
    chosen = first_that_fits(methods)
    if chosen is None:
        return "\n".join([*lines, "  Shorter texts, a smaller model or more GPUs are needed."])
    return "\n".join([*lines, f"Settings of {chosen.name}, besides those of the file", *_yaml(chosen)])


def _yaml(method: Method) -> Iterator[str]:
    """The changed settings, as lines of YAML."""
    for section, values in method.changes.items():
        yield f"  {section}:"
        for key, value in values.items():
            yield f"    {key}: {json.dumps(value)}"
    if method.changes.get("lora", {}).get("rank"):
        yield f"  {RATE_NOTE}"
    if not method.changes:
        yield "  (none)"
