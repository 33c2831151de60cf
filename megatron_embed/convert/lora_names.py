"""Names of LoRA adapters: the linear layers that may have them, and each adapter's tensors on both sides.

All of it follows from the family's weight table.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import Rename, Transform, expand_braces
from megatron_embed.errors import ConfigError
from megatron_embed.models.families import ModelShape
from megatron_embed.models.lora_settings import AdapterSettings

ALL_LINEAR = "all-linear"
_LINEAR = re.compile(r"\.linear_(qkv|proj|fc1|fc2)\.weight")


@dataclass(frozen=True, kw_only=True)
class AdapterTensor:
    """One matrix of one adapter, or the rows of it that belong to one of several projections that are one Hugging Face
    module: these share A, and each has a B of its own."""

    ours: str
    """Our parameter's name; layers and experts are counted over the whole model."""
    module: str
    """Full Hugging Face name of the linear layer."""
    matrix: Literal["A", "B"]
    shape: tuple[int, int]
    hf_rows: tuple[int, int]
    """(first of its rows in PEFT's matrix, all rows of that one)."""
    shard_dim: int | None
    """Dimension split over tensor-parallel ranks (expert-tensor-parallel ones for an expert); None: replicated."""
    is_expert: bool


def linear_rules(family: Family) -> dict[str, Transform]:
    """Hugging Face name of every linear module inside the layers (`*` the layer, `#` the expert) -> its rule."""
    return {name.removesuffix(".weight"): rule for rule in family.rules if _LINEAR.search(rule.ours)
            for name in expand_braces(rule.hf)}


def resolve_modules(family: Family, targets: Sequence[str], key: str) -> tuple[str, ...]:
    """The linear modules that `targets` name, in the table's order: full names or endings, as in PEFT.

    Raises:
        ConfigError: beginning with `key`: a target names no linear module, or only one of gate and up of experts.
    """
    if family.no_adapters is not None:
        raise ConfigError(f"{key} = {list(targets)}: a {family.name} model takes no adapters: {family.no_adapters}; "
                          "train all of it (lora.rank = 0)", key=key)
    known = linear_rules(family)
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in known if target == ALL_LINEAR or name == target or name.endswith(f".{target}")}
        if not matches:
            names = sorted({name.rsplit(".", 1)[-1] for name in known})
            raise ConfigError(f"{key} = {list(targets)}: {target!r} names no linear layer of a {family.name} model; "
                              f"known: {', '.join(names)}, {ALL_LINEAR}, or longer endings such as "
                              f"{_ending(next(iter(known)))}", key=key)
        chosen |= matches
    modules = tuple(name for name in known if name in chosen)
    for rule in {known[name]: None for name in modules}:
        names = [name.removesuffix(".weight") for name in expand_braces(rule.hf)]
        missing = [name for name in names if name not in chosen]
        if rule.is_expert and missing:
            raise ConfigError(f"{key} = {list(targets)}: the experts' {', '.join(map(_leaf, names))} are one tensor in "
                              f"Transformers, so PEFT cannot load adapters without {_leaf(missing[0])}; add it",
                              key=key)
    return modules


def parts_by_linear(family: Family, modules: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
    """`Adapters.parts` for these Hugging Face modules."""
    parts: dict[str, tuple[str | None, ...]] = {}
    for rule in linear_rules(family).values():
        names = [name.removesuffix(".weight") for name in expand_braces(rule.hf)]
        if any(name in modules for name in names):
            parts[rule.ours.removesuffix(".weight")] = tuple(
                _leaf(name) if name in modules else None for name in names) * max(1, len(rule.stacked))
    return parts


def adapter_tensors(family: Family, shape: ModelShape, modules: Sequence[str], rank: int) -> Iterator[AdapterTensor]:
    """Every matrix of the adapters on `modules`, layer by layer."""
    known = linear_rules(family)
    for rule, context in family.applied_rules(shape):
        names = [name.removesuffix(".weight") for name in expand_braces(rule.hf)]
        for name, words in zip(names, rule.hf_shapes(), strict=True):
            if known.get(name) is not rule or name not in modules:
                continue
            outputs, inputs = context.sizes(words)
            linear = f"{context.name(rule.ours).removesuffix('.weight')}.lora.{_leaf(name)}"
            row_parallel = isinstance(rule, Rename) and rule.shard_dim == 1
            yield AdapterTensor(ours=f"{linear}.A", module=context.name(name), matrix="A", shape=(rank, inputs),
                                hf_rows=(0, rank), shard_dim=1 if row_parallel else None, is_expert=rule.is_expert)
            first = 0
            for index, rows in enumerate(context.sizes(" ".join(rule.stacked)) or (outputs,)):
                yield AdapterTensor(ours=f"{linear}.B{index if rule.stacked else ''}", module=context.name(name),
                                    matrix="B", shape=(rows, rank), hf_rows=(first, outputs),
                                    shard_dim=None if row_parallel else 0, is_expert=rule.is_expert)
                first += rows


def peft_targets(family: Family, modules: Sequence[str]) -> list[str]:
    """PEFT's `target_modules` for exactly these modules: the shortest endings that match no other linear module."""
    heads = ("pooler.dense", "classifier", "classifier.dense", "cls.predictions.transform.dense", "lm_head", "score")
    others = [*(name for name in linear_rules(family) if name not in modules), *heads]
    targets = []
    for module in modules:
        words = re.split(r"\.\*\.|\.#\.", module)[-1].split(".")
        endings = [".".join(words[-length:]) for length in range(1, len(words) + 1)]
        unique = [ending for ending in endings if not any(f".{other}".endswith(f".{ending}") for other in others)]
        targets.append(unique[0] if unique else endings[-1])
    return sorted(set(targets))


def adapter_settings(values: Mapping[str, object]) -> AdapterSettings:
    """AdapterSettings from `dataclasses.asdict` or JSON. Raises TypeError for other fields."""
    modules = values["modules"]
    if not isinstance(modules, list | tuple):
        raise TypeError(f"modules = {modules!r}")
    return AdapterSettings(**{**values, "modules": tuple(modules)})  # type: ignore[arg-type]


def _leaf(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _ending(module: str) -> str:
    """The last two words of a module's name."""
    return ".".join(module.split(".")[-2:])
