"""AdamW whose two moments are held in 8 bits, by bitsandbytes' kernels (Dettmers et al. 2022, arXiv:2110.02861)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Elements of a moment that share a scale."""
RESTORED_AT_ONCE = 1 << 14
"""Blocks of a moment that are restored to float32 at once."""
SMALLEST = 4096
"""Elements below which the moments of a tensor stay in float32, as in bitsandbytes."""


@dataclass(frozen=True)
class SlicePosition:
    """Position of an optimizer's parameter within the model's, of which a distributed optimizer has a slice."""

    start: int
    """First element, in row-major order."""
    total: int
    """Elements of the model's parameter."""

    @property
    def before(self) -> int:
        """Elements of the first block that lie before this slice."""
        return self.start % BLOCK


@dataclass
class Moment:
    """One moment of a parameter, as bitsandbytes takes it."""

    values: Tensor
    """The parameter's shape; uint8 codes, or float32 of a small parameter."""
    scales: Tensor | None
    """[blocks] float32, of which the first and the last may be only partly in this slice; None: the values are
    float32."""


class AdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' AdamW with 8-bit moments, with Apex's arguments and one `step` per parameter group, as Megatron
    builds it.

    The moments are not in `state`, whose tensors Megatron takes for float32: checkpoints hold them as `moments` returns
    them, so that a run may resume with another optimizer, or in another layout. Blocks begin at the first element of
    the model's parameter, whichever slice of it is here, so a change of layout only affects those that it cuts.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
                 adam_w_mode: bool = True, capturable: bool = False) -> None:
        assert adam_w_mode and not capturable, "neither L2 regularization nor CUDA graphs are ever asked for"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.positions: Mapping[Tensor, SlicePosition] = {}
        """Parameters that are slices; set it before the first step."""
        self._moments: dict[Tensor, tuple[Moment, Moment]] = {}
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def initialize(self) -> None:
        """Create the entries of `state` that do not exist yet, and count the steps from 0."""
        for group in self.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                self.state[parameter] = {}

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
        first, second = self._moments_of(parameter)
        beta1, beta2 = group["betas"]
        rates = {"weight_decay": group["weight_decay"], "gnorm_scale": 1.0}
        assert parameter.grad is not None
        gradient = parameter.grad.contiguous()
        if first.scales is None or second.scales is None:
            functions.optimizer_update_32bit(
                "adam", gradient, parameter, first.values, beta1, group["eps"], group["step"], group["lr"],
                second.values, beta2, 0.0, 0.0, **rates)
            return
        signed, unsigned = self._code(parameter.device)
        for run, blocks in self._runs(parameter):
            functions.optimizer_update_8bit_blockwise(
                "adam", gradient.view(-1)[run], parameter.view(-1)[run], first.values.view(-1)[run],
                second.values.view(-1)[run], beta1, beta2, 0.0, 0.0, group["eps"], group["step"], group["lr"], signed,
                unsigned, first.scales[blocks], second.scales[blocks], **rates)

    def _runs(self, parameter: Tensor) -> list[tuple[slice, slice]]:
        """(elements, blocks) of what the kernel takes at once: the rest of a block that begins before this slice, and
        everything after it."""
        rest = min(-self._position(parameter).start % BLOCK, parameter.numel())
        runs = [(slice(0, rest), slice(0, 1))] if rest else []
        if rest < parameter.numel():
            runs.append((slice(rest, None), slice(len(runs), None)))
        return runs

    def _position(self, parameter: Tensor) -> SlicePosition:
        return self.positions.get(parameter) or SlicePosition(start=0, total=parameter.numel())

    def _moments_of(self, parameter: Tensor) -> tuple[Moment, Moment]:
        """Both moments; zeros before the first step."""
        if parameter not in self._moments:
            position = self._position(parameter)
            self._moments[parameter] = (new_moment(parameter, position), new_moment(parameter, position))
        return self._moments[parameter]

    @torch.no_grad()
    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """`exp_avg` and `exp_avg_sq` of a parameter in float32, such that `load_moments` restores the same bits.

        Of a block whose largest value is negative, one that has the lowest code is the scale itself: that code is not
        -1, and the scale could not be told from the others.
        """
        codes = self._code(parameter.device)
        before = self._position(parameter).before
        return {name: _restored(moment, code, before) for name, moment, code in zip(
            ("exp_avg", "exp_avg_sq"), self._moments_of(parameter), codes, strict=True)}

    @torch.no_grad()
    def load_moments(self, parameter: Tensor, values: dict[str, Tensor]) -> None:
        """Take `exp_avg` and `exp_avg_sq`, float32 of the parameter's size."""
        codes, before = self._code(parameter.device), self._position(parameter).before
        for name, moment, code in zip(("exp_avg", "exp_avg_sq"), self._moments_of(parameter), codes, strict=True):
            _assign(moment, values[name].to(parameter.device).view(parameter.shape), code, before)

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


def new_moment(parameter: Tensor, position: SlicePosition) -> Moment:
    """Zeros, in 8 bits where the model's parameter is large enough."""
    if position.total < SMALLEST:
        return Moment(values=torch.zeros_like(parameter, dtype=torch.float32), scales=None)
    blocks = -(-(position.before + parameter.numel()) // BLOCK)
    return Moment(values=torch.zeros_like(parameter, dtype=torch.uint8),
                  scales=torch.zeros(blocks, device=parameter.device))


def _blocks(values: Tensor, before: int, fill: int) -> Tensor:
    """[blocks, BLOCK]: the values, with `fill` in the positions of the first and the last block that are not here."""
    after = -(before + values.numel()) % BLOCK
    return torch.nn.functional.pad(values.flatten(), (before, after), value=fill).view(-1, BLOCK)


def _restored(moment: Moment, code: Tensor, before: int) -> Tensor:
    """The values in float32; what is computed on the way is of RESTORED_AT_ONCE blocks, not of a whole embedding."""
    if moment.scales is None:
        return moment.values.clone()
    restored = torch.empty_like(moment.values, dtype=torch.float32)
    for first in range(0, len(moment.scales), RESTORED_AT_ONCE):
        low = max(0, first * BLOCK - before)
        high = min(restored.numel(), (first + RESTORED_AT_ONCE) * BLOCK - before)
        restored.view(-1)[low:high] = _restored_blocks(
            moment.values.view(-1)[low:high], moment.scales[first:first + RESTORED_AT_ONCE], code,
            before if first == 0 else 0)
    return restored


def _restored_blocks(stored: Tensor, scales: Tensor, code: Tensor, before: int) -> Tensor:
    blocks = _blocks(stored.int(), before, -1)
    values = code[blocks.clamp(min=0)] * scales[:, None]
    lowest, has_lowest = (blocks == 0).int().max(dim=1)[::-1]
    rows = (has_lowest.bool() & ~(blocks == len(code) - 1).any(dim=1)).nonzero()[:, 0]
    if code[0] < 0:
        values[rows, lowest[rows]] = -scales[rows]
    return values.flatten()[before:before + stored.numel()]


def _assign(moment: Moment, values: Tensor, code: Tensor, before: int) -> None:
    if moment.scales is None:
        moment.values.copy_(values)
        return
    blocks = _blocks(values, before, 0)
    scales = blocks.abs().amax(dim=1)
    borders = (code[1:] + code[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], borders)
    moment.scales.copy_(scales)
    moment.values.copy_(codes.flatten()[before:before + values.numel()].view(values.shape))


def _functions() -> Any:
    """bitsandbytes.functional, imported where an update is made: the package is optional."""
    import bitsandbytes.functional as functions

    return functions
