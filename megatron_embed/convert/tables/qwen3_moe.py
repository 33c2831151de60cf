"""Weights of Qwen3 decoders with a mixture of experts in every layer: Qwen3-30B-A3B, Qwen3-235B-A22B."""

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.qwen3 import QWEN3
from megatron_embed.convert.tables.transforms import FuseGateUp, Rename

QWEN3_MOE = Family(
    name="qwen3_moe",
    prefix=QWEN3.prefix,
    rules=(
        *(rule for rule in QWEN3.rules if ".mlp." not in rule.ours),
        Rename("decoder.layers.*.mlp.router.weight", "model.layers.*.mlp.gate.weight", "num_experts hidden_size"),
        FuseGateUp("decoder.layers.*.mlp.experts.local_experts.#.linear_fc1.weight",
                   "model.layers.*.mlp.experts.#.{gate,up}_proj.weight", "moe_ffn_hidden_size hidden_size"),
        Rename("decoder.layers.*.mlp.experts.local_experts.#.linear_fc2.weight",
               "model.layers.*.mlp.experts.#.down_proj.weight", "hidden_size moe_ffn_hidden_size", shard_dim=1),
    ),
    passthrough=QWEN3.passthrough,
    tied=QWEN3.tied,
    # The norm before the experts stays apart: no linear follows it directly.
    fused_norms=QWEN3.fused_norms[:1],
)
