"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): frequencies and angles."""

import math

import torch
from torch import Tensor

from megatron_embed.models.families import ModelShape, RopeScaling


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """[head_dim / 2] float32 on the CPU, radians per position, by the arithmetic of Transformers.

    Megatron's own module has Llama's scaling for one set of wavelengths only, and no linear scaling.
    """
    assert shape.rotary_base is not None, "the model has learned positions"
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device="cpu") / shape.head_dim
    frequencies = 1.0 / shape.rotary_base**steps
    if shape.rope_scaling is None:
        return frequencies
    if shape.rope_scaling.kind == "linear":
        return frequencies / shape.rope_scaling.factor
    return _llama3(frequencies, shape.rope_scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, a blend in between (Llama 3.1, arXiv:2407.21783)."""
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    slow, fast = wavelengths > original / scaling.low_freq_factor, wavelengths < original / scaling.high_freq_factor
    kept = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blend))


def rotary_cos_sin(frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, tokens, head_dim / 2] of `dtype`: cosines and sines of the angles, computed in float32, of [1, tokens]
    positions on the same device."""
    angles = torch.outer(position_ids.flatten().float(), frequencies)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)
