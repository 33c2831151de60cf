"""A trained linear layer between the model's vectors and a teacher's, with an optimizer of its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.config.schema import RunConfig
from megatron_embed.parallel.collectives import send_from_last, sum_over


class LearnedProjection:
    """y = x W^T + b, trained by Adam (Kingma and Ba 2014, arXiv:1412.6980) without weight decay at the model's learning
    rate. It belongs to the run, not to the model: no export holds it.

    Every rank of the world has it. The ranks of a replica's last stage compute the same gradient, whose sum over the
    data-parallel ranks all stages get, so that all copies stay equal; no factor of training/scaling.py applies.

    Attributes:
        names: of its metrics: none.
        parameters: [teacher's dim, dim + 1] float32, W and b beside it.
    """

    names: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, dim: int, teacher_dim: int, *, dp_group: dist.ProcessGroup,
                 pp_group: dist.ProcessGroup, device: torch.device) -> None:
        training = config.training
        generator = torch.Generator().manual_seed(training.seed)
        drawn = torch.rand(teacher_dim, dim + 1, generator=generator) * 2 - 1  # as torch draws a linear layer
        self.parameters = (drawn / math.sqrt(dim)).to(device)
        self._means, self._squares = torch.zeros_like(self.parameters), torch.zeros_like(self.parameters)
        self._gradient, self._steps = torch.zeros_like(self.parameters), 0
        self._complete, self._is_finite = self._gradient, False
        self._betas, self._eps = (training.adam_beta1, training.adam_beta2), training.adam_eps
        self._groups = dp_group, pp_group

    def __call__(self, vectors: Tensor, parameters: Tensor) -> Tensor:
        """[rows, teacher's dim] of [rows, dim], by `parameters` as a leaf of a graph."""
        return torch.nn.functional.linear(vectors, parameters[:, :-1], parameters[:, -1])

    def forget_gradient(self) -> None:
        """Begin a step."""
        self._gradient.zero_()

    def add_gradient(self, gradient: Tensor) -> None:
        """Add what a micro-batch of this rank gives."""
        self._gradient += gradient

    def complete_gradient(self) -> tuple[Tensor, ...]:
        """Numbers of the gradient over all ranks, on the device, which `receive` gets once they are read with the
        step's metrics. Called by all ranks: an all-reduce over the data-parallel group and a broadcast over the
        pipeline."""
        dp_group, pp_group = self._groups
        self._complete = send_from_last(sum_over(self._gradient, dp_group), pp_group)
        return (torch.isfinite(self._complete).all(),)

    def receive(self, numbers: Sequence[Tensor]) -> None:
        """What `complete_gradient` returned, on the CPU."""
        (is_finite,) = numbers
        self._is_finite = bool(is_finite)

    def step(self, metrics: Mapping[str, float], learning_rate: float) -> None:
        """One update by the gradient that `complete_gradient` left, unless it is not finite.

        Args:
            metrics: of the step, which hold nothing of it.
            learning_rate: of the model at this step.
        """
        if not self._is_finite:
            return
        gradient = self._complete
        self._steps += 1
        beta1, beta2 = self._betas
        self._means.lerp_(gradient, 1 - beta1)
        self._squares.lerp_(gradient.square(), 1 - beta2)
        root = (self._squares / (1 - beta2**self._steps)).sqrt_().add_(self._eps)
        self.parameters.addcdiv_(self._means, root, value=-learning_rate / (1 - beta1**self._steps))

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank."""
        tensors = {"parameters": self.parameters, "means": self._means, "squares": self._squares}
        return {"steps": self._steps, **{name: tensor.cpu().clone() for name, tensor in tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the return value of `state_dict`."""
        self._steps = int(state["steps"])
        for name, tensor in (("parameters", self.parameters), ("means", self._means), ("squares", self._squares)):
            tensor.copy_(state[name])
