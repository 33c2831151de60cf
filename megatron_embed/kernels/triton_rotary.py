"""Triton kernels of what lies between the projection and attention: query and key norms and rotary positions.

Never run on a GPU; `tests/kernels/test_triton.py` runs them in Triton's interpreter against reference.py.
"""

# Triton's functions take pointers, and compile-time constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_embed.kernels.operators import PARTS

# A tile holds all heads of a token: first its queries, then its keys, and each head's two halves apart, whose elements
# are rotated in pairs. In the projection's result a query group is its queries, its key and its value.


@triton.jit
def _weight(q_weight_ptr, k_weight_ptr, column, inside, is_query):
    """[slots, columns] float32: the query norm's weight for queries, the key norm's for keys."""
    of_query = tl.load(q_weight_ptr + column, mask=inside, other=0.0)
    of_key = tl.load(k_weight_ptr + column, mask=inside, other=0.0)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :]).to(tl.float32)


@triton.jit
def _either(first, of_first, second, of_second):
    """In float32 what lies at one or the other of two tiles of pointers, whose masks exclude each other."""
    return (tl.load(first, mask=of_first, other=0.0).to(tl.float32)
            + tl.load(second, mask=of_second, other=0.0).to(tl.float32))


@triton.jit
def _copy(source, target, mask, half):
    """Both halves of a tile."""
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)
    tl.store(target + half, tl.load(source + half, mask=mask, other=0.0), mask=mask)


@triton.jit
def _forward(mixed_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, query_ptr, key_ptr, rstd_ptr, heads, groups, half,
             eps, HAS_NORM: tl.constexpr, SLOTS: tl.constexpr, HALF: tl.constexpr):
    """One token: normalized and rotated queries and keys, rounded to their dtype after every step."""
    token = tl.program_id(0).to(tl.int64)
    slot, column = tl.arange(0, SLOTS), tl.arange(0, HALF)
    is_query, per_group, in_half = slot < heads, heads // groups, column < half
    row = token * (heads + 2 * groups) + tl.where(is_query, (slot // per_group) * (per_group + 2) + slot % per_group,
                                                  (slot - heads) * (per_group + 2) + per_group)
    held = (slot < heads + groups)[:, None] & in_half[None, :]
    source = mixed_ptr + row[:, None] * (2 * half) + column[None, :]
    first, second = tl.load(source, mask=held, other=0.0), tl.load(source + half, mask=held, other=0.0)
    dtype = first.dtype
    x1, x2 = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * half) + eps)
        tl.store(rstd_ptr + token * (heads + groups) + slot, rstd, mask=slot < heads + groups)
        w1 = _weight(q_weight_ptr, k_weight_ptr, column, in_half, is_query)
        w2 = _weight(q_weight_ptr, k_weight_ptr, half + column, in_half, is_query)
        x1 = (w1 * (x1 * rstd[:, None]).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        x2 = (w2 * (x2 * rstd[:, None]).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + token * half + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * half + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    y1 = ((x1 * cos).to(dtype).to(tl.float32) - (x2 * sin).to(dtype).to(tl.float32)).to(dtype)
    y2 = ((x2 * cos).to(dtype).to(tl.float32) + (x1 * sin).to(dtype).to(tl.float32)).to(dtype)
    into_query = query_ptr + (token * heads + slot)[:, None] * (2 * half) + column[None, :]
    into_key = key_ptr + (token * groups + slot - heads)[:, None] * (2 * half) + column[None, :]
    of_query, of_key = held & is_query[:, None], held & (slot >= heads)[:, None]
    tl.store(into_query, y1, mask=of_query)
    tl.store(into_query + half, y2, mask=of_query)
    tl.store(into_key, y1, mask=of_key)
    tl.store(into_key + half, y2, mask=of_key)


@triton.jit
def _backward(q_gradient_ptr, k_gradient_ptr, v_gradient_ptr, mixed_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
              rstd_ptr, gradient_ptr, parts_ptr, tokens, heads, groups, half, steps, HAS_NORM: tl.constexpr,
              SLOTS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """Every PARTS-th token: the gradient of the projection's result; and the sum of the norms' weights' gradients."""
    program, value = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    slot, column = tl.arange(0, SLOTS), tl.arange(0, HALF)
    is_query, is_key, per_group = slot < heads, (slot >= heads) & (slot < heads + groups), heads // groups
    in_half, width = column < half, 2 * half
    place = tl.where(is_query, (slot // per_group) * (per_group + 2) + slot % per_group,
                     (slot - heads) * (per_group + 2) + per_group)
    part_q1, part_q2 = tl.zeros([HALF], dtype=tl.float32), tl.zeros([HALF], dtype=tl.float32)
    part_k1, part_k2 = tl.zeros([HALF], dtype=tl.float32), tl.zeros([HALF], dtype=tl.float32)
    for step in range(steps):
        token = program + step * tl.num_programs(0)
        in_token = column < tl.where(token < tokens, half, 0)
        of_query, of_key = is_query[:, None] & in_token[None, :], is_key[:, None] & in_token[None, :]
        from_query = q_gradient_ptr + (token * heads + slot)[:, None] * width + column[None, :]
        from_key = k_gradient_ptr + (token * groups + slot - heads)[:, None] * width + column[None, :]
        y1 = _either(from_query, of_query, from_key, of_key)
        y2 = _either(from_query + half, of_query, from_key + half, of_key)
        cos = tl.load(cos_ptr + token * half + column, mask=in_token, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + token * half + column, mask=in_token, other=0.0).to(tl.float32)[None, :]
        x1, x2 = y1 * cos + y2 * sin, y2 * cos - y1 * sin
        offsets = (token * (heads + 2 * groups) + place)[:, None] * width + column[None, :]
        if HAS_NORM:
            first = tl.load(mixed_ptr + offsets, mask=of_query | of_key, other=0.0)
            second = tl.load(mixed_ptr + offsets + half, mask=of_query | of_key, other=0.0)
            rstd = tl.load(rstd_ptr + token * (heads + groups) + slot,
                           mask=slot < tl.where(token < tokens, heads + groups, 0), other=0.0)[:, None]
            n1, n2 = first.to(tl.float32) * rstd, second.to(tl.float32) * rstd
            part_q1 += tl.sum(tl.where(is_query[:, None], x1 * n1, 0.0), axis=0)
            part_q2 += tl.sum(tl.where(is_query[:, None], x2 * n2, 0.0), axis=0)
            part_k1 += tl.sum(tl.where(is_key[:, None], x1 * n1, 0.0), axis=0)
            part_k2 += tl.sum(tl.where(is_key[:, None], x2 * n2, 0.0), axis=0)
            x1 *= _weight(q_weight_ptr, k_weight_ptr, column, in_half, is_query)
            x2 *= _weight(q_weight_ptr, k_weight_ptr, half + column, in_half, is_query)
            mean = (tl.sum(x1 * n1 + x2 * n2, axis=1) / width)[:, None]
            x1, x2 = rstd * (x1 - n1 * mean), rstd * (x2 - n2 * mean)
        tl.store(gradient_ptr + offsets, x1.to(gradient_ptr.dtype.element_ty), mask=of_query | of_key)
        tl.store(gradient_ptr + offsets + half, x2.to(gradient_ptr.dtype.element_ty), mask=of_query | of_key)
        into_value = token * (heads + 2 * groups) + value * (per_group + 2) + per_group + 1
        _copy(v_gradient_ptr + (token * groups + value)[:, None] * width + column[None, :],
              gradient_ptr + into_value[:, None] * width + column[None, :],
              (value < groups)[:, None] & in_token[None, :], half)
    if HAS_NORM:
        part = parts_ptr + program * 2 * width + column
        tl.store(part, part_q1, mask=in_half)
        tl.store(part + half, part_q2, mask=in_half)
        tl.store(part + width, part_k1, mask=in_half)
        tl.store(part + width + half, part_k2, mask=in_half)


def qkv_rotary(mixed: Tensor, cos_sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int,
               eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch of one kernel; see reference.py."""
    mixed, cos_sin = mixed.contiguous(), cos_sin.contiguous()
    tokens, groups, _, head_dim = mixed.shape
    query, key = mixed.new_empty(tokens, heads, head_dim), mixed.new_empty(tokens, groups, head_dim)
    has_norm = q_weight is not None
    rstd = mixed.new_empty(tokens if has_norm else 0, heads + groups, dtype=torch.float32)
    if tokens:
        _forward[(tokens,)](mixed, cos_sin[0], cos_sin[1], q_weight if has_norm else mixed,
                            k_weight if has_norm else mixed, query, key, rstd, heads, groups, head_dim // 2, eps,
                            HAS_NORM=has_norm, **_tile(heads, groups, head_dim))
    return query, key, rstd


def qkv_rotary_backward(q_gradient: Tensor, k_gradient: Tensor, v_gradient: Tensor, cos_sin: Tensor,
                        mixed: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
                        rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Launch of one kernel; see reference.py."""
    q_gradient, k_gradient, v_gradient = q_gradient.contiguous(), k_gradient.contiguous(), v_gradient.contiguous()
    cos_sin = cos_sin.contiguous()
    (tokens, heads, head_dim), groups = q_gradient.shape, k_gradient.shape[1]
    gradient = q_gradient.new_empty(tokens, groups, heads // groups + 2, head_dim)
    programs, has_norm = min(PARTS, tokens), mixed is not None
    parts = q_gradient.new_empty(programs if has_norm else 0, 2, head_dim, dtype=torch.float32)
    source = gradient if mixed is None else mixed.contiguous()
    if tokens:
        _backward[(programs,)](
            q_gradient, k_gradient, v_gradient, source, cos_sin[0], cos_sin[1], q_weight if has_norm else source,
            k_weight if has_norm else source, rstd, gradient, parts, tokens, heads, groups, head_dim // 2,
            triton.cdiv(tokens, programs), HAS_NORM=has_norm, GROUPS=triton.next_power_of_2(groups),
            **_tile(heads, groups, head_dim))
    return gradient, parts


def _tile(heads: int, groups: int, head_dim: int) -> dict[str, Any]:
    """A token's tile, and warps for eight or more numbers per thread of each half; with fewer warps a thread has not
    registers enough (`tests/kernels/test_triton_compiles.py`)."""
    slots, half = triton.next_power_of_2(heads + groups), triton.next_power_of_2(head_dim // 2)
    return {"SLOTS": slots, "HALF": half, "num_warps": min(16, max(1, slots * half // 256))}
