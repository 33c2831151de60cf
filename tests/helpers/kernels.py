"""Arguments for the operators of `megatron_embed.kernels`."""

import torch

from megatron_embed.kernels import reference

HEADS, GROUPS, HEAD_DIM, TOKENS, WIDTH = 6, 2, 20, 11, 72
"""No power of two."""


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kernel_cases(dtype):
    """(operator, arguments)."""
    def make(*shape, seed):
        return random(*shape, dtype=dtype, seed=seed)

    x, other, weight = make(TOKENS, 1, WIDTH, seed=1), make(TOKENS, 1, WIDTH, seed=2), make(WIDTH, seed=3)
    yield "rms_norm", (x, weight, 1e-6)
    yield "add_rms_norm", (x, other, weight, 1e-6)
    rstd = reference.rms_norm(x, weight, 1e-6)[1]
    for residual in (None, make(TOKENS, 1, WIDTH, seed=4)):
        for needs_weight in (True, False):
            yield "rms_norm_backward", (other, x, weight, rstd, residual, needs_weight)
    mixed = make(TOKENS, GROUPS, HEADS // GROUPS + 2, HEAD_DIM, seed=5)
    cos_sin = make(2, TOKENS, HEAD_DIM // 2, seed=6)
    gradients = (make(TOKENS, HEADS, HEAD_DIM, seed=7), make(TOKENS, GROUPS, HEAD_DIM, seed=8),
                 make(TOKENS, GROUPS, HEAD_DIM, seed=9))
    for weights in ((None, None), (make(HEAD_DIM, seed=10), make(HEAD_DIM, seed=11))):
        yield "qkv_rotary", (mixed, cos_sin, *weights, HEADS, 1e-6)
        rstd = reference.qkv_rotary(mixed, cos_sin, *weights, HEADS, 1e-6)[2]
        yield "qkv_rotary_backward", (*gradients, cos_sin, None if weights[0] is None else mixed, *weights, rstd)
    for activation in reference.ACTIVATIONS:
        wide, narrow = make(7, 1, 2 * 1100, seed=12), make(7, 1, 1100, seed=13)
        yield "glu", (wide, activation)
        yield "glu_backward", (narrow, wide, activation)
        weights = random(7, dtype=torch.float32, seed=16)
        yield "weighted_glu", (wide[:, 0], weights, activation)
        yield "weighted_glu_backward", (narrow[:, 0], wide[:, 0], weights, activation)
        yield "bias_activation", (narrow, make(1100, seed=14), activation)
        yield "bias_activation_backward", (make(7, 1, 1100, seed=15), narrow, make(1100, seed=14), activation)
