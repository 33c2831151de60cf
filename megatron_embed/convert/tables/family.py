"""A family's weight table, and the questions asked of it: which row makes this parameter, is this tensor carried."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_embed.convert.tables.transforms import Context, Transform
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape

LAYER_PATTERN = re.compile(r"\.layers\.(\d+)\.")
"""The layer number in one of our names."""
EXPERT_PATTERN = re.compile(r"\.local_experts\.(\d+)\.")
"""The expert's number, counted over the whole layer, in one of our names."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the weights of one `model_type` are named and laid out, on both sides."""

    name: str
    """`model_type` of config.json."""
    prefix: str
    """Of the backbone's tensors in a model with a head; a bare backbone stores the same names without it."""
    rules: tuple[Transform, ...]
    carried: tuple[str, ...]
    """Shell patterns of tensors that no layer of ours uses; they pass through a conversion untouched."""
    tied: tuple[tuple[str, str], ...] = ()
    """(head, embedding) pairs that share one tensor when `tie_word_embeddings` is true."""
    old_endings: tuple[tuple[str, str], ...] = ()
    """(old, new) ends of names that Transformers renames when it loads them."""
    fused_norms: tuple[tuple[str, str], ...] = ()
    """(norm, name under the linear behind it) that checkpoints store, the way Transformer Engine's fused modules name
    them (Megatron-Core's `sharded_state_dict` renames them so): CPU and GPU layers read each other's checkpoints."""

    def rows(self, shape: ModelShape) -> Iterator[tuple[Transform, Context]]:
        """Every row with every layer and expert it applies to: outside the layers first, then layer by layer.

        Rows of biases that this model does not have are left out.
        """
        rules = [rule for rule in self.rules if not _is_missing_bias(rule.ours, shape)]
        for rule in rules:
            if "*" not in rule.ours:
                yield rule, Context(shape=shape)
        for layer in range(shape.num_layers):
            for rule in rules:
                if "*" in rule.ours:
                    for expert in range(shape.num_experts) if rule.is_expert else (None,):
                        yield rule, Context(shape=shape, layer=layer, expert=expert)

    def rule_for(self, name: str) -> tuple[Transform, int | None, int | None]:
        """The row that makes our parameter `name`, its layer number and its expert number.

        Raises:
            CheckpointError: no row makes it.
        """
        layer, expert = LAYER_PATTERN.search(name), EXPERT_PATTERN.search(name)
        pattern = LAYER_PATTERN.sub(".layers.*.", name, count=1)
        pattern = EXPERT_PATTERN.sub(".local_experts.#.", pattern, count=1)
        for rule in self.rules:
            if rule.ours == pattern:
                return rule, int(layer.group(1)) if layer else None, int(expert.group(1)) if expert else None
        raise CheckpointError(f"{name}: no row of the {self.name} weight table makes this parameter; "
                              f"add one to megatron_embed/convert/tables/{self.name.replace('-', '_')}.py")

    def is_carried(self, name: str) -> bool:
        """Whether the tensor of this full Hugging Face name passes through untouched."""
        return any(fnmatchcase(name, pattern) for pattern in self.carried)

    def full_name(self, stored: str, *, prefixed: bool) -> str:
        """Name of the tables for a tensor as its file calls it; `prefixed`: the file uses the prefix."""
        for old, new in self.old_endings:
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        return stored if prefixed or self.is_carried(stored) else self.prefix + stored

    def checkpoint_place(self, name: str) -> tuple[str, int | None]:
        """Key of our parameter in a torch_dist checkpoint, and its index along that tensor's first axis.

        The experts of a layer are one tensor with an axis of experts in front, so that they reshard over ranks; the
        index is null for everything else, which is stored whole.
        """
        for norm, stored in self.fused_norms:
            name = name.replace(norm, stored)
        expert = EXPERT_PATTERN.search(name)
        key = "model." + EXPERT_PATTERN.sub(".experts.", name, count=1)
        return key, int(expert.group(1)) if expert else None


def _is_missing_bias(ours: str, shape: ModelShape) -> bool:
    """Whether this parameter is the bias of a linear layer that has none in this model."""
    if not ours.endswith((".linear_qkv.bias", ".linear_proj.bias", ".linear_fc1.bias", ".linear_fc2.bias")):
        return False
    return not (shape.add_qkv_bias if ".linear_qkv." in ours else shape.add_bias_linear)
