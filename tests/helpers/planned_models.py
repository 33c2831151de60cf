"""Configurations of toy models that are planned, and the same models built to be measured."""

from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.shapes import shape_of

BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 103, "hidden_act": "gelu"}
QWEN3 = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 64,
         "vocab_size": 103, "hidden_act": "silu"}
MOE = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
               "norm_topk_prob": True}
MODERNBERT = {"model_type": "modernbert", "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
              "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 103, "norm_bias": True,
              "pad_token_id": 0}
GEMMA3 = QWEN3 | {"model_type": "gemma3_text", "num_hidden_layers": 5}

T5 = {"model_type": "t5", "vocab_size": 103, "d_model": 32, "d_kv": 12, "num_heads": 4, "num_layers": 4, "d_ff": 48,
      "relative_attention_num_buckets": 12, "feed_forward_proj": "gated-gelu"}


def build(config, topology):
    """This rank's chunks, with adapters if `lora` asks for them."""
    from megatron_embed.models.encoder import build_model
    from megatron_embed.models.lora_settings import Adapters

    shape = shape_of(config.model.path)
    parts = adapted_linears(config, shape)
    adapters = None if parts is None else Adapters(rank=config.lora.rank, scale=1.0, dropout=0.0, seed=1, parts=parts)
    return build_model(config, shape, topology, "mean", adapters=adapters)
