"""Stands in for Transformer Engine where there is none: its call's layout and checks, computed by torch's attention.

The signature and the checks of DotProductAttention are those of version 2.3, the oldest that setup.py asks for; later
ones add arguments at the end. FusedAdam's are of the same version. Only that tensors be on a GPU is not asked for.
"""

import contextlib
import sys
import types

import torch
import torch.nn.functional as functional

MASKS = ("no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right",
         "arbitrary")


def checked_window(mask_type, window):
    """Transformer Engine only warns of a window that does not go with the mask, and takes another: refused here."""
    if window is None:
        return (-1, 0) if "causal" in mask_type else (-1, -1)
    none, right = ((-1, 0), window[1] == 0) if "causal" in mask_type else ((-1, -1), window[1] >= 0)
    assert window == none or (window[0] >= 0 and right), window
    return window


class DotProductAttention(torch.nn.Module):
    """[tokens, heads/tp, head_dim] and sequence bounds -> [tokens, heads/tp * head_dim]."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
                 attn_mask_type="causal", window_size=None, sequence_parallel=False, tp_size=1,
                 get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
                 cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None):
        super().__init__()
        assert attn_mask_type in MASKS and attention_type in ("self", "cross")
        self.attn_mask_type, self.window_size = attn_mask_type, checked_window(attn_mask_type, window_size)
        self.qkv_format, self.dropout, self.kv_channels = qkv_format, attention_dropout, kv_channels
        self.softmax_scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        assert num_attention_heads % groups == 0
        self.num_gqa_groups_per_partition = groups // self.tp_size
        assert cp_group is None and attention_dropout == 0, "nothing here computes it"

    def get_extra_state(self):
        """The real one saves its state for FP8, which is empty, under `_extra_state`."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None,
                cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None,
                max_seqlen_kv=None, attn_mask_type=None, window_size=None, checkpoint_core_attention=False,
                core_attention_bias_type="no_bias", core_attention_bias=None, alibi_slopes=None, fast_zero_fill=True,
                inference_params=None, pad_between_seqs=None):
        layers = (query_layer, key_layer, value_layer)
        mask_type = attn_mask_type or self.attn_mask_type
        window = checked_window(mask_type, self.window_size if window_size is None else window_size)
        assert (qkv_format or self.qkv_format) == "thd", "nothing here computes another"
        assert all(layer.dim() == 3 for layer in layers), "Queries, keys and values must be 3D tensors"
        assert query_layer.dtype == key_layer.dtype == value_layer.dtype
        assert key_layer.shape == value_layer.shape and query_layer.shape[-1] == key_layer.shape[-1]
        assert key_layer.shape[-1] == self.kv_channels
        assert key_layer.shape[-2] == self.num_gqa_groups_per_partition
        assert "padding" in mask_type, "Attention mask type must be padding or padding_causal for qkv_format=thd!"
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert cu_seqlens_q.dim() == 1 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        lengths = cu_seqlens_q.diff()
        # Kernels run over as many tokens as they are told.
        assert max_seqlen_q >= int(lengths.max()) and max_seqlen_kv >= int(lengths.max())
        assert int(cu_seqlens_q[-1]) == query_layer.shape[0], "the real one leaves tokens beyond as they come"
        assert attention_mask is None and not pad_between_seqs
        outputs = [self._attend(*(layer[start:end] for layer in layers), window, "causal" in mask_type)
                   for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)]
        return torch.cat(outputs).flatten(1)

    def _attend(self, query, key, value, window, causal):
        """One sequence."""
        ahead = torch.arange(len(key)) - torch.arange(len(query))[:, None]
        mask = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
        mask = mask & (ahead >= -window[0]) if window[0] >= 0 else mask
        mask = mask & (ahead <= window[1]) if window[1] >= 0 else mask
        repeats = query.shape[1] // key.shape[1]
        query, key, value = (layer.transpose(0, 1) for layer in (
            query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)))
        return functional.scaled_dot_product_attention(query, key, value, mask,
                                                       scale=self.softmax_scale).transpose(0, 1)


@contextlib.contextmanager
def installed():
    """Within it `import transformer_engine.pytorch` finds these classes."""
    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    package.pytorch, pytorch.DotProductAttention = pytorch, DotProductAttention
    assert not any(name.startswith("transformer_engine") for name in sys.modules), "the real one is there"
    sys.modules |= {"transformer_engine": package, "transformer_engine.pytorch": pytorch}
    try:
        yield
    finally:
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            del sys.modules[name]
