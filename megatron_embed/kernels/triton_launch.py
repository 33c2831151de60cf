"""The launcher of every operator's Triton kernel. Importing it needs Triton."""

from collections.abc import Callable
from typing import Any

from megatron_embed.kernels import triton_activation, triton_norm, triton_rotary

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "rms_norm": triton_norm.rms_norm, "add_rms_norm": triton_norm.add_rms_norm,
    "rms_norm_backward": triton_norm.rms_norm_backward,
    "qkv_rotary": triton_rotary.qkv_rotary, "qkv_rotary_backward": triton_rotary.qkv_rotary_backward,
    "glu": triton_activation.glu, "glu_backward": triton_activation.glu_backward,
    "weighted_glu": triton_activation.weighted_glu, "weighted_glu_backward": triton_activation.weighted_glu_backward,
    "bias_activation": triton_activation.bias_activation,
    "bias_activation_backward": triton_activation.bias_activation_backward}
