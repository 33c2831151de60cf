"""Weights of Phi-3 and Phi-4 decoders: Llama's names, with one tensor for queries, keys and values and one for gate and
up."""

from dataclasses import replace

from megatron_embed.convert.tables.llama import LLAMA
from megatron_embed.convert.tables.transforms import UnstackGateUp, UnstackQKV

PHI3 = replace(LLAMA, name="phi3", rules=(
    *(rule for rule in LLAMA.rules if ".linear_qkv." not in rule.ours and ".linear_fc1." not in rule.ours),
    UnstackQKV("decoder.layers.*.self_attention.linear_qkv.weight", "model.layers.*.self_attn.qkv_proj.weight",
               "hidden_size"),
    UnstackGateUp("decoder.layers.*.mlp.linear_fc1.weight", "model.layers.*.mlp.gate_up_proj.weight",
                  "ffn_hidden_size hidden_size")))
