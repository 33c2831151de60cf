"""A family's weight table, and the questions asked of it: which row makes this parameter, is this tensor carried."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_embed.convert.transforms import Transform
from megatron_embed.errors import CheckpointError

LAYER_PATTERN = re.compile(r"\.layers\.(\d+)\.")
"""The layer number in one of our names."""


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

    def rows(self, num_layers: int) -> Iterator[tuple[Transform, int | None]]:
        """Every row with every layer number it applies to: outside the layers first, then layer by layer."""
        for rule in self.rules:
            if "*" not in rule.ours:
                yield rule, None
        for layer in range(num_layers):
            for rule in self.rules:
                if "*" in rule.ours:
                    yield rule, layer

    def rule_for(self, name: str) -> tuple[Transform, int | None]:
        """The row that makes our parameter `name`, and its layer number.

        Raises:
            CheckpointError: no row makes it.
        """
        match = LAYER_PATTERN.search(name)
        pattern = LAYER_PATTERN.sub(".layers.*.", name, count=1)
        for rule in self.rules:
            if rule.ours == pattern:
                return rule, int(match.group(1)) if match else None
        raise CheckpointError(f"{name}: no row of the {self.name} weight table makes this parameter; "
                              f"add one to megatron_embed/convert/rules/{self.name}.py")

    def is_carried(self, name: str) -> bool:
        """Whether the tensor of this full Hugging Face name passes through untouched."""
        return any(fnmatchcase(name, pattern) for pattern in self.carried)

    def full_name(self, stored: str, *, prefixed: bool) -> str:
        """Name of the tables for a tensor as its file calls it; `prefixed`: the file uses the prefix."""
        for old, new in self.old_endings:
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        return stored if prefixed or self.is_carried(stored) else self.prefix + stored


def checkpoint_key(name: str) -> str:
    """Key of our parameter in a torch_dist checkpoint.

    Norms in front of a linear are stored as that linear's own, the way Transformer Engine's fused modules name them
    (Megatron-Core's `sharded_state_dict` renames them so), so that CPU and GPU layers read each other's checkpoints.
    """
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return "model." + name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
