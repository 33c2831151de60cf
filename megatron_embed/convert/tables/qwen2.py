"""Weights of Qwen2 and Qwen2.5 decoders, gte-Qwen2 among them: Llama's names, with biases of query, key and value."""

from dataclasses import replace

from megatron_embed.convert.tables.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2")
