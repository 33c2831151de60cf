"""Weights of Mixtral decoders, as released and as Transformers 5 writes them."""

from dataclasses import replace

from megatron_embed.convert.tables.llama import LLAMA
from megatron_embed.convert.tables.transforms import FuseGateUp, Rename

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    rules=(
        *(rule for rule in LLAMA.rules if ".mlp." not in rule.ours),
        Rename("decoder.layers.*.mlp.router.weight", "model.layers.*.block_sparse_moe.gate.weight",
               "num_experts hidden_size"),
        # w1 is the gate, w3 the way up, w2 the way down.
        FuseGateUp("decoder.layers.*.mlp.experts.local_experts.#.linear_fc1.weight",
                   "model.layers.*.block_sparse_moe.experts.#.{w1,w3}.weight", "ffn_hidden_size hidden_size"),
        Rename("decoder.layers.*.mlp.experts.local_experts.#.linear_fc2.weight",
               "model.layers.*.block_sparse_moe.experts.#.w2.weight", "hidden_size ffn_hidden_size", shard_dim=1),
    ),
    # The norm before the experts stays apart: no linear follows it directly.
    fused_norms=LLAMA.fused_norms[:1],
)
