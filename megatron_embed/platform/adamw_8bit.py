"""AdamW whose two moments are held in 8 bits, by bitsandbytes' kernels (Dettmers et al. 2022, arXiv:2110.02861)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Elements of a moment that share a scale."""
SMALLEST = 4096
"""Elements below which the moments of a tensor stay in float32, as in bitsandbytes."""


@dataclass
class Moment:
    """One moment of a parameter, as bitsandbytes takes it."""

    values: Tensor
    """The parameter's shape; uint8 codes, or float32 of a small parameter."""
    scales: Tensor | None
    """[blocks] float32; None: the values are float32."""


class AdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' AdamW with 8-bit moments, with Apex's arguments and one `step` per parameter group, as Megatron
    builds it.

    The moments are not in `state`, whose tensors Megatron takes for float32: checkpoints hold them as `moments` returns
    them, so that a run may resume with another optimizer, or in another layout with other blocks.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
                 adam_w_mode: bool = True, capturable: bool = False) -> None:
        assert adam_w_mode and not capturable, "neither L2 regularization nor CUDA graphs are ever asked for"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._moments: dict[Tensor, tuple[Moment, Moment]] = {}
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def initialize(self) -> None:
        """Create the moments that do not exist yet, zero, and count the steps from 0."""
        for group in self.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                self.state[parameter] = {}
                if parameter not in self._moments:
                    self._moments[parameter] = (new_moment(parameter), new_moment(parameter))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        self.initialize()
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        functions: Any = _functions()
        first, second = self._moments[parameter]
        beta1, beta2 = group["betas"]
        rates = {"weight_decay": group["weight_decay"], "gnorm_scale": 1.0}
        gradient = parameter.grad
        assert gradient is not None
        if first.scales is None or second.scales is None:
            functions.optimizer_update_32bit(
                "adam", gradient.contiguous(), parameter, first.values, beta1, group["eps"], group["step"], group["lr"],
                second.values, beta2, 0.0, 0.0, **rates)
            return
        signed, unsigned = self._code(parameter.device)
        functions.optimizer_update_8bit_blockwise(
            "adam", gradient.contiguous(), parameter, first.values, second.values, beta1, beta2, 0.0, 0.0, group["eps"],
            group["step"], group["lr"], signed, unsigned, first.scales, second.scales, **rates)

    @torch.no_grad()
    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """`exp_avg` and `exp_avg_sq` of a parameter in float32, such that `load_moments` restores the same bits.

        Of a block whose largest value is negative, one that has the lowest code is the scale itself: that code is not
        -1, and the scale could not be told from the others.
        """
        codes = self._code(parameter.device)
        return {name: _restored(moment, code) for name, moment, code in zip(
            ("exp_avg", "exp_avg_sq"), self._moments[parameter], codes, strict=True)}

    @torch.no_grad()
    def load_moments(self, parameter: Tensor, values: dict[str, Tensor]) -> None:
        """Take `exp_avg` and `exp_avg_sq`, float32 of the parameter's size."""
        codes = self._code(parameter.device)
        for name, moment, code in zip(("exp_avg", "exp_avg_sq"), self._moments[parameter], codes, strict=True):
            _assign(moment, values[name].to(parameter.device).view(parameter.shape), code)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the groups' settings and steps; moments come by `load_moments`."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.initialize()

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(moment.values.nbytes + (0 if moment.scales is None else moment.scales.nbytes)
                   for pair in self._moments.values() for moment in pair)

    def _code(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[256] float32 each: what 8 bits stand for in the first moment, which has a sign, and in the second."""
        if device not in self._maps:
            functions: Any = _functions()
            self._maps[device] = (functions.create_dynamic_map(signed=True).to(device),
                                  functions.create_dynamic_map(signed=False).to(device))
        return self._maps[device]


def new_moment(parameter: Tensor) -> Moment:
    """Zeros, in 8 bits where the parameter is large enough."""
    if parameter.numel() < SMALLEST:
        return Moment(values=torch.zeros_like(parameter, dtype=torch.float32), scales=None)
    return Moment(values=torch.zeros_like(parameter, dtype=torch.uint8),
                  scales=torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device))


def _restored(moment: Moment, code: Tensor) -> Tensor:
    if moment.scales is None:
        return moment.values.clone()
    codes = torch.nn.functional.pad(moment.values.flatten().int(), (0, -moment.values.numel() % BLOCK), value=-1)
    blocks = codes.view(-1, BLOCK)
    values = code[blocks.clamp(min=0)] * moment.scales[:, None]
    lowest, has_lowest = (blocks == 0).int().max(dim=1)[::-1]
    rows = (has_lowest.bool() & ~(blocks == len(code) - 1).any(dim=1)).nonzero()[:, 0]
    if code[0] < 0:
        values[rows, lowest[rows]] = -moment.scales[rows]
    return values.flatten()[:moment.values.numel()].view(moment.values.shape)


def _assign(moment: Moment, values: Tensor, code: Tensor) -> None:
    if moment.scales is None:
        moment.values.copy_(values)
        return
    padded = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(dim=1)
    borders = (code[1:] + code[:-1]) / 2
    codes = torch.bucketize(padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], borders)
    moment.scales.copy_(scales)
    moment.values.copy_(codes.flatten()[:values.numel()].view(values.shape))


def _functions() -> Any:
    """bitsandbytes.functional, imported where an update is made: the package is optional."""
    import bitsandbytes.functional as functions

    return functions
