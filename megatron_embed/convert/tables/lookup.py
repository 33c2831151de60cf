"""The known weight tables, by `model_type`."""

from megatron_embed.convert.tables.bert import BERT
from megatron_embed.convert.tables.deberta_v2 import DEBERTA_V2
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.gemma import GEMMA2, GEMMA3_TEXT
from megatron_embed.convert.tables.glm import GLM, GLM4
from megatron_embed.convert.tables.internlm import INTERNLM2, INTERNLM3
from megatron_embed.convert.tables.llama import LLAMA
from megatron_embed.convert.tables.mistral import MISTRAL
from megatron_embed.convert.tables.mixtral import MIXTRAL
from megatron_embed.convert.tables.modernbert import MODERNBERT
from megatron_embed.convert.tables.nomic_bert import NOMIC_BERT
from megatron_embed.convert.tables.phi3 import PHI3
from megatron_embed.convert.tables.qwen2 import QWEN2
from megatron_embed.convert.tables.qwen3 import QWEN3
from megatron_embed.convert.tables.qwen3_moe import QWEN3_MOE
from megatron_embed.convert.tables.t5 import T5, T5_GATED
from megatron_embed.convert.tables.xlm_roberta import ROBERTA, XLM_ROBERTA
from megatron_embed.errors import CheckpointError

FAMILIES: dict[str, Family] = {family.name: family for family in (
    BERT, ROBERTA, XLM_ROBERTA, MODERNBERT, QWEN2, QWEN3, QWEN3_MOE, LLAMA, MISTRAL, MIXTRAL, T5, T5_GATED, GEMMA2,
    GEMMA3_TEXT, PHI3, GLM, GLM4, NOMIC_BERT, INTERNLM2, INTERNLM3, DEBERTA_V2)}


def rules_for(family: str) -> Family:
    """Weight table of a family.

    Raises:
        CheckpointError: there is none.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"model_type = {family!r} has no weight table; known: {', '.join(FAMILIES)}")
    return FAMILIES[family]
