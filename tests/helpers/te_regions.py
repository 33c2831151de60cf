"""Computations that are one kernel, or few, in Transformer Engine: what counts launches counts each as so many."""

import contextlib

import torch

listener = None
"""Called with (name, launches, tensors read and written) of each region; None: nobody counts."""
depth = 0
"""Above 0 within a region, whose operators are not launches of their own."""


@contextlib.contextmanager
def region(name, launches):
    """Yields a list, to which the tensors are added that the kernels read and write."""
    global depth
    tensors = []
    depth += 1
    try:
        yield tensors
    finally:
        depth -= 1
    if listener is not None:
        listener(name, launches, tensors)


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, launches, function, *inputs):
        ctx.name, ctx.launches = name, launches
        with region(name, launches[0]) as tensors, torch.enable_grad():
            ctx.inputs = [value.detach().requires_grad_(value.requires_grad) for value in inputs]
            ctx.output = function(*ctx.inputs)
            tensors += [*inputs, ctx.output]
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, gradient):
        wanted = [value for value in ctx.inputs if value.requires_grad]
        with region(f"{ctx.name} backward", ctx.launches[1]) as tensors:
            gradients = torch.autograd.grad(ctx.output, wanted, gradient)
            tensors += [*ctx.inputs, gradient, *gradients]
        remaining = iter(gradients)
        results = [next(remaining) if value.requires_grad else None for value in ctx.inputs]
        return None, None, None, *results


def kernels(name, launches, function, *inputs):
    """`function` of tensors; `launches`: kernels forward and backward."""
    return _Kernels.apply(name, launches, function, *inputs)
