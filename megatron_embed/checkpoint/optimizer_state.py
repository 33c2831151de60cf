"""The optimizer's state in a checkpoint: keys that no layout changes, and groups of parameters matched by kind.

Megatron gives the experts of a mixture an optimizer of their own where they are divided otherwise than the rest of the
model (expert parallelism, or expert tensor parallelism that differs), so a change of layout adds or removes it. Names
of parameters are unique in the whole model, so a checkpoint need not say which optimizer holds which.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_embed.errors import CheckpointError
from megatron_embed.platform.compat import (
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
OFFLOADING = ("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32", "pin_cpu_grads",
              "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d")
"""Keys of the groups of Megatron's offloaded optimizer. Two hold classes, which torch refuses to load."""


def optimizer_to_save(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's part of a checkpoint, also before its first step.

    It does not say on which device its state was, or how it was divided: a run may resume elsewhere. Communicates over
    the data-parallel group if the optimizer is distributed.

    Args:
        model: the model's sharded tensors, see `model_state`.
    """
    initialize_optimizer_state(optimizer)
    sharded: dict[str, Any] = optimizer.sharded_state_dict(model, is_loading=False, metadata=SHARDING)
    for group in _groups(sharded):
        for key in OFFLOADING:
            group.pop(key, None)
    return sharded


class OptimizerRestore:
    """An optimizer's state on its way from a checkpoint.

    Args:
        model: the model's sharded tensors, see `model_state`. Communicates over the data-parallel group, where the
            optimizer is distributed.
    """

    def __init__(self, optimizer: MegatronOptimizer, model: dict[str, Any]) -> None:
        self._optimizer = optimizer
        self._own: dict[str, Any] = optimizer.sharded_state_dict(model, is_loading=True, metadata=SHARDING)
        self._slots = []
        for holder, key in list(_leaves(self._own)):
            value = holder[key]
            if isinstance(value, LocalNonpersistentObject):
                holder[key] = value.unwrap()
            elif isinstance(value, ShardedBase):
                self._slots.append((holder, key))

    def wanted(self, stored: Iterable[str]) -> dict[int, Any]:
        """The sharded tensors to load, each under that one of the `stored` keys which is its own, with `chained_N.` in
        front or without. No communication."""
        spelling = {CHAINED.sub("", key, count=1) if CHAINED.match(key) else key: key for key in stored}
        tensors = {index: holder[key] for index, (holder, key) in enumerate(self._slots)}
        for tensor in tensors.values():
            tensor.key = spelling.get(tensor.key, tensor.key)
        return tensors

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
