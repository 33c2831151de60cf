"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): frequencies and angles."""

import math
from collections.abc import Sequence

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
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return 1.0 / (torch.tensor(scaling.short_factors, dtype=torch.float32) * base**steps)
    return _llama3(frequencies, scaling) if scaling.kind == "llama3" else _yarn(base**steps, base, scaling)


def rotary_factors(shape: ModelShape) -> tuple[float, ...]:
    """Factors of cosines and sines, one for each row of `rotary_frequencies`."""
    rows = [shape.rope_scaling] if shape.local_rotary_base is None else [shape.rope_scaling, shape.local_rope_scaling]
    return tuple(1.0 if scaling is None else scaling.attention_factor for scaling in rows)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, a blend in between (Llama 3.1, arXiv:2407.21783)."""
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    slow, fast = wavelengths > original / scaling.low_freq_factor, wavelengths < original / scaling.high_freq_factor
    kept = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blend))


def _yarn(periods: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Frequencies of few rotations over the original length divided by the factor, those of many kept, a blend in
    between (Peng et al. 2023, arXiv:2309.00071).

    Args:
        periods: [rotary_dim / 2] float32, the inverse frequencies.
    """
    dim, original = 2 * len(periods), scaling.original_max_position_embeddings

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def rotary_cos_sin(frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype,
                   factors: Sequence[float] = ()) -> Tensor:
    """[rows, 2, tokens, rotary_dim / 2] of `dtype`: cosines and sines of the angles, computed in float32.

    Args:
        frequencies: [rows, rotary_dim / 2], see `rotary_frequencies`.
        position_ids: [1, tokens], on the same device.
        factors: see `rotary_factors`; empty: 1.
    """
    angles = position_ids.flatten().float()[:, None] * frequencies[:, None]
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)
    for row, factor in zip(cos_sin, factors, strict=bool(factors)):
        if factor != 1.0:
            row.mul_(factor)
    return cos_sin.to(dtype)
