"""Known gradients of a parameter, and which parameters decay."""

import torch


def gradient_of(name, shape, step):
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
    return torch.randn(shape, generator=generator) * (step + 1)


def decays(name, parameter):
    return parameter.dim() > 1 and "norm" not in name and not name.endswith("bias")
