"""Attention over packed sequences by Transformer Engine, which chooses cuDNN's or flash attention's kernels.

Not run on a GPU yet. Its arguments are tested on the CPU against a stand-in with Transformer Engine's signature and
checks (tests/helpers/te_stand_in.py). It has no weights, so a checkpoint can be used with every attention kernel.
"""

import math
from typing import Any

import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.models.attention import PackedSequences
from megatron_embed.platform.compat import AttnMaskType, MegatronModule, ProcessGroupCollection, TransformerConfig


class TransformerEngineAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention over `PackedSequences`: Transformer Engine's DotProductAttention.

    A bin is passed in its "thd" format: tokens back to back, `cu_seqlens` as bounds, and padding masks, the only ones
    allowed there. Padding tokens at the end of the bin are left out and get output 0. No communication.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        window: tuple[int, int] | None = None,
    ) -> None:
        from transformer_engine.pytorch import DotProductAttention

        super().__init__(config=config)
        assert config.context_parallel_size == 1 and not config.attention_dropout, "attention_kernel refuses both"
        self.window = window
        causal = attn_mask_type == AttnMaskType.causal
        self.kernel = DotProductAttention(
            num_attention_heads=config.num_attention_heads, kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups, attention_dropout=0.0, qkv_format="thd",
            attn_mask_type="padding_causal" if causal else "padding", window_size=window,
            sequence_parallel=config.sequence_parallel, tp_size=config.tensor_model_parallel_size,
            tp_group=None if pg_collection is None else pg_collection.tp, layer_number=layer_number,
            attention_type=attention_type,
            softmax_scale=softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """[tokens, 1, heads/tp, head_dim] queries and [tokens, 1, groups/tp, head_dim] keys and values ->
        [tokens, 1, heads/tp * head_dim]."""
        packed = packed_seq_params
        assert packed is not None and packed.cu_seqlens is not None
        packed.of_window(self.window)
        real, longest = packed.num_tokens, packed.max_seqlen
        output = self.kernel(
            *(tensor.squeeze(1)[:real] for tensor in (query, key, value)), qkv_format="thd",
            cu_seqlens_q=packed.cu_seqlens, cu_seqlens_kv=packed.cu_seqlens, max_seqlen_q=longest,
            max_seqlen_kv=longest, pad_between_seqs=False)
        return functional.pad(output.flatten(1), (0, 0, 0, query.shape[0] - real))[:, None]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: the kernel would only save its FP8 state, which is not used."""
        return {}
