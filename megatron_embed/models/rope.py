"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): frequencies and angles."""

import math

import torch
from torch import Tensor

from megatron_embed.models.families import ModelShape, RopeScaling


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """[1, rotary_dim / 2] float32 on the CPU, radians per position, by the arithmetic of Transformers; 2 rows if the
    layers with an attention window, whose frequencies are the second row, have a base of their own.

    Megatron's own module has Llama's scaling for one set of wavelengths only, and no linear scaling.
    """
    assert shape.rotary_base is not None, "the model has learned positions"
    dim = shape.rotary_dim or shape.head_dim
    rows = [_frequencies(dim, shape.rotary_base, shape.rope_scaling)]
    if shape.local_rotary_base is not None:
        rows.append(_frequencies(dim, shape.local_rotary_base, shape.local_rope_scaling))
    return torch.stack(rows)


def _frequencies(rotary_dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    frequencies = 1.0 / base**steps
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, a blend in between (Llama 3.1, arXiv:2407.21783)."""
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    slow, fast = wavelengths > original / scaling.low_freq_factor, wavelengths < original / scaling.high_freq_factor
    kept = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blend))


def rotary_cos_sin(frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, 2, tokens, rotary_dim / 2] of `dtype`: cosines and sines of the angles, computed in float32.

    Args:
        frequencies: [rows, rotary_dim / 2], see `rotary_frequencies`.
        position_ids: [1, tokens], on the same device.
    """
    angles = position_ids.flatten().float()[:, None] * frequencies[:, None]
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(dtype)
