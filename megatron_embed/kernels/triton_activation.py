"""Triton kernels of gated linear units and of activations with a bias.

Never run on a GPU; `tests/kernels/test_triton.py` runs them in Triton's interpreter against reference.py.
"""

# Triton's functions take pointers, and compile-time constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """activation(x) in float32."""
    if ACTIVATION == "silu":
        result = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        result = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 1 + tanh(u) = 2 * sigmoid(2 u)
        result = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return result


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """activation'(x) in float32."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        result = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "relu":
        result = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        result = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        inner = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
        result = sigmoid * (1.0 + x * (1.0 - sigmoid) * inner)
    return result


@triton.jit
def _glu_forward(x_ptr, out_ptr, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    active = _activate(gate.to(tl.float32), ACTIVATION).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + column, (active * up).to(gate.dtype), mask=inside)


@triton.jit
def _glu_backward(gradient_ptr, x_ptr, grad_x_ptr, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, offsets = column < width, row * 2 * width + column
    gradient = tl.load(gradient_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    up = tl.load(x_ptr + offsets + width, mask=inside, other=0.0).to(tl.float32)
    values = gate.to(tl.float32)
    tl.store(grad_x_ptr + offsets, (gradient * up * _slope(values, ACTIVATION)).to(gate.dtype), mask=inside)
    tl.store(grad_x_ptr + offsets + width, (gradient * _activate(values, ACTIVATION)).to(gate.dtype), mask=inside)


@triton.jit
def _weighted_forward(x_ptr, weights_ptr, out_ptr, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    active = _activate(gate.to(tl.float32), ACTIVATION).to(gate.dtype).to(tl.float32)
    unit = (active * up).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + column, (unit * tl.load(weights_ptr + row)).to(gate.dtype), mask=inside)


@triton.jit
def _weighted_backward(gradient_ptr, x_ptr, weights_ptr, grad_x_ptr, grad_weights_ptr, width, steps,
                       ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One row, whose weight's gradient is a sum over it."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row)
    part = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(steps):
        column = step * BLOCK + tl.arange(0, BLOCK)
        inside, offsets = column < width, row * 2 * width + column
        gradient = tl.load(gradient_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        up = tl.load(x_ptr + offsets + width, mask=inside, other=0.0).to(tl.float32)
        values = gate.to(tl.float32)
        active = _activate(values, ACTIVATION)
        part += gradient * (active.to(gate.dtype).to(tl.float32) * up).to(gate.dtype).to(tl.float32)
        gradient *= weight
        tl.store(grad_x_ptr + offsets, (gradient * up * _slope(values, ACTIVATION)).to(gate.dtype), mask=inside)
        tl.store(grad_x_ptr + offsets + width, (gradient * active).to(gate.dtype), mask=inside)
    tl.store(grad_weights_ptr + row, tl.sum(part, axis=0))


@triton.jit
def _bias_forward(x_ptr, bias_ptr, out_ptr, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    shifted = (x.to(tl.float32) + bias).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + column, _activate(shifted, ACTIVATION).to(x.dtype), mask=inside)


@triton.jit
def _bias_backward(gradient_ptr, x_ptr, bias_ptr, grad_x_ptr, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, offsets = column < width, row * width + column
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    shifted = (x.to(tl.float32) + bias).to(x.dtype).to(tl.float32)
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + offsets, (gradient * _slope(shifted, ACTIVATION)).to(x.dtype), mask=inside)


def glu(x: Tensor, activation: str) -> Tensor:
    """Launch of one kernel; see reference.py."""
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    if out.numel():
        _glu_forward[_grid(out)](x, out, width, ACTIVATION=activation, BLOCK=BLOCK)
    return out


def glu_backward(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    """Launch of one kernel; see reference.py."""
    gradient, x = gradient.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    if x.numel():
        _glu_backward[_grid(gradient)](gradient, x, grad_x, x.shape[-1] // 2, ACTIVATION=activation, BLOCK=BLOCK)
    return grad_x


def weighted_glu(x: Tensor, weights: Tensor, activation: str) -> Tensor:
    """Launch of one kernel; see reference.py."""
    x, weights, width = x.contiguous(), weights.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    if out.numel():
        _weighted_forward[_grid(out)](x, weights, out, width, ACTIVATION=activation, BLOCK=BLOCK)
    return out


def weighted_glu_backward(gradient: Tensor, x: Tensor, weights: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Launch of one kernel; see reference.py."""
    gradient, x, weights = gradient.contiguous(), x.contiguous(), weights.contiguous()
    grad_x, grad_weights, width = torch.empty_like(x), torch.empty_like(weights), x.shape[-1] // 2
    if x.numel():
        _weighted_backward[(len(x),)](gradient, x, weights, grad_x, grad_weights, width, triton.cdiv(width, BLOCK),
                                      ACTIVATION=activation, BLOCK=BLOCK)
    return grad_x, grad_weights


def bias_activation(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Launch of one kernel; see reference.py."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _bias_forward[_grid(x)](x, bias, out, x.shape[-1], ACTIVATION=activation, BLOCK=BLOCK)
    return out


def bias_activation_backward(gradient: Tensor, x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Launch of one kernel; see reference.py."""
    gradient, x = gradient.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    if x.numel():
        _bias_backward[_grid(x)](gradient, x, bias, grad_x, x.shape[-1], ACTIVATION=activation, BLOCK=BLOCK)
    return grad_x


def _grid(rows: Tensor) -> tuple[int, int]:
    """A program for every BLOCK numbers of a row."""
    return rows.numel() // rows.shape[-1], triton.cdiv(rows.shape[-1], BLOCK)
