"""Muon on the matrices of the layers, AdamW on everything else, as one optimizer that Megatron can build.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon) orthogonalizes the momentum of a matrix.
A fused matrix is orthogonalized part by part, as the Hugging Face model has it, and one that tensor parallelism splits
is gathered first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM, EPS = 0.95, 1e-7
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
"""Steps of the Newton-Schulz iteration."""
RMS_OF_ADAMW = 0.2
"""Root mean square of an update of AdamW: updates are scaled to it, so learning rate and weight decay are AdamW's (Liu
et al. 2025, arXiv:2502.16982)."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """How a parameter is made of matrices, each of which is orthogonalized by itself."""

    parts: Sequence[Tensor]
    """Row numbers of each matrix in the parameter."""
    split_dim: int
    """Dimension of a matrix of which the ranks of `group` hold equal shares, in their order."""
    group: dist.ProcessGroup


class Muon(torch.optim.Optimizer):
    """Takes Apex's arguments; `matrices` says which parameters are Muon's. A step gathers those that are split over the
    ranks of their group, in bfloat16, one matrix after another.

    State: `momentum_buffer` of a matrix, `exp_avg` and `exp_avg_sq` of any other parameter, all float32 of its shape;
    `step` is per parameter group.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
                 adam_w_mode: bool = True, capturable: bool = False) -> None:
        assert adam_w_mode and not capturable, "neither L2 regularization nor CUDA graphs are ever asked for"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.matrices: Mapping[Tensor, Matrix] = {}

    def initialize(self) -> None:
        """Create the state that does not exist yet, zero, and count the steps from 0."""
        for group in self.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                names = ("momentum_buffer",) if parameter in self.matrices else ("exp_avg", "exp_avg_sq")
                for name in names:
                    self.state[parameter].setdefault(name, torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        self.initialize()
        for group in self.param_groups:
            group["step"] += 1
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in (parameter for parameter in updated if parameter in self.matrices):
                self._update_matrix(parameter, group)
            others = [parameter for parameter in updated if parameter not in self.matrices]
            if others:
                self._update_others(others, group)

    def _update_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        buffer, gradient = self.state[parameter]["momentum_buffer"], parameter.grad
        assert gradient is not None
        buffer.lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(buffer, MOMENTUM)  # Nesterov's
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        matrix = self.matrices[parameter]
        for rows in matrix.parts:
            whole = orthogonalized(gathered(update[rows].bfloat16(), matrix))
            scale = RMS_OF_ADAMW * math.sqrt(max(whole.shape))
            own = whole.chunk(matrix.group.size(), dim=matrix.split_dim)[matrix.group.rank()]
            parameter.index_add_(0, rows, own.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _update_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states, (beta1, beta2) = [self.state[parameter] for parameter in parameters], group["betas"]
        step = torch.full((), float(group["step"]), device=parameters[0].device)
        torch._fused_adamw_(
            parameters, [parameter.grad for parameter in parameters],  # type: ignore[arg-type]
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [step] * len(parameters), lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False)


def gathered(share: Tensor, matrix: Matrix) -> Tensor:
    """The whole of a matrix of which every rank of the group has a share; one all-gather."""
    if matrix.group.size() == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(matrix.group.size())]
    dist.all_gather(shares, share, group=matrix.group)
    return torch.cat(shares, dim=matrix.split_dim)


def orthogonalized(matrix: Tensor) -> Tensor:
    """[rows, columns] bfloat16, as the argument: nearly the closest matrix whose singular values are equal, by the
    quintic Newton-Schulz iteration in bfloat16, in the order of operations of torch.optim.Muon."""
    linear, cubic, quintic = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if is_tall else matrix
    result = result.div(result.norm().clamp(min=EPS))
    for _ in range(STEPS):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), result, beta=linear)
    return result.T if is_tall else result
