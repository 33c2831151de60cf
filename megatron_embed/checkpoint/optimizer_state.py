"""The optimizer's state in a checkpoint: keys that no layout changes, and groups of parameters matched by kind.

Megatron gives the experts of a mixture an optimizer of their own where they are divided otherwise than the rest of the
model (expert parallelism, or expert tensor parallelism that differs), so a change of layout adds or removes it. Names
of parameters are unique in the whole model, so a checkpoint need not say which optimizer holds which.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from megatron_embed.checkpoint.optimizer_slices import SliceRestore, slices_to_save
from megatron_embed.errors import CheckpointError
from megatron_embed.platform.compat import (
    DistributedOptimizer,
    LocalNonpersistentObject,
    MegatronOptimizer,
    ShardedBase,
    initialize_optimizer_state,
)

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True}
"""Megatron 0.16.1's default for the distributed optimizer raises on save; this one resumes at another layout, without
`chained_N.` before the keys."""
CHAINED = re.compile(r"chained_\d+\.")
"""Beginning of the keys of checkpoints that were written before, where the experts had an optimizer of their own."""

CONFIGURED = ("betas", "eps", "max_lr", "min_lr")
"""Keys that Megatron saves with the groups of parameters, but the configuration sets: a resumed run may change them."""
KINDS = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""Keys by which groups of parameters differ, whatever the configuration and the layout say."""
EXPERTS = "is_expert_parallel"
"""Key of the groups whose parameters are divided as experts are; by layout."""
MAIN_PARAMETER = re.compile(r"optimizer\.state\.(param|fp32_param)\.")
"""Beginning of a main parameter's key: of the distributed optimizer, and of the other, which has none of a parameter
that is itself in float32."""
OFFLOADING = ("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32", "pin_cpu_grads",
              "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d")
"""Keys of the groups of Megatron's offloaded optimizer. Two hold classes, which torch refuses to load."""


def optimizer_to_save(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's part of a checkpoint, also before its first step.

    It does not say on which device its state was, or how it was divided: a run may resume elsewhere. No communication.

    Args:
        model: the model's sharded tensors, see `model_state`.
    """
    initialize_optimizer_state(optimizer)
    declared, parts = _declarations(model), []
    for part in _synchronized(optimizer):
        if isinstance(part, DistributedOptimizer):
            parts.append({**part.state_dict(), "param_state": slices_to_save(part, declared)})
        else:
            parts.append(part.sharded_state_dict(model, is_loading=False, metadata=SHARDING))
    sharded = _chained(parts)
    for group in _groups(sharded):
        for key in OFFLOADING:
            group.pop(key, None)
    return sharded


class OptimizerRestore:
    """An optimizer's state on its way from a checkpoint. No communication.

    Args:
        model: the model's sharded tensors, see `model_state`.
    """

    def __init__(self, optimizer: MegatronOptimizer, model: dict[str, Any]) -> None:
        self._optimizer = optimizer
        initialize_optimizer_state(optimizer)
        declared, parts = _declarations(model), []
        self._slices: list[SliceRestore] = []
        for part in _synchronized(optimizer):
            if isinstance(part, DistributedOptimizer):
                parts.append(part.state_dict())
                self._slices.append(SliceRestore(part, declared))
            else:
                parts.append(part.sharded_state_dict(model, is_loading=True, metadata=SHARDING))
        self._own, self._slots = _chained(parts), []
        for holder, key in list(_leaves(self._own)):
            value = holder[key]
            if isinstance(value, LocalNonpersistentObject):
                holder[key] = value.unwrap()
            elif isinstance(value, ShardedBase):
                self._slots.append((holder, key))

    def wanted(self, stored: Collection[str]) -> dict[int, Any]:
        """The sharded tensors to load, each under that one of the `stored` keys which is its own: with `chained_N.` in
        front or without, and as an optimizer writes it that is distributed, or one that is not. No communication."""
        spelling = {CHAINED.sub("", key, count=1) if CHAINED.match(key) else key: key for key in stored}
        if spelling and not any(map(MAIN_PARAMETER.match, spelling)):
            for slices in self._slices:
                slices.take_main_parameters_from_model()
        tensors = [holder[key] for holder, key in self._slots]
        tensors += [tensor for slices in self._slices for tensor in slices.tensors]
        for tensor in tensors:
            other = MAIN_PARAMETER.sub(_of_the_other_optimizer, tensor.key)
            tensor.key = spelling.get(tensor.key, spelling.get(other, tensor.key))
        return dict(enumerate(tensors))

    def load(self, tensors: Mapping[int, Any], saved: Any) -> None:
        """Give the optimizer the loaded `tensors` and the groups of parameters in the state that was `saved` with them.

        Of a saved group only the keys that the configuration does not set are taken. Another class of optimizer may
        have saved it (torch's, Transformer Engine's, one in host memory). Keys that only this optimizer has stay:
        without them Transformer Engine's FusedAdam stops for want of `bias_correction`, and torch's,
        which takes None for what is missing, is no longer fused. No communication.

        Raises:
            CheckpointError: no group of the checkpoint is of the kind of one of the optimizer's.
        """
        for index, (holder, key) in enumerate(self._slots):
            holder[key] = tensors[index]
        groups = list(_groups(saved))
        # A rank that saved may have had no parameter in a group, whose steps were then not counted; all are equal.
        steps = max((group["step"] for group in groups if group.get("step") is not None), default=None)
        for group in _groups(self._own):
            settings = _matching_group(groups, group)
            group.update({key: value for key, value in settings.items() if value is not None
                          and key not in (*CONFIGURED, *KINDS, EXPERTS, "params")})
            if steps is not None:
                group["step"] = steps
        self._optimizer.load_state_dict(self._own)
        for slices in self._slices:
            slices.load()


def _declarations(model: dict[str, Any]) -> dict[int, ShardedBase]:
    """The model's sharded tensors by the `id` of the parameter."""
    values = [holder[key] for holder, key in _leaves(model)]
    return {id(value.data): value for value in values if isinstance(value, ShardedBase)}


def _synchronized(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain, with the same number of steps in all their groups, as Megatron sees to at a save."""
    if len(optimizer.chained_optimizers) > 1:
        optimizer._synchronize_steps()
    return list(optimizer.chained_optimizers)


def _chained(parts: list[dict[str, Any]]) -> dict[Any, Any]:
    """The states of a chain's optimizers as Megatron's `ChainedOptimizer` takes them."""
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _of_the_other_optimizer(key: re.Match[str]) -> str:
    """The beginning of a main parameter's key as the other kind of optimizer writes it."""
    return f"optimizer.state.{'fp32_param' if key[1] == 'param' else 'param'}."


def _matching_group(groups: Iterable[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """The saved group of the kind of `own`, preferably with the same division; groups that differ only in their
    division have the same settings."""
    alike = [group for group in groups if all(group.get(key) == own.get(key) for key in KINDS)]
    if not alike:
        kind = ", ".join(f"{key} {own.get(key)}" for key in KINDS)
        raise CheckpointError(f"the checkpoint's optimizer has no group of parameters with {kind}; it belongs to "
                              "another model")
    return next((group for group in alike if group.get(EXPERTS) == own.get(EXPERTS)), alike[0])


def _leaves(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(dictionary or list, key or index) of everything in nested dictionaries and lists that is neither."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield tree, key


def _groups(tree: Any) -> Iterator[dict[str, Any]]:
    """The groups of parameters of every optimizer in a state, however they are nested."""
    if isinstance(tree, dict):
        yield from tree.get("param_groups", ())
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        if isinstance(part, dict | list | tuple):
            yield from _groups(part)
