"""Weights of GLM-4 (glm) and GLM-4-0414 (glm4) decoders: Llama's names, with one tensor for gate and up."""

from dataclasses import replace

from megatron_embed.convert.tables.llama import LLAMA
from megatron_embed.convert.tables.transforms import Rename, UnstackGateUp

GLM = replace(LLAMA, name="glm", rules=(
    *(rule for rule in LLAMA.rules if ".linear_fc1." not in rule.ours),
    UnstackGateUp("decoder.layers.*.mlp.linear_fc1.weight", "model.layers.*.mlp.gate_up_proj.weight",
                  "ffn_hidden_size hidden_size")))

GLM4 = replace(GLM, name="glm4", rules=(
    *GLM.rules,
    Rename("decoder.layers.*.post_attention_layernorm.weight", "model.layers.*.post_self_attn_layernorm.weight",
           "hidden_size"),
    Rename("decoder.layers.*.post_mlp_layernorm.weight", "model.layers.*.post_mlp_layernorm.weight", "hidden_size")))
