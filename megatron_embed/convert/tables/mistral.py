"""Weights of Mistral decoders, e5-mistral among them: Llama's names."""

from dataclasses import replace

from megatron_embed.convert.tables.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral")
