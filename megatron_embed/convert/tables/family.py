"""A family's weight table: rules, tensors that pass through a conversion, and names on both sides."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_embed.convert.tables.transforms import Context, Transform
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape

LAYER_PATTERN = re.compile(r"\.layers\.(\d+)\.")
"""The layer in one of our names."""
EXPERT_PATTERN = re.compile(r"\.local_experts\.(\d+)\.")
"""The expert, counted over the whole layer, in one of our names."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and layouts of the weights of one `model_type`, on both sides."""

    name: str
    """`model_type` of config.json."""
    prefix: str
    """Prefix of the backbone's tensors in a model with a head; a bare backbone stores the same names without it."""
    rules: tuple[Transform, ...]
    passthrough: tuple[str, ...]
    """Shell patterns of tensors that no layer of ours uses; a conversion copies them unchanged."""
    tied: tuple[tuple[str, str], ...] = ()
    """(head, embedding) pairs that share one tensor when `tie_word_embeddings` is true."""
    old_endings: tuple[tuple[str, str], ...] = ()
    """(old, new) endings of names that Transformers renames when it loads them."""
    fused_norms: tuple[tuple[str, str], ...] = ()
    """(norm, name under the linear behind it) that checkpoints store, the way Transformer Engine's fused modules name
    them (Megatron-Core's `sharded_state_dict` renames them so): CPU and GPU layers read each other's checkpoints."""

    no_adapters: str | None = None
    """Why its linear layers may have no LoRA adapters."""

    def applied_rules(self, shape: ModelShape) -> Iterator[tuple[Transform, Context]]:
        """Every rule with every layer and expert it applies to: outside the layers first, then layer by layer.

        Rules for biases and norms that this model does not have are skipped.
        """
        rules = [rule for rule in self.rules if not _is_missing(rule.ours, shape)]
        for rule in rules:
            if "*" not in rule.ours:
                yield rule, Context(shape=shape)
        for layer in range(shape.num_layers):
            for rule in rules:
                if layer == 0 and not shape.first_attention_norm and ".input_layernorm." in rule.ours:
                    continue
                if "*" in rule.ours:
                    for expert in range(shape.num_experts) if rule.is_expert else (None,):
                        yield rule, Context(shape=shape, layer=layer, expert=expert)

    def rule_for(self, name: str) -> tuple[Transform, int | None, int | None]:
        """The rule that makes our parameter `name`, with its layer and its expert.

        Raises:
            CheckpointError: no rule makes it.
        """
        layer, expert = LAYER_PATTERN.search(name), EXPERT_PATTERN.search(name)
        pattern = LAYER_PATTERN.sub(".layers.*.", name, count=1)
        pattern = EXPERT_PATTERN.sub(".local_experts.#.", pattern, count=1)
        for rule in self.rules:
            if rule.ours == pattern:
                return rule, int(layer.group(1)) if layer else None, int(expert.group(1)) if expert else None
        raise CheckpointError(f"{name}: no rule of the {self.name} weight table makes this parameter; "
                              f"add one to megatron_embed/convert/tables/{self.name.replace('-', '_')}.py")

    def is_passthrough(self, name: str) -> bool:
        """Whether a conversion copies the tensor of this full Hugging Face name unchanged."""
        return any(fnmatchcase(name, pattern) for pattern in self.passthrough)

    def full_name(self, stored: str, *, prefixed: bool) -> str:
        """Full name, as in the tables, of a tensor by its name in the file; `prefixed`: the file uses the prefix."""
        for old, new in self.old_endings:
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        return stored if prefixed or self.is_passthrough(stored) else self.prefix + stored

    def checkpoint_key(self, name: str) -> tuple[str, int | None]:
        """Key of our parameter in a torch_dist checkpoint, and its index along that tensor's first axis.

        The experts of a layer are one tensor whose first axis counts them, so that they can be resharded over ranks;
        the index is None for every other parameter, which is a whole tensor.
        """
        for norm, stored in self.fused_norms:
            name = name.replace(norm, stored)
        expert = EXPERT_PATTERN.search(name)
        key = "model." + EXPERT_PATTERN.sub(".experts.", name, count=1)
        return key, int(expert.group(1)) if expert else None


def _is_missing(ours: str, shape: ModelShape) -> bool:
    """Whether this parameter is a bias, or embeddings of token types, that this model has not."""
    if ".tokentype_embeddings." in ours:
        return not shape.type_vocab_size
    if ours.endswith(("norm.bias", "norm_bias")):
        return not shape.norm_bias
    if not ours.endswith((".linear_qkv.bias", ".linear_proj.bias", ".linear_fc1.bias", ".linear_fc2.bias")):
        return False
    return not (shape.add_qkv_bias if ".linear_qkv." in ours else shape.add_bias_linear)
